"""The words: states and what leads from one to another, options, jids, outcomes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.errors import CloudException
from cloud.jobs import (
    CALL_OPTIONS,
    CRON_OPTIONS,
    DEFAULT_OPTIONS,
    DONE,
    ERROR,
    ERROR_TEXT,
    FINISHED_LABELS,
    KILLED,
    PROCESSING,
    QUEUED,
    STALLED,
    STATUS_LABELS,
    STDOUT,
    TIMES,
    TRANSITIONS,
    VALUE,
    VALUES,
    WAITING,
    JobOptions,
    Outcome,
    jid_list,
    pack_outcome,
    pack_value,
    split_options,
    unpack_value,
)
from cloud.serialization.plain import without_value
from tests.unit.test_engine import RAISED, House, done

FINAL = [DONE, ERROR, KILLED, STALLED]

# --- states -----------------------------------------------------------------------------------------------------------


def test_states_have_the_names_users_know() -> None:
    assert list(STATUS_LABELS) == ["waiting", "queued", "processing", "done", "error", "killed", "stalled"]
    assert list(TRANSITIONS) == list(range(len(STATUS_LABELS)))
    assert sorted(FINISHED_LABELS) == sorted(STATUS_LABELS[status] for status in FINAL)


Known = tuple[House, int, int | None]
"""An engine, a job in it, and what the job depends on."""


def _waiting(**values: Any) -> Known:
    house = House()
    before = house.call()
    return house, house.call(depends_on=[before], **values), before


def _backing_off() -> Known:
    house = House()
    jid = house.call(retries=1, retry_delay_s=5.0)
    house.run(jid, RAISED)
    return house, jid, None


def _queued(**values: Any) -> Known:
    house = House()
    return house, house.call(**values), None


def _processing(**values: Any) -> Known:
    house, jid, _ = _queued(**values)
    house.start(jid)
    return house, jid, None


def _ended(how: str) -> Known:
    house, jid, before = _waiting() if how == "stalled" else _processing()
    if before is not None:
        house.run(before, RAISED)
    elif how == "killed":
        house.engine.cancel((jid,))
        house.finish(jid, RAISED)
    else:
        house.finish(jid, done() if how == "done" else RAISED)
    return house, jid, before


BEGINNINGS: list[tuple[int, Callable[[], Known]]] = [
    (WAITING, _waiting),
    (WAITING, lambda: _waiting(ignore_dependency_errors=True)),
    (WAITING, _backing_off),
    (QUEUED, _queued),
    (PROCESSING, _processing),
    (PROCESSING, lambda: _processing(retries=2, retry_delay_s=5.0)),
    (PROCESSING, lambda: _processing(restartable=False)),
    *((status, lambda status=status: _ended(STATUS_LABELS[status])) for status in FINAL),
]


def _starts(house: House, jid: int, before: int | None) -> None:
    if jid in house.claimed():
        house.hand.begin(*house.store.locate(jid))


def _reports(outcome: bytes) -> Callable[[House, int, int | None], None]:
    def report(house: House, jid: int, before: int | None) -> None:
        # Workers report what runs, and late ones what has ended otherwise.
        if house.status(jid) >= PROCESSING:
            house.finish(jid, outcome)

    return report


def _loses(*, own_fault: bool) -> Callable[[House, int, int | None], None]:
    def lose(house: House, jid: int, before: int | None) -> None:
        if house.status(jid) >= PROCESSING:
            house.lose(jid, own_fault=own_fault)

    return lose


def _dependency_ends(outcome: bytes) -> Callable[[House, int, int | None], None]:
    def end(house: House, jid: int, before: int | None) -> None:
        if before is not None and house.status(before) < DONE:
            house.run(before, outcome)

    return end


def _is_killed(house: House, jid: int, before: int | None) -> None:
    if house.engine.cancel((jid,)):
        house.finish(jid, pack_outcome(KILLED, [(ERROR_TEXT, b"Killed")]))


EVENTS: dict[str, Callable[[House, int, int | None], Any]] = {
    "starts": _starts,
    "returns": _reports(done()),
    "raises": _reports(RAISED),
    "is killed": _is_killed,
    "is out of time": lambda house, jid, before: house.engine.out_of_time(*house.store.locate(jid)),
    "loses its worker": _loses(own_fault=False),
    "ends its worker": _loses(own_fault=True),
    "its dependency is done": _dependency_ends(done()),
    "its dependency fails": _dependency_ends(RAISED),
    "time passes": lambda house, jid, before: house.pass_time(60.0),
}


def observed() -> dict[tuple[int, int], list[str]]:
    """What the engine makes of each event in each state: pairs of states, and the events that led from one to other."""
    pairs: dict[tuple[int, int], list[str]] = {}
    for (status, begin), (name, event) in product(BEGINNINGS, EVENTS.items()):
        house, jid, before = begin()
        assert house.status(jid) == status
        event(house, jid, before)
        pairs.setdefault((status, house.status(jid)), []).append(name)
    return pairs


OBSERVED = observed()


@pytest.mark.parametrize("after", TRANSITIONS, ids=lambda status: f"to {STATUS_LABELS[status]}")
@pytest.mark.parametrize("before", TRANSITIONS, ids=lambda status: f"from {STATUS_LABELS[status]}")
def test_a_job_goes_from_state_to_state_as_the_table_says(before: int, after: int) -> None:
    if before != after:
        assert ((before, after) in OBSERVED) == (after in TRANSITIONS[before]), OBSERVED.get((before, after))
    else:
        # Events that mean nothing to a state leave it alone, and everything leaves a final one alone.
        assert after not in TRANSITIONS[before]
        n_events = len(OBSERVED[before, before])
        assert n_events == len(EVENTS) if before >= DONE else n_events > 0


def test_the_table_is_the_drawing() -> None:
    drawn = {
        "waiting": {"queued", "stalled", "killed"},
        "queued": {"processing", "killed"},
        "processing": {"done", "error", "killed", "queued", "waiting"},
    }
    assert {
        STATUS_LABELS[status]: {STATUS_LABELS[each] for each in after} for status, after in TRANSITIONS.items()
    } == {
        **{label: set() for label in STATUS_LABELS},
        **drawn,
    }


# --- options ----------------------------------------------------------------------------------------------------------

texts = st.text("abAB_ ä☃", max_size=8)
finite = st.floats(0, 1e6, allow_nan=False)
GOOD: dict[str, tuple[str, st.SearchStrategy[Any], Callable[[Any], Any]]] = {
    "_label": ("label", st.none() | st.text("abAB_ \x00\x7f", max_size=8), lambda value: value),
    "_priority": ("priority", st.integers(), lambda value: value),
    "_restartable": ("restartable", st.booleans(), lambda value: value),
    "_profile": ("profile", st.sampled_from([True, False, 0, 1, "yes", None]), bool),
    "_kill_process": ("kill_process", st.sampled_from([True, False, 0, 1, "yes", None]), bool),
    "_cores": ("cores", st.integers(1, 1000), lambda value: value),
    "_max_runtime": (
        "max_runtime_s",
        st.none() | st.integers(1, 10**6) | st.floats(0, 1e6, exclude_min=True),
        lambda value: None if value is None else 60.0 * value,
    ),
    "_fast_serialization": ("fast_serialization", st.sampled_from([0, 1, 2]), lambda value: value),
    "_retries": ("retries", st.integers(0, 1000), lambda value: value),
    "_retry_delay": ("retry_delay_s", st.integers(0, 1000) | finite, float),
    "_depends_on": (
        "depends_on",
        st.lists(st.integers(1, 99))
        | st.sets(st.integers(1, 99))
        | st.builds(range, st.integers(0, 9), st.integers(0, 9)),
        list,
    ),
    "_depends_on_errors": (
        "ignore_dependency_errors",
        st.sampled_from(["abort", "ignore"]),
        lambda value: value == "ignore",
    ),
    "_os_env_vars": (
        "env_vars",
        st.dictionaries(st.sampled_from("ABC"), texts) | st.just(["PATH"]),
        lambda value: ({"PATH": os.environ["PATH"]} if isinstance(value, list) else value) or None,
    ),
}
BAD: dict[str, st.SearchStrategy[Any]] = {
    "_label": st.integers() | st.binary() | st.text("ä☃", min_size=1) | st.booleans(),
    "_priority": st.none() | st.floats() | st.booleans() | texts,
    "_restartable": st.none() | st.integers() | texts,
    "_cores": st.none() | st.integers(max_value=0) | st.floats() | st.booleans() | texts,
    "_max_runtime": st.integers(max_value=0) | st.floats(max_value=0) | st.booleans() | texts | st.just(float("nan")),
    "_fast_serialization": st.none() | st.integers().filter(lambda n: n not in (0, 1, 2)) | st.booleans() | st.floats(),
    "_retries": st.none() | st.integers(max_value=-1) | st.floats() | st.booleans() | texts,
    "_retry_delay": st.none()
    | st.floats(max_value=0, exclude_max=True)
    | st.booleans()
    | texts
    | st.just(float("nan")),
    "_depends_on": texts
    | st.binary()
    | st.booleans()
    | st.floats()
    | st.lists(st.none() | texts | st.booleans(), min_size=1),
    "_depends_on_errors": st.none() | st.booleans() | st.sampled_from(["", "Abort", "abort ", "stop"]),
    "_os_env_vars": st.none() | st.integers() | texts | st.binary() | st.dictionaries(texts, st.integers(), min_size=1),
    "_type": texts | st.integers() | st.none() | st.lists(texts),
    "_callback": st.integers() | texts.filter(bool) | st.lists(st.integers(), min_size=1),
    "_callback_on_error": st.integers() | texts.filter(bool) | st.lists(st.integers(), min_size=1),
}
OWN = {"mine": 1, "_mine": 2, "label": 3, "__label": 4}


@given(st.data(), st.sets(st.sampled_from(sorted(GOOD))))
def test_good_options_are_taken_and_the_rest_left(data: st.DataObject, names: set[str]) -> None:
    values = {name: data.draw(GOOD[name][1], name) for name in names}
    kwargs = {**values, **OWN}
    options, callbacks = split_options(kwargs, accept=CALL_OPTIONS)
    assert kwargs == OWN
    assert callbacks == {}
    for name, (attribute, _, expected) in GOOD.items():
        found = getattr(options, attribute)
        if name in names:
            found = list(found) if name == "_depends_on" else found
            assert found == expected(values[name]), name
        else:
            assert found == getattr(DEFAULT_OPTIONS, attribute), name


@given(st.data(), st.sampled_from(sorted(BAD)), st.sets(st.sampled_from(sorted(GOOD)), max_size=3))
def test_bad_options_are_refused_by_name_and_value(data: st.DataObject, bad: str, others: set[str]) -> None:
    kwargs = {name: data.draw(GOOD[name][1]) for name in others - {bad}}
    value = data.draw(BAD[bad])
    with pytest.raises((TypeError, ValueError, CloudException)) as caught:
        split_options({**kwargs, bad: value}, accept=CALL_OPTIONS)
    text = str(caught.value)
    if bad.startswith("_callback"):
        assert text == "All callbacks must be callable"
    else:
        assert text.startswith("_job_label" if bad == "_label" else bad)
        assert repr(value) in text or "not set here" in text


def test_without_options_all_jobs_share_the_defaults() -> None:
    assert split_options({"x": 1}, accept=CALL_OPTIONS) == (DEFAULT_OPTIONS, {})
    assert DEFAULT_OPTIONS.as_dict() == {}


def test_calls_with_the_same_options_share_them() -> None:
    def made(**kwargs: Any) -> JobOptions:
        return split_options(kwargs, accept=CALL_OPTIONS)[0]

    after = [3, 4]
    first = made(_label="a", _depends_on=after)
    assert made(_depends_on=[3, 4], _label="a") is first
    after.append(5)
    assert made(_label="a", _depends_on=after).depends_on == [3, 4, 5]
    assert first.depends_on == [3, 4]
    assert made(_label="b") is not made(_label="a")
    assert made(_priority=5, _label=None, _callback=print) is DEFAULT_OPTIONS
    with pytest.raises(TypeError, match="_priority"):
        made(_priority=5.0)


@pytest.mark.parametrize("name", sorted(CALL_OPTIONS - CRON_OPTIONS))
def test_a_reserved_name_that_a_verb_does_not_take_is_refused(name: str) -> None:
    kwargs = {name: print}
    with pytest.raises(TypeError, match=f"^{name} cannot be used here; remove it$"):
        split_options(kwargs, accept=CRON_OPTIONS)


def test_callbacks_are_taken_in_every_form() -> None:
    class Callable:
        def __call__(self) -> None: ...

        def __iter__(self) -> Any:
            raise AssertionError("a callable is one callback")

    one = Callable()
    for value, expected in (
        (None, []),
        (print, [print]),
        ([print, len], [print, len]),
        (iter((len,)), [len]),
        (one, [one]),
    ):
        _, callbacks = split_options({"_callback": value}, accept=CALL_OPTIONS)
        assert callbacks == {"_callback": expected}


def test_options_are_not_the_users_own_objects() -> None:
    variables, before = {"A": "1"}, [1]
    options, _ = split_options({"_os_env_vars": variables, "_depends_on": before}, accept=CALL_OPTIONS)
    same, _ = split_options({"_os_env_vars": {"A": "1"}, "_depends_on": [1]}, accept=CALL_OPTIONS)
    variables["A"] = "2"
    before.append(2)
    assert same is options
    assert (options.env_vars, options.depends_on) == ({"A": "1"}, [1])


@given(st.data(), st.sets(st.sampled_from(sorted(GOOD))))
def test_options_travel_as_json(data: st.DataObject, names: set[str]) -> None:
    options, _ = split_options({name: data.draw(GOOD[name][1]) for name in names}, accept=CALL_OPTIONS)
    back = JobOptions.from_dict(json.loads(json.dumps(options.as_dict())))
    for name in JobOptions.__slots__:
        ours, theirs = getattr(options, name), getattr(back, name)
        assert list(theirs) == list(ours) if name == "depends_on" else theirs == ours
    assert back.as_dict() == options.as_dict()


def test_unknown_options_do_not_travel() -> None:
    with pytest.raises(TypeError, match="unknown job option 'colour'"):
        JobOptions.from_dict({"label": "a", "colour": "red"})


# --- jids -------------------------------------------------------------------------------------------------------------

ranges = st.builds(range, st.integers(0, 50), st.integers(0, 50), st.sampled_from([1, 1, 2, -1]))
mixtures = st.lists(st.integers(0, 2**63) | ranges | st.integers(0, 100).map(np.int64))


@given(
    mixtures, st.sampled_from([list, tuple, iter, lambda items: dict.fromkeys(items), lambda items: (x for x in items)])
)
def test_mixtures_of_jids_and_ranges_are_flattened(items: list[Any], form: Callable[[Any], Any]) -> None:
    jids = form(items)
    ordered = list(jids) if isinstance(jids, dict) else items
    expected = [int(jid) for each in ordered for jid in (each if isinstance(each, range) else [each])]
    found = jid_list(jids, "verb")
    assert list(found) == expected
    assert all(type(jid) is int for jid in found)


def test_a_range_stays_one_and_a_jid_becomes_a_sequence() -> None:
    for jids in (range(5), range(9, 2, -3), range(0)):
        assert jid_list(jids, "verb") is jids
    for one in (5, np.int8(5), np.uint64(5)):
        assert list(jid_list(one, "verb")) == [5]


not_jids = (
    texts | st.binary() | st.booleans() | st.floats() | st.none() | st.just(bytearray(b"\1")) | st.complex_numbers()
)


@given(not_jids, st.lists(st.integers(0, 9), max_size=3))
def test_nothing_else_is_a_jid(wrong: Any, around: list[int]) -> None:
    for form in (wrong, [wrong], [*around, wrong, *around]):
        with pytest.raises(TypeError, match=r"^cloud\.verb requires numeric jid\(s\)"):
            jid_list(form, "cloud.verb")


# --- outcomes ---------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(FINAL),
    st.dictionaries(st.integers(1, 9), st.binary(max_size=50)),
    st.integers(0, 2**32 - 1),
    st.floats(0, 1e10),
    st.floats(0, 1e6, width=32),
    st.integers(0, 2**32 - 1),
)
def test_an_outcome_keeps_what_was_packed(
    status: int, sections: dict[int, bytes], pid: int, started: float, seconds: float, rss_kb: int
) -> None:
    raw = pack_outcome(
        status,
        list(sections.items()),
        pid=pid,
        started=started,
        runtime_s=started,
        cpu_user_s=seconds,
        cpu_system_s=seconds,
        max_rss_kb=rss_kb,
    )
    outcome = Outcome(raw)
    assert (outcome.status, outcome.pid, outcome.started, outcome.runtime_s) == (status, pid, started, started)
    assert outcome.usage == (seconds, seconds, rss_kb * 1024)
    assert {tag: outcome.section(tag) for tag in range(1, 10)} == {tag: sections.get(tag) for tag in range(1, 10)}


@given(st.binary(max_size=100))
def test_the_short_way_packs_the_same(value: bytes) -> None:
    short = pack_value(VALUE, value, 7, 1.5, 2.5, 0.5, 0.25, 9)
    long = pack_outcome(
        DONE, [(VALUE, value)], pid=7, started=1.5, runtime_s=2.5, cpu_user_s=0.5, cpu_system_s=0.25, max_rss_kb=9
    )
    assert short == long
    assert unpack_value(short) == (VALUE, value)


def test_only_an_outcome_that_begins_with_its_value_is_unpacked_the_short_way() -> None:
    assert unpack_value(pack_outcome(DONE)) is None
    assert unpack_value(pack_outcome(DONE, [(VALUE, b"x"), (STDOUT, b"y")])) == (VALUE, b"x")
    assert unpack_value(pack_outcome(DONE, [(STDOUT, b"y"), (VALUE, b"x")])) is None


def test_text_that_is_no_text_is_shown_as_far_as_it_goes() -> None:
    outcome = Outcome(pack_outcome(DONE, [(ERROR_TEXT, b"a\xffb")]))
    assert outcome.text(ERROR_TEXT) == "a\ufffdb"
    assert outcome.text(VALUE) is None


def test_an_outcome_can_do_without_its_value() -> None:
    times = {"pid": 7, "started": 5.0, "runtime_s": 0.25, "cpu_user_s": 0.125, "cpu_system_s": 0.5, "max_rss_kb": 12}
    for value in VALUES:
        whole = pack_outcome(DONE, [(STDOUT, b"out"), (value, b"x" * 1000), (TIMES, b"times")], **times)
        assert without_value(whole) == pack_outcome(DONE, [(STDOUT, b"out"), (TIMES, b"times")], **times)
    failed = pack_outcome(KILLED, [(ERROR_TEXT, b"text")], **times)
    assert without_value(failed) == failed
