"""When a cron entry is due: five fields of text and a time zone become instants.

Owns the grammar, the rule for days and the behaviour at clock changes. Knows nothing of entries, jobs or storage.
croniter enumerates wall-clock times and is used nowhere else; what reaches it was checked and rewritten to plain
lists of numbers first, so its own extensions (seconds, years, ``L``, ``#``, ``@daily``, ``H``) stay out of reach.

**Days.** As in BSD cron: when day of month and day of week are both restricted, a day matches if *either* does. A
field that begins with ``*`` or ``?`` counts as unrestricted, even with a step; then both must match.

**Clock changes** (where the zone has them). A wall-clock time that a change skips fires once, as much later as the
clock was moved: 02:30 becomes 03:30, and coincides with the slot of 03:30 if there is one. A wall-clock time that
a change repeats fires once, the first time; except that a schedule for every hour of the day means elapsed time,
so ``*/15 * * * *`` goes on every fifteen minutes through the repeated hour.

Source: crontab(5) of BSD; PiCloud client 2.1.1-2.8.5, ``cloud.cron.register`` (``N/S``, error texts).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import islice
from typing import NamedTuple

from cloud.errors import InvalidSchedule

__all__ = ["Schedule", "preview"]

_MINUTE = timedelta(minutes=1)
# Longer than the largest change of any clock (a day, where the date line moved), so that the offsets at this
# distance on both sides are those before and after a change nearby.
_NEAR = timedelta(hours=36)

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_LONGEST_MONTH = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_FORMAT = "Invalid cron string. Format: min hour day mon dow"
_WORD = "[0-9]{1,2}|[a-z]{3}"
_ITEM = re.compile(rf"(?:(?P<star>\*)|(?P<first>{_WORD})(?:-(?P<last>{_WORD}))?)(?:/(?P<step>[0-9]{{1,2}}))?")


class _Field(NamedTuple):
    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()

    def parse(self, text: str) -> frozenset[int]:
        """Expand a field's text to the set of numbers it means."""
        if text == "?":
            text = "*"
        numbers = frozenset(number for item in text.split(",") for number in self._item(item))
        return frozenset(day % len(_DAYS) for day in numbers) if self.names is _DAYS else numbers

    def all(self) -> frozenset[int]:
        """Return every number of the field, what ``*`` means."""
        return frozenset(range(self.low, self.high + 1))

    def _item(self, item: str) -> range:
        match = _ITEM.fullmatch(item.lower())
        if match is None:
            raise self._invalid(item)
        step = 1 if match["step"] is None else int(match["step"])
        if not 1 <= step <= self.high:
            raise self._invalid(item, f"a step is 1-{self.high}, and counting begins anew when the field does")
        if match["star"]:
            return range(self.low, self.high + 1, step)
        first = self._number(match["first"], item)
        if match["last"] is not None:
            return self._range(first, self._number(match["last"], item), step, item)
        if match["step"] is None:
            return range(first, first + 1)
        return range(first if first <= self.high else self.low, self.high + 1, step)

    def _range(self, first: int, last: int, step: int, item: str) -> range:
        # Sunday, 0 or 7, begins the week in sun-tue and 7-2, and ends it in fri-sun, 5-0 and 0-7.
        if first > last and self.names is _DAYS:
            first, last = (self.low, last) if first > self.high else (first, last or self.high + 1)
        if first > last:
            raise self._invalid(item, "a range goes upwards; write two, separated by a comma")
        return range(first, last + 1, step)

    def _number(self, word: str, item: str) -> int:
        if word in self.names:
            return self.names.index(word) + self.low
        if not word.isdecimal():
            raise self._invalid(item)
        number = int(word)
        sunday = number == len(_DAYS) and self.names is _DAYS
        if not (self.low <= number <= self.high or sunday):
            raise self._invalid(item)
        return number

    def _invalid(self, item: str, remedy: str = "") -> InvalidSchedule:
        words = f", {self.names[0]}-{self.names[-1]}" if self.names else ""
        allowed = (
            f"{self.name} takes {self.low}-{self.high}{words}, *, lists (1,2), ranges (1-2), steps (*/2, 1-4/2, 1/2)"
        )
        return InvalidSchedule(f"Invalid {self.name} {item}", hint=remedy or allowed)


_FIELDS = (
    _Field("min", 0, 59),
    _Field("hour", 0, 23),
    _Field("day", 1, 31),
    _Field("mon", 1, 12, _MONTHS),
    _Field("dow", 0, 6, _DAYS),
)
_HOUR, _DAY, _MON, _DOW = 1, 2, 3, 4


class Schedule:
    """The instants at which a cron entry is due. Thread-safe; equal when text and zone are.

    Args:
        spec: ``"min hour day mon dow"``, or a sequence of these five (``str`` or ``int``).
        tz: Name of the zone whose wall clock the fields mean, as ``zoneinfo`` knows it.

    Attributes:
        text: The five fields as given, separated by one space.
        tz: As given.

    Raises:
        InvalidSchedule: Not five valid fields, no such zone, or no day that ever matches (30 February).

    Example:
        >>> Schedule("0 9 * * mon-fri", tz="Europe/Berlin").next(datetime(2024, 7, 5, 12, tzinfo=UTC))
        datetime.datetime(2024, 7, 8, 7, 0, tzinfo=datetime.timezone.utc)
    """

    __slots__ = ("_day_or", "_every_hour", "_expression", "_zone", "text", "tz")

    text: str
    tz: str

    def __init__(self, spec: str | Sequence[str | int], tz: str = "UTC") -> None:
        words = _words(spec)
        self.text = " ".join(words)
        self.tz = tz
        self._zone = _zone(tz)
        sets = [field.parse(word) for field, word in zip(_FIELDS, words, strict=True)]
        everything = [field.all() for field in _FIELDS]
        self._every_hour = sets[_HOUR] == everything[_HOUR]
        self._day_or = not any(words[field].startswith(("*", "?")) for field in (_DAY, _DOW))
        if self._day_or and (sets[_DAY] == everything[_DAY] or sets[_DOW] == everything[_DOW]):
            # To croniter a full set is "*", which restricts nothing and would leave only the other field to match.
            sets[_DAY], sets[_DOW] = everything[_DAY], everything[_DOW]
        if not self._day_or and min(sets[_DAY]) > max(_LONGEST_MONTH[month - 1] for month in sets[_MON]):
            raise InvalidSchedule(f"Schedule {self.text!r} never fires", hint="no month of field mon has that day")
        self._expression = " ".join(
            "*" if numbers == every else ",".join(map(str, sorted(numbers)))
            for numbers, every in zip(sets, everything, strict=True)
        )

    def next(self, after: datetime) -> datetime:
        """Return the first slot strictly later than an instant, in UTC.

        Args:
            after: Any aware datetime.

        Raises:
            ValueError: ``after`` is naive.
            InvalidSchedule: The calendar ends (year 9999) before the next slot.
        """
        return next(self._slots(_aware(after), forward=True))

    def previous(self, before: datetime) -> datetime:
        """Return the last slot strictly earlier than an instant, in UTC. Arguments and errors as `next`."""
        return next(self._slots(_aware(before), forward=False))

    def between(self, start: datetime, end: datetime) -> Iterator[datetime]:
        """Yield, lazily and in order, every slot with ``start <= slot < end``, in UTC. None if ``end <= start``."""
        start, end = _aware(start), _aware(end)
        if end <= start:
            return
        for slot in self._slots(start - datetime.resolution, forward=True):
            if slot >= end:
                return
            yield slot

    def _slots(self, instant: datetime, *, forward: bool) -> Iterator[datetime]:
        # Walks the wall clock and maps its times to instants. Near a change of the offset the two orders differ
        # (skipped times land behind later ones, repeated times lie in two places) by at most the spread of the
        # offsets around: the walk begins that much early, and an instant is given out that much late.
        nearest = min if forward else max
        found: set[datetime] = set()
        try:
            for wall in self._walls(instant, forward=forward):
                found.update(slot for slot in self._instants(wall) if (instant < slot if forward else slot < instant))
                while found:
                    slot = nearest(found)
                    passed = wall - self._wall(slot)
                    if (passed if forward else -passed) < self._spread(slot):
                        break
                    found.remove(slot)
                    yield slot
        except (ValueError, OverflowError) as exc:
            side = "after" if forward else "before"
            raise InvalidSchedule(f"Schedule {self.text!r} has no slot {side} {instant}") from exc

    def _walls(self, instant: datetime, *, forward: bool) -> Iterator[datetime]:
        # Imported here: 18 ms that `import cloud` must not cost.
        from croniter import croniter

        wall, spread = self._wall(instant), self._spread(instant)
        start = wall.replace(second=0, microsecond=0)
        if forward:
            start -= spread
        else:
            start += spread + (_MINUTE if start < wall else timedelta(0))
        walk = croniter(self._expression, start, ret_type=datetime, day_or=self._day_or)
        while True:
            yield walk.get_next() if forward else walk.get_prev()

    def _instants(self, wall: datetime) -> tuple[datetime, ...]:
        # PEP 495: fold=0 reads a skipped time with the offset before the change, which moves it behind the gap,
        # and means the first of two equal times; fold=1 is later only where a time is repeated.
        first = wall.replace(tzinfo=self._zone).astimezone(UTC)
        if self._every_hour:
            second = wall.replace(tzinfo=self._zone, fold=1).astimezone(UTC)
            if second > first:
                return first, second
        return (first,)

    def _wall(self, instant: datetime) -> datetime:
        return instant.astimezone(self._zone).replace(tzinfo=None, fold=0)

    def _spread(self, instant: datetime) -> timedelta:
        # Nearly always 0. A change matters no farther away than it moves the clock.
        spread = self._spread_within(instant, _NEAR)
        return self._spread_within(instant, spread) if spread else spread

    def _spread_within(self, instant: datetime, distance: timedelta) -> timedelta:
        moments = (instant - distance, instant, instant + distance)
        offsets = [moment.astimezone(self._zone).utcoffset() or timedelta(0) for moment in moments]
        return max(offsets) - min(offsets)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and (self.text, self.tz) == (other.text, other.tz)

    def __hash__(self) -> int:
        return hash((self.text, self.tz))

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Schedule({self.text!r}, tz={self.tz!r})"


def preview(
    schedule: str | Sequence[str | int], n: int = 5, tz: str = "UTC", after: datetime | None = None
) -> list[datetime]:
    """Return the next ``n`` slots of a schedule, in order, as aware UTC datetimes. Registers nothing.

    Args:
        schedule, tz: As for `Schedule`.
        n: How many, ≥ 0.
        after: An aware datetime all slots are later than; None means now.

    Raises:
        InvalidSchedule: The schedule or the zone is invalid.
        TypeError: ``n`` is not an int.
        ValueError: ``n`` is negative, or ``after`` is naive.
    """
    if not isinstance(n, int) or isinstance(n, bool):
        raise TypeError(f"n must be an int, not {n!r}")
    if n < 0:
        raise ValueError(f"n must be 0 or more, not {n}")
    start = datetime.now(UTC) if after is None else _aware(after)
    return list(islice(Schedule(schedule, tz)._slots(start, forward=True), n))


def _words(spec: object) -> list[str]:
    if isinstance(spec, str):
        words = spec.split()
    elif isinstance(spec, Sequence) and not isinstance(spec, (bytes, bytearray, memoryview)):
        words = [str(word) if isinstance(word, (str, int)) and not isinstance(word, bool) else "" for word in spec]
        if any(word.split() != [word] for word in words):
            raise InvalidSchedule(_FORMAT, hint=f"each element of {spec!r} must be one field, such as '*' or 5")
    else:
        raise InvalidSchedule(_FORMAT, hint=f"give a str or a sequence of five fields, not {type(spec).__name__}")
    if len(words) != len(_FIELDS):
        remedy = (
            "words such as @daily are not supported, write 0 0 * * *"
            if words and words[0].startswith("@")
            else f"{spec!r} has {len(words)} fields; there are no seconds and no years"
        )
        raise InvalidSchedule(_FORMAT, hint=remedy)
    return words


def _zone(name: object) -> tzinfo:
    if not isinstance(name, str):
        raise InvalidSchedule(f"Invalid tz {name!r}", hint="give the name of a zone, such as 'Europe/Berlin'")
    if name == "UTC":
        # Works on machines without a time zone database.
        return UTC
    from zoneinfo import ZoneInfo

    try:
        return ZoneInfo(name)
    except (ValueError, OSError, LookupError) as exc:
        remedy = "give a name such as 'UTC' or 'Europe/Berlin'; if the name is right, run: pip install tzdata"
        raise InvalidSchedule(f"Invalid tz {name!r}", hint=remedy) from exc


def _aware(instant: datetime) -> datetime:
    if instant.tzinfo is None:
        raise ValueError(f"{instant!r} is naive; give an aware datetime, such as datetime.now(timezone.utc)")
    return instant.astimezone(UTC)
