"""`cloud.resources.schedule`: the grammar, and the slots against a minute-by-minute oracle."""

from __future__ import annotations

import pickle
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cloud.errors import CloudException, InvalidSchedule
from cloud.resources.schedule import Schedule, preview

MINUTE = timedelta(minutes=1)
BERLIN = "Europe/Berlin"
NEW_YORK = "America/New_York"


def utc(*fields: int) -> datetime:
    return datetime(*fields, tzinfo=UTC)  # type: ignore[misc,arg-type]


def slots(spec: str, tz: str, start: datetime, end: datetime) -> list[datetime]:
    return list(Schedule(spec, tz).between(start, end))


class TestGrammar:
    @pytest.mark.parametrize(
        ("spec", "same"),
        [
            ("5/15 * * * *", "5,20,35,50 * * * *"),
            ("0 1/6 * * *", "0 1,7,13,19 * * *"),
            ("0 0 */10 * *", "0 0 1,11,21,31 * ?"),
            ("0 0 1 feb/3 ?", "0 0 1 2,5,8,11 *"),
            ("0 0 1 JAN-Mar,dec *", "0 0 1 1,2,3,12 *"),
            ("0 0 ? * mon-fri", "0 0 * * 1-5"),
            ("0 0 * * sat-sun", "0 0 * * 0,6"),
            ("0 0 * * fri-0", "0 0 * * 5-7"),
            ("0 0 * * 7-2", "0 0 * * sun,mon,tue"),
            ("0 0 * * 0-7", "0 0 * * *"),
            ("0 0 * * 7", "0 0 * * 0"),
            ("0 0 * * 7/3", "0 0 * * 0,3,6"),
            ("0 0 * * wed,7,sat", "0 0 * * 0,3,6"),
            ("10-40/10,3 */12 * * *", "3,10,20,30,40 0,12 * * *"),
            ("00 09 01 01 *", "0 9 1 1 *"),
        ],
    )
    def test_equal_meanings(self, spec: str, same: str) -> None:
        start = utc(2024, 1, 1)
        end = start + timedelta(days=90)
        assert slots(spec, "UTC", start, end) == slots(same, "UTC", start, end) != []

    @pytest.mark.parametrize("spec", [("0", "9", "*", "*", "mon"), [0, 9, "*", "*", 1], "  0\t9 * *   mon "])
    def test_sequence_and_blanks(self, spec: object) -> None:
        schedule = Schedule(spec)  # type: ignore[arg-type]
        assert schedule.text.startswith("0 9 * * ")
        assert schedule.next(utc(2024, 7, 3)) == utc(2024, 7, 8, 9)

    def test_text_is_kept_as_given(self) -> None:
        schedule = Schedule("0  9 ? JAN mon", tz=BERLIN)
        assert str(schedule) == schedule.text == "0 9 ? JAN mon"
        assert repr(schedule) == "Schedule('0 9 ? JAN mon', tz='Europe/Berlin')"
        assert schedule == pickle.loads(pickle.dumps(schedule))
        assert len({schedule, Schedule("0 9 ? JAN mon", BERLIN), Schedule("0 9 ? JAN mon")}) == 2

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("99 * * * *", "Invalid min 99"),
            ("60 * * * *", "Invalid min 60"),
            ("* 24 * * *", "Invalid hour 24"),
            ("* * 0 * *", "Invalid day 0"),
            ("* * 32 * *", "Invalid day 32"),
            ("* * * 13 *", "Invalid mon 13"),
            ("* * * 0 *", "Invalid mon 0"),
            ("* * * * 8", "Invalid dow 8"),
            ("* * * foo *", "Invalid mon foo"),
            ("* * * mon *", "Invalid mon mon"),
            ("* * * * monday", "Invalid dow monday"),
            ("1,99 * * * *", "Invalid min 99"),
            ("-1 * * * *", "Invalid min -1"),
            ("5- * * * *", "Invalid min 5-"),
            ("1,,2 * * * *", "Invalid min "),
            ("*/0 * * * *", "Invalid min */0"),
            ("*/90 * * * *", "Invalid min */90"),
            ("1/2/3 * * * *", "Invalid min 1/2/3"),
            ("1-2-3 * * * *", "Invalid min 1-2-3"),
            ("* 22-2 * * *", "Invalid hour 22-2"),
            ("* * * * fri-tue", "Invalid dow fri-tue"),
            ("* * L * *", "Invalid day L"),
            ("* * 15W * *", "Invalid day 15W"),
            ("* * * * 5#2", "Invalid dow 5#2"),
            ("H * * * *", "Invalid min H"),
            ("?/2 * * * *", "Invalid min ?/2"),
            ("٣ * * * *", "Invalid min ٣"),
            ("1.5 * * * *", "Invalid min 1.5"),
        ],
    )
    def test_bad_field(self, spec: str, message: str) -> None:
        with pytest.raises(InvalidSchedule) as caught:
            Schedule(spec)
        assert caught.value.parameter == message
        assert caught.value.hint
        assert isinstance(caught.value, ValueError)

    @pytest.mark.parametrize(
        ("spec", "hint"),
        [
            ("@daily", "write 0 0 * * *"),
            ("* * * *", "4 fields"),
            ("0 * * * * *", "no seconds"),
            ("0 0 1 1 * 2030", "no years"),
            ("", "0 fields"),
            (["*"] * 6, "6 fields"),
            (["* *", "*", "*", "*", "*"], "one field"),
            (["", "*", "*", "*", "*"], "one field"),
            ([True, "*", "*", "*", "*"], "one field"),
            (b"* * * * *", "not bytes"),
            (5, "not int"),
            (None, "not NoneType"),
        ],
    )
    def test_not_five_fields(self, spec: object, hint: str) -> None:
        with pytest.raises(InvalidSchedule) as caught:
            Schedule(spec)  # type: ignore[arg-type]
        assert caught.value.parameter == "Invalid cron string. Format: min hour day mon dow"
        assert hint in (caught.value.hint or "")

    @pytest.mark.parametrize("spec", ["0 0 30 2 *", "0 0 31 feb,4,6,9,nov ?", "0 0 30-31 2 */2"])
    def test_days_that_never_come_are_refused(self, spec: str) -> None:
        with pytest.raises(InvalidSchedule, match="never fires"):
            Schedule(spec)

    def test_an_impossible_day_of_month_beside_a_day_of_week_is_possible(self) -> None:
        assert Schedule("0 0 30 2 mon").next(utc(2024, 3, 1)) == utc(2025, 2, 3)

    @pytest.mark.parametrize("tz", ["Mars/Olympus", "../etc/passwd", "/etc/passwd", "", "Europe", "a\0b", None, 1])
    def test_unknown_zone(self, tz: object) -> None:
        with pytest.raises(InvalidSchedule, match="Invalid tz") as caught:
            Schedule("* * * * *", tz=tz)  # type: ignore[arg-type]
        assert "Europe/Berlin" in (caught.value.hint or "")

    @given(st.text(alphabet="0123456789*/,-? abjmonfrisuLW#@H\u0663\n", max_size=30))
    def test_any_text_is_a_schedule_or_an_error_of_ours(self, text: str) -> None:
        try:
            schedule = Schedule(text)
        except InvalidSchedule:
            return
        assert schedule.next(utc(2024, 1, 1)) > utc(2024, 1, 1)


class TestSlots:
    def test_strictly_after_and_before(self) -> None:
        hourly = Schedule("0 * * * *")
        noon = utc(2024, 7, 1, 12)
        assert hourly.next(noon) == noon + timedelta(hours=1)
        assert hourly.next(noon - timedelta.resolution) == noon
        assert hourly.previous(noon) == noon - timedelta(hours=1)
        assert hourly.previous(noon + timedelta.resolution) == noon

    def test_any_aware_datetime_goes_in_and_utc_comes_out(self) -> None:
        slot = Schedule("30 12 * * *", "Asia/Kathmandu").next(datetime(2024, 7, 1, tzinfo=ZoneInfo(NEW_YORK)))
        assert slot == utc(2024, 7, 1, 6, 45)
        assert slot.tzinfo is UTC

    def test_naive_datetimes_are_refused(self) -> None:
        schedule = Schedule("* * * * *")
        naive = datetime(2024, 7, 1)
        for call in (schedule.next, schedule.previous, lambda at: list(schedule.between(at, utc(2025, 1, 1)))):
            with pytest.raises(ValueError, match="naive"):
                call(naive)

    def test_between_is_half_open_and_lazy(self) -> None:
        schedule = Schedule("0 0 * * *")
        first, second = utc(2024, 7, 1), utc(2024, 7, 2)
        assert list(schedule.between(first, second)) == [first]
        assert list(schedule.between(second, first)) == list(schedule.between(first, first)) == []
        assert next(schedule.between(first, utc(9000, 1, 1))) == first

    def test_leap_days(self) -> None:
        leap = Schedule("0 0 29 2 *")
        assert leap.next(utc(2096, 3, 1)) == utc(2104, 2, 29)
        assert leap.previous(utc(2104, 2, 29)) == utc(2096, 2, 29)

    def test_the_end_of_the_calendar_is_an_error(self) -> None:
        with pytest.raises(InvalidSchedule, match="no slot after"):
            Schedule("0 0 1 1 *").next(utc(9999, 6, 1))
        with pytest.raises(InvalidSchedule, match="no slot before"):
            Schedule("0 0 1 1 *").previous(utc(1, 1, 1))

    @pytest.mark.parametrize(
        ("days", "july"),
        [
            ("1,15 * mon", [1, 8, 15, 22, 29]),  # either
            ("13 * fri", [5, 12, 13, 19, 26]),  # either
            ("1-31 * mon", list(range(1, 32))),  # a full range is a restriction too
            ("*/2 * mon", [1, 15, 29]),  # begins with *: both
            ("1-7 * */6", [6, 7]),  # begins with *: both
            ("? * mon", [1, 8, 15, 22, 29]),
            ("15 * ?", [15]),
        ],
    )
    def test_day_of_month_and_day_of_week(self, days: str, july: list[int]) -> None:
        found = slots(f"0 0 {days}", "UTC", utc(2024, 7, 1), utc(2024, 8, 1))
        assert [slot.day for slot in found] == july


class TestClockChanges:
    """Berlin: 31 March 2024 02:00 -> 03:00 (01:00 UTC), 27 October 03:00 -> 02:00 (01:00 UTC)."""

    @pytest.mark.parametrize(
        ("spec", "hours"),
        [
            ("30 2 * * *", [(1, 30)]),  # skipped: an hour later, 03:30
            ("30 2,3 * * *", [(1, 30)]),  # with the slot of 03:30: one
            ("0 3 * * *", [(1, 0)]),
            ("30 * * * *", [(0, 30), (1, 30), (2, 30)]),
            ("*/30 1-3 * * *", [(0, 0), (0, 30), (1, 0), (1, 30)]),
        ],
    )
    def test_berlin_spring(self, spec: str, hours: list[tuple[int, int]]) -> None:
        found = slots(spec, BERLIN, utc(2024, 3, 31), utc(2024, 3, 31, 3))
        assert found == [utc(2024, 3, 31, *at) for at in hours]

    @pytest.mark.parametrize(
        ("spec", "hours"),
        [
            ("30 2 * * *", [(0, 30)]),  # repeated: the first time
            ("0 3 * * *", [(2, 0)]),
            ("30 2,3 * * *", [(0, 30), (2, 30)]),
            ("30 * * * *", [(0, 30), (1, 30), (2, 30)]),  # every hour: elapsed time
            ("30 0-23 * * *", [(0, 30), (1, 30), (2, 30)]),
        ],
    )
    def test_berlin_autumn(self, spec: str, hours: list[tuple[int, int]]) -> None:
        found = slots(spec, BERLIN, utc(2024, 10, 27), utc(2024, 10, 27, 3))
        assert found == [utc(2024, 10, 27, *at) for at in hours]

    def test_new_york(self) -> None:
        nightly = Schedule("30 2 * * *", NEW_YORK)
        assert nightly.next(utc(2024, 3, 10)) == utc(2024, 3, 10, 7, 30)  # 03:30 EDT
        assert nightly.next(utc(2024, 3, 10, 7, 30)) == utc(2024, 3, 11, 6, 30)
        late = Schedule("30 1 * * *", NEW_YORK)
        assert late.next(utc(2024, 11, 3)) == utc(2024, 11, 3, 5, 30)  # 01:30 EDT, not EST
        assert late.next(utc(2024, 11, 3, 5, 30)) == utc(2024, 11, 4, 6, 30)

    @pytest.mark.parametrize("tz", [BERLIN, NEW_YORK, "Australia/Lord_Howe", "Africa/Casablanca"])
    def test_a_daily_slot_fires_once_a_day_all_year(self, tz: str) -> None:
        start = datetime(2024, 1, 1, tzinfo=ZoneInfo(tz))
        end = datetime(2025, 1, 1, tzinfo=ZoneInfo(tz))
        days = [slot.astimezone(ZoneInfo(tz)).date() for slot in Schedule("15 2 * * *", tz).between(start, end)]
        assert len(days) == 366
        assert len(set(days)) == 366

    @pytest.mark.parametrize("day", [(2024, 3, 31), (2024, 10, 27)])
    def test_every_quarter_of_an_hour_never_pauses(self, day: tuple[int, int, int]) -> None:
        start = utc(*day) - timedelta(hours=12)
        found = slots("*/15 * * * *", BERLIN, start, start + timedelta(days=2))
        assert {later - earlier for earlier, later in pairwise(found)} == {timedelta(minutes=15)}


@cache
def clock(tz: str, middle: datetime) -> list[tuple[datetime, datetime]]:
    """Every minute around a moment: the instant, and what a clock on the wall shows then."""
    start = middle - timedelta(hours=64)
    instants = [start + MINUTE * n for n in range(128 * 60)]
    return [(instant, instant.astimezone(ZoneInfo(tz)).replace(tzinfo=None, fold=0)) for instant in instants]


def oracle(sets: list[set[int]], stars: tuple[bool, bool], minutes: list[tuple[datetime, datetime]]) -> set[datetime]:
    """The rules of the module once more, by looking at every minute; no croniter, no fold."""

    def matches(wall: datetime) -> bool:
        if wall.minute not in sets[0] or wall.hour not in sets[1] or wall.month not in sets[3]:
            return False
        day, weekday = wall.day in sets[2], (wall.weekday() + 1) % 7 in sets[4]
        return (day and weekday) if any(stars) else (day or weekday)

    found: set[datetime] = set()
    shown: set[datetime] = set()
    for (instant, wall), (_, later) in pairwise(minutes):
        if matches(wall) and (wall not in shown or len(sets[1]) == 24):
            found.add(instant)
        shown.add(wall)
        # The minutes a change skips, each as late as if the clock had not been moved.
        for n in range(1, (later - wall) // MINUTE):
            if matches(wall + n * MINUTE):
                found.add(instant + n * MINUTE)
    return found


@st.composite
def fields(draw: st.DrawFn, low: int, high: int) -> tuple[str, set[int]]:
    every = range(low, high + 1)
    if draw(st.booleans()):
        return "*", set(every)
    items, numbers = [], set[int]()
    for n_item in range(draw(st.integers(1, 3))):
        first = draw(st.sampled_from(every))
        last = draw(st.integers(first, high))
        step = draw(st.integers(1, high))
        form = draw(st.sampled_from(["n", "a-b", "a-b/s", "n/s", "*/s"] if n_item == 0 else ["n", "a-b", "a-b/s"]))
        text, meant = {
            "n": (f"{first}", [first]),
            "a-b": (f"{first}-{last}", range(first, last + 1)),
            "a-b/s": (f"{first}-{last}/{step}", range(first, last + 1, step)),
            "n/s": (f"{first}/{step}", range(first, high + 1, step)),
            "*/s": (f"*/{step}", range(low, high + 1, step)),
        }[form]
        items.append(text)
        numbers.update(meant)
    return ",".join(items), numbers


@st.composite
def specs(draw: st.DrawFn) -> tuple[str, list[set[int]], tuple[bool, bool]]:
    drawn = [draw(fields(low, high)) for low, high in ((0, 59), (0, 23), (1, 31), (1, 12), (0, 6))]
    texts = [text for text, _ in drawn]
    return " ".join(texts), [numbers for _, numbers in drawn], (texts[2][0] == "*", texts[4][0] == "*")


CHANGES = [
    ("UTC", utc(2024, 2, 29)),
    (BERLIN, utc(2024, 3, 31, 1)),
    (BERLIN, utc(2024, 10, 27, 1)),
    (NEW_YORK, utc(2024, 3, 10, 7)),
    (NEW_YORK, utc(2024, 11, 3, 6)),
    ("Australia/Lord_Howe", utc(2024, 4, 6, 15)),
    ("Australia/Lord_Howe", utc(2024, 10, 5, 15, 30)),
    ("America/Sao_Paulo", utc(2018, 11, 4, 3)),
    ("Africa/Casablanca", utc(2024, 3, 10, 2)),
    ("Pacific/Apia", utc(2011, 12, 30, 10)),
    ("Asia/Kathmandu", utc(2024, 1, 1)),
]
HOURLY = ("30 * * * *", [{30}, set(range(24)), set(range(1, 32)), set(range(1, 13)), set(range(7))], (True, True))


@settings(max_examples=100)
@given(specs(), st.sampled_from(CHANGES), st.lists(st.integers(-30 * 3600, 30 * 3600), min_size=1, max_size=5))
@example(HOURLY, CHANGES[2], [0])
@example(HOURLY, CHANGES[9], [0])
def test_slots_equal_the_oracles(
    spec: tuple[str, list[set[int]], tuple[bool, bool]], change: tuple[str, datetime], seconds: list[int]
) -> None:
    text, sets, stars = spec
    tz, middle = change
    try:
        schedule = Schedule(text, tz)
    except InvalidSchedule as exc:
        # Only the impossible is refused, and only where both fields must match.
        assert "never fires" in str(exc)
        assert any(stars)
        assert min(sets[2]) > 30 or (min(sets[2]) > 29 and sets[3] == {2})
        return
    start, end = middle - timedelta(hours=30), middle + timedelta(hours=30)
    expected = sorted(slot for slot in oracle(sets, stars, clock(tz, middle)) if start <= slot < end)
    assert list(schedule.between(start, end)) == expected
    for instant in (middle + timedelta(seconds=n) for n in seconds):
        later = [slot for slot in expected if slot > instant]
        earlier = [slot for slot in expected if slot < instant]
        assert schedule.next(instant) == later[0] if later else schedule.next(instant) >= end
        assert schedule.previous(instant) == earlier[-1] if earlier else schedule.previous(instant) < start


@given(
    specs(),
    st.sampled_from(CHANGES),
    st.integers(-(10**7), 10**7).map(lambda seconds: timedelta(seconds=seconds)),
)
@settings(max_examples=100)
def test_next_and_previous_are_inverse(
    spec: tuple[str, list[set[int]], tuple[bool, bool]], change: tuple[str, datetime], away: timedelta
) -> None:
    tz, middle = change
    try:
        schedule = Schedule(spec[0], tz)
    except InvalidSchedule:
        return
    slot = schedule.next(middle + away)
    assert schedule.previous(schedule.next(slot)) == slot
    assert schedule.next(schedule.previous(slot)) == slot


class TestPreview:
    def test_the_next_slots(self) -> None:
        found = preview("0 9 * * mon", n=3, tz=BERLIN, after=utc(2024, 10, 20))
        assert found == [utc(2024, 10, 21, 7), utc(2024, 10, 28, 8), utc(2024, 11, 4, 8)]

    def test_defaults(self) -> None:
        before = datetime.now(UTC)
        found = preview("* * * * *")
        assert len(found) == 5
        assert before < found[0] <= before + 2 * MINUTE
        assert preview("* * * * *", n=0) == []

    @pytest.mark.parametrize(("n", "error"), [(-1, ValueError), ("5", TypeError), (True, TypeError), (2.0, TypeError)])
    def test_bad_n(self, n: object, error: type[Exception]) -> None:
        with pytest.raises(error, match="n must be"):
            preview("* * * * *", n=n)  # type: ignore[arg-type]

    def test_bad_schedule(self) -> None:
        with pytest.raises(CloudException, match="Invalid min 99"):
            preview("99 * * * *")


def test_croniter_is_loaded_only_to_compute() -> None:
    code = (
        "import sys; from cloud.resources.schedule import Schedule; s = Schedule('* * * * *')\n"
        "assert 'croniter' not in sys.modules\n"
        "import datetime; s.next(datetime.datetime.now(datetime.timezone.utc)); assert 'croniter' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
