"""The standard library's own tests of ``multiprocessing.Pool``, taken from this interpreter and pointed at ours."""

from __future__ import annotations

import multiprocessing
import multiprocessing.pool
import unittest
from collections.abc import Iterator
from typing import Any

import pytest

from cloud.pool import Pool
from tests.dropin.pool_functions import start_all

try:
    from test import _test_multiprocessing as theirs
except (ImportError, unittest.SkipTest):
    pytest.skip("this interpreter comes without its tests", allow_module_level=True)

EXCLUDED = {
    "_TestPool.test_make_pool": "counts the processes in the private attribute _pool; what it is about is in test_pool.py",
    "_TestPoolWorkerErrors.test_unpickleable_result": "its result is a lambda, which ours brings back",
    "_TestPoolWorkerLifetime.test_pool_worker_lifetime": "takes pids from the private attribute _pool; see test_pool.py",
    "TestPoolNotLeakOnFailure.test_release_unused_processes": "replaces the class Process, of which we make none",
}

CLASSES = ("_TestPool", "_TestPoolWorkerErrors", "_TestPoolWorkerLifetime", "TestPoolNotLeakOnFailure")
SINGLE = (("TestInitializers", "test_pool_initializer"), ("TestStdinBadfiledescriptor", "test_pool_in_process"))


def cases() -> Iterator[tuple[str, str]]:
    for name in CLASSES:
        for method in unittest.TestLoader().getTestCaseNames(_concrete(name)):
            yield name, method
    yield from SINGLE


def _concrete(name: str) -> type[unittest.TestCase]:
    base = getattr(theirs, name)
    if issubclass(base, unittest.TestCase):
        return base
    return type(name, (base, unittest.TestCase), {"TYPE": "processes", "Pool": staticmethod(Pool)})


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    # One for all cases: each worker has to load their module, which takes longer than most cases.
    with Pool(4) as pool:
        start_all(pool, 4)
        pool.apply_async(int, callback=lambda value: None).get()
        yield pool
    pool.join()


@pytest.mark.parametrize(("name", "method"), [pytest.param(*case, id=".".join(case)) for case in cases()])
def test_case(name: str, method: str, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = EXCLUDED.get(f"{name}.{method}")
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(multiprocessing, "Pool", Pool)
    monkeypatch.setattr(multiprocessing.pool, "Pool", Pool)
    case: Any = _concrete(name)(method)
    case.pool = pool
    result = unittest.TestResult()
    case.run(result)
    assert [text for _, text in (*result.errors, *result.failures)] == []
    if result.skipped:
        pytest.skip(result.skipped[0][1])


def test_what_is_excluded_exists() -> None:
    known = {".".join(case) for case in cases()}
    assert EXCLUDED.keys() - known == set()
