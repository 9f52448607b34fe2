"""Who is asking: the Authorization header into a principal, and how often one may ask.

Owns what is remembered between requests: keys verified within the last second, failed sign-ins by address, and how
much each key has asked for. Knows nothing of HTTP but the text of one header and the numbers of its answers; the
accounts themselves are `cloud.resources.accounts`'.

::

    header ──► quick ──► verified within 1 s ──────────────► principal      in the event loop: microseconds
                 │ no
                 └─────► check ──► key: one look into the database ──► principal    in a thread: it may block
                                └► password: scrypt, two at a time ──► principal

What is changed in the accounts counts within `CACHE_S`, whichever process changed it.

Ten failed sign-ins within a minute lock an address out of signing in with passwords, right ones included: otherwise
the lock would not stop guessing. A right key is accepted even then. Guessing 256 random bits is hopeless at any
rate, while a team behind one address must not lose its jobs to one member's program with a wrong key; whoever goes on
with wrong keys is told to wait.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
import math
import re
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final, NamedTuple, TypeGuard, TypeVar

from cloud.errors import AccountError, BackendError
from cloud.logs import logger
from cloud.resources.accounts import AccountStore, Principal
from cloud.resources.keys import SCOPES

__all__ = ["Authenticator", "NotAllowed", "NotAuthenticated", "NotFound", "Refusal", "TooManyRequests", "require"]

#: For how long a verified header is believed without a look into the database.
CACHE_S: Final = 1.0

#: Failed sign-ins that one address has within `FAILURES_WITHIN_S`.
MAX_FAILURES: Final = 10
FAILURES_WITHIN_S: Final = 60.0

#: Password checks at the same time (16 MB and 0.2 s of a core each), and those that may wait for one of them.
N_PASSWORD_CHECKS: Final = 2
N_PASSWORDS_WAITING: Final = 8

#: Entries of each table; the oldest goes for a new one, so that no stranger can make the tables grow.
MAX_REMEMBERED: Final = 10_000

_Name = TypeVar("_Name")
_Value = TypeVar("_Value")

_MAX_HEADER_CHARS: Final = 8192
_HEADER: Final = re.compile(r"(bearer|basic) +([!-~]+)", re.IGNORECASE)
_KEY: Final = re.compile(r"([1-9][0-9]{0,18}):([!-~]+)")


class Refusal(AccountError):
    """The request is refused.

    Attributes:
        http_status: Of the answer.
        retry_after_s: After which the same request may succeed; None when waiting does not help.
    """

    http_status: int = 403
    retry_after_s: float | None = None

    @property
    def http_headers(self) -> dict[str, str]:
        """Headers that the answer needs."""
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


class NotAuthenticated(Refusal):
    """Credentials are missing, malformed or wrong; which part of them is not told."""

    http_status = 401

    @property
    def http_headers(self) -> dict[str, str]:
        """Not Basic: a browser that is told so would ask for a password, and send it with everything."""
        return {"WWW-Authenticate": 'Bearer realm="cloud"'}


class NotAllowed(Refusal):
    """The credentials are right, and do not allow this."""


class NotFound(Refusal):
    """There is no such user or key, or none that whoever asks may know of."""

    http_status = 404


class TooManyRequests(Refusal):
    """Too many requests, or too many failed ones; nothing was looked at."""

    http_status = 429

    def __init__(self, text: str, retry_after_s: float) -> None:
        super().__init__(text, retry=True, hint=f"Try again in {max(1, math.ceil(retry_after_s))} s.")
        self.retry_after_s = retry_after_s


def require(principal: Principal, scope: str) -> None:
    """Return if the principal has the scope.

    Raises:
        NotAllowed: It has not.
        ValueError: There is no such scope.
    """
    if scope not in SCOPES:
        raise ValueError(f"there is no scope {scope!r}: the scopes are {', '.join(SCOPES)}")
    if scope not in principal.scopes:
        asked_with = "this password" if principal.api_key is None else f"API key {principal.api_key}"
        has = ", ".join(each for each in SCOPES if each in principal.scopes) or "none"
        raise NotAllowed(f"this needs scope {scope!r}; {asked_with} of user {principal.user!r} has {has}")


class _Verified(NamedTuple):
    principal: Principal
    since: float  # when the database was asked, not when it had answered


class _Bucket(NamedTuple):
    tokens: float
    at: float


class Authenticator:
    """Turns Authorization headers into principals. Safe in threads.

    Args:
        store: The accounts.
        clock: Monotonic seconds.
        rate_per_s: How many requests a second each key may make in the long run.
        burst: How many at once after it was idle.
    """

    def __init__(
        self,
        store: AccountStore,
        clock: Callable[[], float] = time.monotonic,
        *,
        rate_per_s: float = 5_000.0,
        burst: float = 20_000.0,
    ) -> None:
        self._store = store
        self._clock = clock
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._lock = threading.Lock()
        # Headers are remembered as digests under a secret of this process: what is in memory signs nobody in.
        self._secret = secrets.token_bytes(32)
        self._verified: OrderedDict[bytes, _Verified] = OrderedDict()
        self._failures = _Failures()
        self._buckets: OrderedDict[int | str, _Bucket] = OrderedDict()
        self._passwords_inside = threading.BoundedSemaphore(N_PASSWORD_CHECKS + N_PASSWORDS_WAITING)
        self._passwords_running = threading.BoundedSemaphore(N_PASSWORD_CHECKS)

    def quick(self, authorization_header: str | None) -> Principal | None:
        """Return who is asking if that was verified within the last second, else None. Never blocks.

        Raises:
            TooManyRequests: The key, or the user by password, asks too often.
        """
        if not _is_sound(authorization_header):
            return None
        name = self._name(authorization_header)
        with self._lock:
            now = self._clock()
            found = self._verified.get(name)
            if found is None or not 0 <= now - found.since < CACHE_S:
                return None
            self._take_token(found.principal, now)
        return found.principal

    def check(self, authorization_header: str | None, address: str) -> Principal:
        """Return who is asking. May block: for the database, and some 0.2 s and more for a password.

        Args:
            authorization_header: ``Bearer <number of the key>:<its secret>``, or ``Basic`` with base64 of
                ``user:password``. None when the request has none.
            address: Where the request comes from. An IPv6 network of 64 bits is one address.

        Raises:
            NotAuthenticated: The header is missing or malformed, the credentials are wrong, or not in force: a key
                deactivated, revoked or expired, a user deactivated, a workgroup suspended.
            TooManyRequests: The address has failed too often and this is a password, or not a right key; too many
                passwords are being checked; or the key asks too often.
            BackendError: The accounts cannot be read.
        """
        principal = self.quick(authorization_header)
        if principal is not None:
            return principal
        if authorization_header is None:
            raise NotAuthenticated("credentials are missing", hint="Send 'Authorization: Bearer <api_key>:<secret>'.")
        place = _network(address)
        since = self._clock()
        match = _HEADER.fullmatch(authorization_header) if _is_sound(authorization_header) else None
        if match is None:
            raise self._failed(place, "the Authorization header is malformed")
        if match[1].lower() == "bearer":
            principal = self._check_key(match[2], place)
        else:
            principal = self._check_password(match[2], place)
        with self._lock:
            _remember(self._verified, self._name(authorization_header), _Verified(principal, since))
            self._take_token(principal, self._clock())
        return principal

    def _check_key(self, text: str, place: str) -> Principal:
        match = _KEY.fullmatch(text)
        principal = self._store.verify_key(int(match[1]), match[2]) if match else None
        if principal is None:
            raise self._failed(place, "the API key is refused: unknown, not in force, or its secret is wrong")
        assert principal.api_key is not None
        try:
            self._store.note_use(principal.api_key)
        except (BackendError, OSError) as exc:
            # A full disk must not keep anyone from making room.
            logger("Cloud.server").warning("the use of API key %d cannot be noted: %s", principal.api_key, exc)
        return principal

    def _check_password(self, text: str, place: str) -> Principal:
        try:
            user, colon, password = base64.b64decode(text, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            colon = user = password = ""
        if not colon:
            raise self._failed(place, "the Authorization header is malformed")
        with self._lock:
            # Counted before it is checked: of many guesses at the same time no more than the limit are looked at.
            self._failures.add(place, self._clock())
        if not self._passwords_inside.acquire(blocking=False):
            with self._lock:
                self._failures.withdraw(place)
            raise TooManyRequests("too many passwords are being checked", 1.0)
        try:
            with self._passwords_running:
                principal = self._store.verify_password(user, password)
        except (ValueError, BackendError) as exc:
            if isinstance(exc, BackendError):
                with self._lock:
                    self._failures.withdraw(place)
                raise
            # What can be no user name or password; the error would show part of it.
            principal = None
        finally:
            self._passwords_inside.release()
        if principal is None:
            raise NotAuthenticated("user name or password are refused")
        with self._lock:
            self._failures.withdraw(place)
        return principal

    def _failed(self, place: str, text: str) -> Refusal:
        with self._lock:
            self._failures.add(place, self._clock())
        return NotAuthenticated(text)

    def _take_token(self, principal: Principal, now: float) -> None:
        # Each key has its own; so has the user who signs in by password.
        name = principal.user if principal.api_key is None else principal.api_key
        tokens, at = self._buckets.get(name, (self._burst, now))
        tokens = min(self._burst, tokens + max(0.0, now - at) * self._rate_per_s)
        if tokens < 1.0:
            _remember(self._buckets, name, _Bucket(tokens, now))
            raise TooManyRequests(
                f"more than {self._rate_per_s:g} requests a second come from one key", (1.0 - tokens) / self._rate_per_s
            )
        _remember(self._buckets, name, _Bucket(tokens - 1.0, now))

    def _name(self, header: str) -> bytes:
        return hashlib.blake2b(header.encode("ascii"), key=self._secret, digest_size=32).digest()


class _Failures:
    """The latest failed sign-ins of each address. For the holder of a lock."""

    def __init__(self) -> None:
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def add(self, place: str, now: float) -> None:
        """Count one.

        Raises:
            TooManyRequests: It would be one too many; it is not counted.
        """
        times = self._times.get(place)
        if times is None:
            times = deque()
        while times and now - times[0] >= FAILURES_WITHIN_S:
            times.popleft()
        if len(times) >= MAX_FAILURES:
            raise TooManyRequests(
                f"this address has failed to sign in {MAX_FAILURES} times within a minute",
                times[0] + FAILURES_WITHIN_S - now,
            )
        times.append(now)
        _remember(self._times, place, times)

    def withdraw(self, place: str) -> None:
        """Take one back."""
        times = self._times.get(place)
        if times:
            times.pop()
        if not times:
            self._times.pop(place, None)


def _remember(table: OrderedDict[_Name, _Value], name: _Name, value: _Value) -> None:
    table[name] = value
    table.move_to_end(name)
    if len(table) > MAX_REMEMBERED:
        table.popitem(last=False)


def _is_sound(header: str | None) -> TypeGuard[str]:
    return header is not None and len(header) <= _MAX_HEADER_CHARS and header.isascii()


def _network(address: str) -> str:
    """What counts as one address: of IPv6 a whole network, since each customer has at least one of those."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    return str(found.ipv4_mapped or ipaddress.ip_network((int(found) >> 64 << 64, 64)))
