"""The thread that runs a pool's callbacks: in order, to the end, and gone afterwards."""

from __future__ import annotations

import threading

from cloud.pool.callbacks import CallbackThread


def _threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "cloud-pool-callbacks"]


def test_it_runs_what_it_is_given_in_order_and_ends() -> None:
    callbacks, seen = CallbackThread(), list[int]()
    for number in range(100):
        callbacks.put(lambda number=number: seen.append(number))  # type: ignore[misc]
    assert len(_threads()) == 1
    callbacks.stop()
    assert seen == list(range(100))
    assert not _threads()


def test_what_comes_after_the_end_is_done_and_leaves_no_thread() -> None:
    # A server's report that a job has ended may come while the executor closes.
    callbacks = CallbackThread()
    callbacks.put(lambda: None)
    callbacks.stop()
    done = [threading.Event() for _ in range(20)]
    for each in done:
        callbacks.put(each.set)
    for each in done:
        assert each.wait(10)
    for thread in _threads():
        thread.join(10)
    assert not _threads()
    callbacks.stop()
