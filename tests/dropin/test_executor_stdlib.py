"""The standard library's own tests of ``ProcessPoolExecutor``, taken from this interpreter and pointed at ours."""

from __future__ import annotations

import importlib
import re
import sys
import unittest
from collections.abc import Iterator
from concurrent import futures
from multiprocessing import resource_tracker
from typing import Any

import pytest

import cloud.futures.errors  # noqa: F401 - before the tests replace what it looks for
from cloud import Executor
from tests.scripts import REPO

# Before Python 3.12 they were one module with other names; not every interpreter comes with its tests.
ROOMS = ("test_as_completed", "test_deadlock", "test_init", "test_process_pool", "test_shutdown", "test_wait")
try:
    for room in ROOMS:
        importlib.import_module(f"test.test_concurrent_futures.{room}")
except (ImportError, unittest.SkipTest):
    pytest.skip("this interpreter comes without these tests", allow_module_level=True)

KINDS = re.compile("ProcessPool(Fork|Spawn)(?!server)")

UNBROKEN = "expects a broken executor; ours goes on, and what could not be rebuilt is the task's error, see test_executor_faults"
PROCESSES = "looks at the private attribute _processes; what it is about is in test_executor_faults.py"
MANAGER = "looks at the private attributes _executor_manager_thread and _processes; see test_executor.py"
EXCLUDED = {
    "test_error_at_task_unpickle": UNBROKEN,
    "test_exit_at_task_unpickle": UNBROKEN,
    "test_error_during_result_unpickle_in_result_handler": UNBROKEN,
    "test_exit_during_result_unpickle_in_result_handler": UNBROKEN,
    "test_exit_during_result_pickle_on_worker": "expects the SystemExit; ours says that the result cannot be pickled",
    "test_shutdown_deadlock_pickle": MANAGER,
    "test_del_shutdown": MANAGER,
    "test_shutdown_no_wait": MANAGER,
    "test_context_manager_shutdown": PROCESSES,
    "test_idle_process_reuse_multiple": PROCESSES,
    "test_idle_process_reuse_one": PROCESSES,
    "test_killed_child": PROCESSES,
    "test_max_tasks_per_child": PROCESSES,
    "test_processes_terminate": PROCESSES,
    "test_saturation": PROCESSES,
    "test_max_tasks_per_child_defaults_to_spawn_context": "looks at the private attribute _mp_context",
    "test_python_finalization_error": "counts the threads the standard library starts, and fails the second",
    "test_cancel_futures": "expects one of the tasks to have begun; ours cancels all, as none has",
    "test_submit_after_interpreter_shutdown": "expects exit handlers to be refused; ours serves them until it ends itself",
}
EXCLUDED_CASES = {
    "FailingInitializerTest.test_initializer": "looks at the private attribute _broken; see test_executor_faults.py",
}

PREFIX = """
import sys
sys.path.insert(0, {path!r})
import concurrent.futures, cloud
concurrent.futures.Executor = cloud.Executor
"""


@pytest.fixture(scope="module", autouse=True)
def tracker() -> Iterator[None]:
    # Their locks and managers start it; it is no leak of one test.
    resource_tracker.ensure_running()
    yield
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


def ours_first(run: Any) -> Any:
    """Have programs of these tests find our class under its name in concurrent.futures."""
    return lambda flag, source: run(flag, PREFIX.format(path=str(REPO)) + source)


def cases() -> Iterator[tuple[str, str, str]]:
    for room in ROOMS:
        module = importlib.import_module(f"test.test_concurrent_futures.{room}")
        for name, value in sorted(vars(module).items()):
            if KINDS.match(name) and issubclass(value, unittest.TestCase):
                for method in unittest.TestLoader().getTestCaseNames(value):
                    yield room, name, method


@pytest.mark.parametrize(("room", "name", "method"), [pytest.param(*case, id=".".join(case[1:])) for case in cases()])
def test_case(room: str, name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = EXCLUDED.get(method) or next(
        (why for end, why in EXCLUDED_CASES.items() if f"{name}.{method}".endswith(end)), None
    )
    if reason is not None:
        pytest.skip(reason)
    case: Any = getattr(sys.modules[f"test.test_concurrent_futures.{room}"], name)(method)
    case.executor_type = Executor
    shutdown: Any = sys.modules["test.test_concurrent_futures.test_shutdown"]
    monkeypatch.setattr(shutdown, "assert_python_ok", ours_first(shutdown.assert_python_ok))
    monkeypatch.setattr(futures, "ProcessPoolExecutor", Executor)
    result = unittest.TestResult()
    case.run(result)
    assert [text for _, text in (*result.errors, *result.failures)] == []
    if result.skipped:
        pytest.skip(result.skipped[0][1])


def test_what_is_excluded_exists() -> None:
    assert EXCLUDED.keys() - {method for _, _, method in cases()} == set()
