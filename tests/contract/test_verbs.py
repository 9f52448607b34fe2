"""The verbs at their border: signatures, what is a function and what is a jid, states, and how a cloud is closed."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import cloud
from cloud.errors import BackendClosed, CloudException, CloudTimeoutError, JobNotFound
from tests import sample_functions as sample
from tests.contract import jobs
from tests.contract.conftest import EMBEDDED_ONLY
from tests.contract.jobs import Gate, Point, eventually, note, notes

UNKNOWN = 987654321

SHOWN = {
    "call": "(func, /, *args, **kwargs)",
    "map": "(func, *iterables, **kwargs)",
    "starmap": "(func, iterable, **kwargs)",
    "join": "(jids, timeout=None, ignore_errors=False, progress=False)",
    "result": "(jids, timeout=None, ignore_errors=False, progress=False)",
    "aresult": "(jids, timeout=None, ignore_errors=False)",
    "iresult": "(jids, timeout=None, num_in_parallel=10, ignore_errors=False, progress=False)",
    "iresult_unordered": "(jids, timeout=None, ignore_errors=True, progress=False)",
    "progress": "(jids, timeout=None)",
    "status": "(jids)",
    "info": "(jids, info_requested=None)",
    "find": "(label=None, status=None, function=None)",
    "kill": "(jids=None)",
    "delete": "(jids)",
    "connection_info": "()",
    "close": "()",
}

Verb = Callable[[ModuleType, Any], Any]

VERBS: dict[str, Verb] = {
    "join": lambda api, jids: api.join(jids),
    "result": lambda api, jids: api.result(jids),
    "aresult": lambda api, jids: asyncio.run(api.aresult(jids)),
    "iresult": lambda api, jids: api.iresult(jids),
    "iresult_unordered": lambda api, jids: api.iresult_unordered(jids),
    "progress": lambda api, jids: api.progress(jids),
    "status": lambda api, jids: api.status(jids),
    "info": lambda api, jids: api.info(jids),
    "kill": lambda api, jids: api.kill(jids),
    "delete": lambda api, jids: api.delete(jids),
}


def test_verbs_have_their_documented_signatures(api: ModuleType) -> None:
    for verb, shown in SHOWN.items():
        signature = inspect.signature(getattr(api, verb))
        bare = signature.replace(
            parameters=[each.replace(annotation=each.empty) for each in signature.parameters.values()],
            return_annotation=signature.empty,
        )
        assert f"{verb}{bare}" == f"{verb}{shown}"


def test_constants_and_exceptions_are_there(api: ModuleType) -> None:
    assert api.finished_statuses == ["done", "stalled", "error", "killed"]
    assert api.CloudException is CloudException
    assert api.CloudTimeoutError is CloudTimeoutError


# --- what is a function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["call", "map", "starmap"])
@pytest.mark.parametrize("wrong", [5, None, "square", [len]], ids=repr)
def test_what_is_not_callable_is_refused(api: ModuleType, verb: str, wrong: Any) -> None:
    with pytest.raises(TypeError) as caught:
        getattr(api, verb)(wrong, [1])
    assert str(caught.value) == f"{api.__name__}.{verb} first argument ({wrong!r}) is not callable"
    assert api.find() == []


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), ((1, 2), {}), ((), {"y": 1}), ((1,), {"x": 1}), ((1,), {"y": 1}), ((1, 2), {"k": 3})],
    ids=repr,
)
def test_arguments_are_checked_before_submission(api: ModuleType, args: Any, kwargs: Any) -> None:
    for function in (jobs.needs_one, lambda x, *, k=0: x, Point(1).scaled, partial(jobs.needs_one)):
        with pytest.raises(TypeError, match=r"argument"):
            api.call(function, *args, **kwargs)
    assert api.find() == []


@pytest.mark.parametrize(
    ("args", "kwargs"), [((1,), {}), ((1,), {"k": 2}), ((), {"x": 3}), ((), {"k": 4, "x": 5})], ids=repr
)
def test_arguments_that_fit_arrive(api: ModuleType, args: Any, kwargs: Any) -> None:
    assert api.result(api.call(jobs.needs_one, *args, **kwargs)) == jobs.needs_one(*args, **kwargs)


def test_keyword_arguments_of_any_name_arrive(api: ModuleType) -> None:
    given = {"func": 1, "self": 2, "jids": 3, "_mine": 4, "callback": 5, "label": 6, "timeout": 7}
    assert api.result(api.call(sample.keywords, 1, [2], **given)) == ((1, [2]), given)


# --- what is a jid ----------------------------------------------------------------------------------------------------

WRONG_JIDS = [
    "1",
    b"1",
    bytearray(b"\x01"),
    True,
    1.0,
    object(),
    np.float64(1),
    np.True_,
    ["1"],
    [b"1"],
    [True],
    [1.0],
    [None],
]


def test_only_numbers_are_jids(api: ModuleType) -> None:
    jid = api.call(sample.nothing)
    api.join(jid)
    for verb, ask in VERBS.items():
        for wrong in (*WRONG_JIDS, *([None] if verb != "kill" else [])):
            with pytest.raises(TypeError) as caught:
                ask(api, wrong)
            assert str(caught.value).startswith(f"cloud.{verb} requires numeric jid(s)"), wrong
        assert api.status(jid) == "done"


def test_only_numbers_are_jids_to_depend_on(api: ModuleType) -> None:
    for wrong in WRONG_JIDS:
        with pytest.raises(TypeError, match="^_depends_on must be a jid or list of jids"):
            api.call(sample.nothing, _depends_on=wrong)
        with pytest.raises(TypeError, match="^_depends_on must be a jid or list of jids"):
            api.map(sample.square, [1], _depends_on=wrong)
    assert api.find() == []


def forms(jids: range) -> dict[str, Any]:
    """One set of six jids, in every form that is one."""
    a, b, c, d, e, f = jids
    return {
        "range": jids,
        "range backwards": range(f, a - 1, -1),
        "range with a step": range(a, f + 1, 2),
        "list": [a, b, c],
        "tuple": (c, a),
        "duplicates": [a, a, b, a],
        "set": {a, b},
        "dict": {b: "x", a: "y"},
        "deque": deque([a, c]),
        "piecewise": [a, c, range(d, f + 1)],
        "ranges": [range(a, c), range(a, b), range(0)],
        "numpy int": np.int64(b),
        "numpy array": np.array([a, c]),
        "numpy in a list": [np.int32(a), b, range(c, e), np.uint64(e)],
        "int": a,
        "empty list": [],
        "empty range": range(0),
        "empty set": set(),
    }


def flat(form: Any) -> list[int]:
    if not hasattr(form, "__iter__"):
        return [int(form)]
    return [int(jid) for each in form for jid in (each if isinstance(each, range) else [each])]


def test_every_verb_takes_jids_in_every_form(api: ModuleType) -> None:
    jids = api.map(sample.square, range(6))
    api.join(jids)
    for name, form in forms(jids).items():
        one, wanted = not hasattr(form, "__iter__"), [(jid - jids[0]) ** 2 for jid in flat(form)]
        iterate = (lambda form=form: form) if one else (lambda form=form: iter(form))
        for given in (form, iterate()):
            again = (lambda given=given: given) if given is form else iterate
            assert api.result(again()) == (wanted[0] if one else wanted), name
            assert asyncio.run(api.aresult(again())) == (wanted[0] if one else wanted), name
            assert list(api.iresult(again())) == wanted, name
            assert api.status(again()) == ("done" if one else ["done"] * len(wanted)), name
            assert list(api.info(again(), "status")) == list(dict.fromkeys(flat(form))), name
            assert sorted(api.iresult_unordered(again())) == sorted(
                {(jid, (jid - jids[0]) ** 2) for jid in flat(form)}
            ), name
            assert api.join(again()) is None
            assert api.kill(again()) is None
            assert api.progress(again()) is None
            assert api.result(api.call(sample.nothing, _depends_on=again())) is None


def test_delete_takes_jids_in_every_form(api: ModuleType) -> None:
    for name in forms(range(6)):
        jids = api.map(sample.square, range(6))
        form = forms(jids)[name]
        assert api.delete(form) is None
        gone = set(flat(form))
        assert [jid for jid in jids if jid in api.find()] == [jid for jid in jids if jid not in gone]
        for jid in jids:
            if jid in gone:
                with pytest.raises(JobNotFound):
                    api.status(jid)


@pytest.mark.parametrize("unknown", [UNKNOWN, 0, -1, 2**70], ids=str)
def test_an_unknown_jid_is_an_error_and_changes_nothing(
    api: ModuleType, one_slot: None, gate: Gate, unknown: int
) -> None:
    done, running = api.call(sample.square, 3), api.call(gate.hold)
    queued = api.map(sample.square, range(3))
    gate.await_begun()
    before = api.info([done, running, *queued], ["status", "stdout", "attempt"])
    forms = unknown, [unknown], [done, running, unknown], [queued, unknown], [unknown, range(done, done + 1)]
    for asked, verb in product(forms, VERBS):
        with pytest.raises(JobNotFound) as caught:
            VERBS[verb](api, asked)
        assert str(caught.value) == f"Job {unknown}: Does not exist or was purged from cache", verb
        assert caught.value.jid == unknown
        assert api.info([done, running, *queued], ["status", "stdout", "attempt"]) == before, verb


def test_depending_on_an_unknown_jid_submits_nothing(api: ModuleType) -> None:
    known = api.call(sample.nothing)

    def items() -> Any:
        raise AssertionError("consumed")
        yield

    for submit in (
        partial(api.call, sample.nothing),
        partial(api.map, sample.square, items()),
        partial(api.starmap, sample.square, items()),
    ):
        with pytest.raises(JobNotFound) as caught:
            submit(_depends_on=[known, UNKNOWN])
        assert str(caught.value) == f"Job {UNKNOWN}: This dependency does not exist."
    assert api.find() == [known]
    assert api.call(sample.nothing) == known + 1


# --- asking -----------------------------------------------------------------------------------------------------------


def test_status_names_every_state(api: ModuleType, one_slot: None, gate: Gate) -> None:
    done, failed = api.call(sample.nothing), api.call(sample.boom)
    api.join([done, failed], ignore_errors=True)
    running = api.call(gate.hold)
    gate.await_begun()
    queued = api.call(sample.nothing)
    killed = api.call(sample.nothing)
    waiting = api.call(sample.nothing, _depends_on=queued)
    stalled = api.call(sample.nothing, _depends_on=failed)
    api.kill(killed)
    every = [waiting, queued, running, done, failed, killed, stalled]
    names = ["waiting", "queued", "processing", "done", "error", "killed", "stalled"]
    assert api.status(every) == names
    assert [api.status(jid) for jid in every] == names
    for name, jid in zip(names, every, strict=True):
        assert api.find(status=name) == [jid]
    assert api.find(status=api.finished_statuses) == [done, failed, killed, stalled]


def test_find_matches_all_that_is_given(api: ModuleType) -> None:
    first = api.call(sample.square, 1, _label="a")
    others = api.map(sample.boom_if, [0, 1], _label="b")
    last = api.call(lambda: None, _label="a")
    plain = api.call(sample.square, 1)
    api.join([first, *others, last, plain], ignore_errors=True)
    assert api.find() == [first, *others, last, plain]
    assert api.find(label="a") == api.find("a") == [first, last]
    assert api.find(label="") == api.find(label="no such label") == []
    assert api.find(function=sample.square) == [first, plain]
    assert api.find(function="square") == [first, plain]
    assert api.find(function="tests.sample_functions.square") == [first, plain]
    assert api.find(function="quare") == []
    assert api.find(label="b", status="error") == [others[1]]
    assert api.find(label="b", status=("done", "killed"), function="boom_if") == [others[0]]
    assert api.find(status=[]) == []
    api.delete([first, others[0]])
    assert api.find() == [others[1], last, plain]
    with pytest.raises(ValueError, match=r"no status is called 'finished'; there are waiting, queued,"):
        api.find(status="finished")


def test_results_are_rebuilt_by_each_call(api: ModuleType) -> None:
    jid, mapped = api.call(list, "ab"), api.map(list, ["ab"])
    for get in (
        partial(api.result, jid),
        lambda: api.result([jid, jid])[1],
        lambda: api.result(mapped)[0],
        lambda: next(api.iresult(jid)),
        lambda: next(api.iresult_unordered(jid))[1],
        lambda: asyncio.run(api.aresult(jid)),
    ):
        get().append("spoilt")
        assert get() == ["a", "b"]
    twice = api.result([jid, jid])
    assert twice[0] is not twice[1]


@EMBEDDED_ONLY
def test_jobs_of_both_namespaces_share_one_count(api: ModuleType) -> None:
    import cloud.mp

    jids = [api.call(sample.nothing), cloud.mp.call(sample.nothing), cloud.call(sample.nothing)]
    assert jids == [1, 2, 3]
    assert list(cloud.mp.map(sample.square, range(2))) == [4, 5]
    assert api.call(sample.nothing) == 6


# --- where jobs run ---------------------------------------------------------------------------------------------------


@EMBEDDED_ONLY
def test_local_and_simulated_jobs_do_not_run_on_the_cloud(api: ModuleType) -> None:
    assert cloud.is_simulated() is True
    assert cloud.running_on_cloud() is False
    assert api.result(api.call(lambda: (cloud.is_simulated(), cloud.running_on_cloud()))) == (True, False)


def test_connection_info(api: ModuleType, backend_name: str, configure: Callable[..., None]) -> None:
    configure(num_procs=3)
    kind = {"mp": "multiprocessing", "simulator": "simulation", "http": "server"}[backend_name]
    # A server tells more of itself.
    assert api.connection_info().items() >= {"opened": False, "connection_type": kind, "num_procs": 3}.items()
    api.call(sample.nothing)
    assert api.connection_info().items() >= {"opened": True, "connection_type": kind, "num_procs": 3}.items()
    api.close()
    assert api.connection_info()["opened"] is False


@EMBEDDED_ONLY
def test_close_tells_whether_it_was_open_and_the_next_use_opens_again(api: ModuleType, gate: Gate) -> None:
    assert api.close() is False
    jid, running = api.call(sample.square, 3), api.call(gate.hold)
    assert api.result(jid) == 9
    assert api.close() is True
    assert api.close() is False
    for gone in (jid, running):
        with pytest.raises(JobNotFound):
            api.result(gone)
    again = api.call(sample.square, 4)
    assert again > running
    assert api.result(again) == 16
    assert api.close() is True


def test_close_wakes_whoever_waits(api: ModuleType, gate: Gate) -> None:
    jid = api.call(gate.hold)
    gate.await_begun()
    raised: list[BaseException] = []

    def wait(get: Callable[[], Any]) -> None:
        try:
            get()
        except BaseException as exc:
            raised.append(exc)

    waits = [
        partial(api.join, jid),
        partial(api.result, [jid], ignore_errors=True),
        lambda: next(api.iresult(jid)),
        lambda: next(api.iresult_unordered(jid)),
    ]
    threads = [threading.Thread(target=wait, args=(get,)) for get in waits]
    for thread in threads:
        thread.start()
    with pytest.raises(CloudTimeoutError):
        api.join(jid, timeout=0.05)
    api.close()
    for thread in threads:
        thread.join(10)
    assert [type(exc) for exc in raised] == [BackendClosed] * len(waits)


def test_many_threads_use_every_verb(api: ModuleType, tmp_path: Any) -> None:
    failures: list[BaseException] = []
    log = str(tmp_path / "log")

    def work(k: int) -> None:
        try:
            for i in range(10):
                jids = api.map(sample.add, range(20), [k] * 20, _label=f"thread {k}")
                failing = api.call(sample.boom, f"{k} {i}")
                assert api.result(jids) == [j + k for j in range(20)]
                with pytest.raises(CloudException, match=f"{k} {i}"):
                    api.join(failing)
                assert set(api.status([*jids, failing])) == {"done", "error"}
                assert api.find(label=f"thread {k}", status="done") == list(jids)
                assert api.info(jids[3], "label") == {jids[3]: {"label": f"thread {k}"}}
                api.delete(jids)
            note(log, str(k))
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert sorted(eventually(lambda: notes(log))) == [str(k) for k in range(6)]
