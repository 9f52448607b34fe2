"""A map that somebody waits for patiently, beside all that can happen meanwhile."""

from __future__ import annotations

from tests.scripts import ScriptRunner


def test_batches_are_forgotten_meanwhile(run_script: ScriptRunner) -> None:
    out = run_script(
        """
        import threading
        import cloud.mp as cloud

        def work(n):
            return sum(range(2000))

        cloud.result(cloud.map(work, range(100)))
        for _ in range(3):
            jids = cloud.map(work, range(3000))
            waiting = threading.Thread(target=cloud.join, args=(jids,))
            waiting.start()
            calls = []
            for n in range(1500):
                calls.append(cloud.call(work, n))
                if n % 10 == 0:
                    cloud.status(jids[-1])
            cloud.join(calls[-5:])
            waiting.join()
            print(len(set(cloud.result(jids))), cloud.info(jids[-1], "attempt")[jids[-1]])
        """,
        env={"CLOUD_MP_CACHE_SIZE_LIMIT": "2000", "CLOUD_NUM_PROCS": "2"},
    ).stdout
    assert out == "1 {'attempt': 1}\n" * 3


def test_a_handler_that_raises_while_somebody_asks_costs_nothing(run_script: ScriptRunner) -> None:
    out = run_script(
        """
        import signal, threading
        import cloud.mp as cloud

        class TooLate(Exception):
            pass

        def too_late(number, frame):
            raise TooLate

        def work(n):
            return sum(range(20000)) + n

        cloud.result(cloud.map(work, range(20)))
        signal.signal(signal.SIGALRM, too_late)
        n_raised = 0
        for _ in range(4):
            jids = cloud.map(work, range(1000))
            waiting = threading.Thread(target=cloud.join, args=(jids,))
            waiting.start()
            while waiting.is_alive():
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0007)
                    while waiting.is_alive():
                        cloud.status(jids)
                except TooLate:
                    n_raised += 1
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)
            except TooLate:
                pass
            values = cloud.result(jids)
            print(values == [values[0] + n for n in range(1000)])
        print(n_raised > 20)
        """
    ).stdout
    assert out == "True\n" * 5
