"""Batches as rows and back, each row with a digest that is compared when it is read.

Owns what stands in a row; when rows are written is the journal's business, which batches stay in memory the store's.
"""

from __future__ import annotations

import json
import sqlite3
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b, sha256

from cloud.engine.store.base import Batch, Chunk, Stored, not_found
from cloud.engine.store.blobs import BlobFolder
from cloud.engine.store.journal import Transaction
from cloud.engine.store.schema import ATTEMPT, BEGUN, DELETED, explained, open_reader
from cloud.environment import Environment
from cloud.errors import BackendError, CloudException
from cloud.jobs import DEFAULT_OPTIONS, JobOptions
from cloud.serialization.functions import Function
from cloud.serialization.plain import plain_payload

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    Row = tuple[Any, ...]

LARGE_BYTES: Final = 1 << 16
"""Payloads and outcomes from this size on are files."""

_FIELDS: Final = struct.Struct("<4q")

_BATCH: Final = (
    "SELECT b.id, b.jid0, b.n, b.is_map, b.label, b.created, b.depth, b.options, b.environment, b.digest, "
    "f.id, f.name, f.sha, c.id, c.sha FROM batch AS b "
    "JOIN content AS f ON f.id = b.function JOIN content AS c ON c.id = b.context "
)


def row_digest(*fields: object) -> bytes:
    """What is kept beside a row to know its fields again."""
    return blake2b(repr(fields).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _chunk_digest(fields: tuple[int, int, int, int], content: bytes) -> bytes:
    """The same for a chunk: (batch, start, n, kind) and its bytes."""
    return blake2b(content, digest_size=16, key=_FIELDS.pack(*fields), person=b"chunk").digest()


def _segment_digest(fields: tuple[int, int, int, int]) -> bytes:
    """The same for a segment's (batch, start, n, status), which are read without its bytes."""
    return blake2b(_FIELDS.pack(*fields), digest_size=16, person=b"segment").digest()


def _part_digest(table: str, fields: tuple[int, int, int, int], content: bytes) -> bytes:
    if table == "chunk":
        return _chunk_digest(fields, content)
    head = _segment_digest(fields)
    return head + blake2b(content, digest_size=16, key=head, person=b"outcome").digest()


# --- writing ----------------------------------------------------------------------------------------------------------


class BatchRow:
    """What a batch's row holds, taken from the batch under the engine's lock; written later by the journal."""

    def __init__(self, batch: Batch, finished: float | None) -> None:
        options = batch.options
        self.key = batch.key
        self.jid0 = batch.jid0 or None
        self.n = batch.n if batch.jid0 else 0
        self.is_map = int(batch.is_map)
        self.label = options.label
        self.created = float(batch.created)
        self.finished = finished
        self.depth = batch.depth
        self.options = "{}" if options is DEFAULT_OPTIONS else _options_text(options)
        self.environment = json.dumps(batch.environment)
        self._function = batch.function
        self._context = batch.context[1]

    def insert(self, transaction: Transaction) -> None:
        """Write a new row, and the function and surroundings if they are new."""
        function, sha = _keep_content(
            transaction, self._function.payload, self._function.name, reusable=self._function.reusable
        )
        context, context_sha = _keep_content(transaction, self._context, "", reusable=False)
        transaction.execute(
            "INSERT INTO batch VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                self.key,
                self.jid0,
                self.n,
                self.is_map,
                self.label,
                self.created,
                self.finished,
                self.depth,
                self.options,
                self.environment,
                function,
                context,
                self._digest(sha, context_sha),
            ),
        )

    def seal(self, transaction: Transaction) -> None:
        """Write the jids of a map that has a row."""
        shas = transaction.execute(
            "SELECT f.sha, c.sha FROM batch AS b JOIN content AS f ON f.id = b.function "
            "JOIN content AS c ON c.id = b.context WHERE b.id = ?",
            (self.key,),
        ).fetchone()
        transaction.execute(
            "UPDATE batch SET jid0 = ?, n = ?, finished = ?, digest = ? WHERE id = ?",
            (self.jid0, self.n, self.finished, self._digest(*shas), self.key),
        )

    def _digest(self, function: bytes, context: bytes) -> bytes:
        return row_digest(
            self.key,
            self.jid0,
            self.n,
            self.is_map,
            self.label,
            self.created,
            self.depth,
            self.options,
            self.environment,
            function,
            context,
        )


def _keep_content(transaction: Transaction, payload: bytes, name: str, *, reusable: bool) -> tuple[int, bytes]:
    payload = plain_payload(payload)
    sha = sha256(payload).digest()
    found = transaction.execute(
        "SELECT id FROM content WHERE sha = ? AND name = ? AND reusable = ?", (sha, name, reusable)
    ).fetchone()
    if found is not None:
        return found[0], sha
    body: bytes | None = payload
    if len(payload) > LARGE_BYTES:
        transaction.put(payload)
        body = None
    digest = row_digest(sha, name, int(reusable))
    row = (sha, name, reusable, digest, body)
    cursor = transaction.execute(
        "INSERT INTO content (n_refs, sha, name, reusable, digest, body) VALUES (0, ?, ?, ?, ?, ?)", row
    )
    assert cursor.lastrowid is not None
    return cursor.lastrowid, sha


def write_part(transaction: Transaction, table: str, fields: tuple[int, int, int, int], content: bytes) -> None:
    """Write a chunk or segment: (batch, start, n, kind) and its bytes."""
    sha, body = (transaction.put(content), None) if len(content) > LARGE_BYTES else (None, content)
    digest = _part_digest(table, fields, content if sha is None else sha)
    sql = f"INSERT INTO {table} VALUES (?, ?, ?, ?, ?, ?, ?)"  # noqa: S608 - the table's name is ours
    transaction.execute(sql, (*fields, digest, sha, body))


# What is told of a batch whose submission was given up, or that was deleted meanwhile, is written nowhere.


def _has_batch(transaction: Transaction, batch: int) -> bool:
    return transaction.execute("SELECT 1 FROM batch WHERE id = ?", (batch,)).fetchone() is not None


def write_outcome(
    transaction: Transaction, fields: tuple[int, int, int, int], outcome: bytes, finished: float | None
) -> None:
    """Write a segment; with the time when it was the last of its batch, whose arguments go then."""
    batch = fields[0]
    if _has_batch(transaction, batch):
        write_part(transaction, "segment", fields, outcome)
        if finished is not None:
            transaction.execute("DELETE FROM chunk WHERE batch = ?", (batch,))
            transaction.execute("DELETE FROM mark WHERE batch = ? AND kind = ?", (batch, BEGUN))
            transaction.execute("UPDATE batch SET finished = ? WHERE id = ?", (finished, batch))


def write_begun(transaction: Transaction, batch: int, start: int, stop: int) -> None:
    """Mark items as begun."""
    if _has_batch(transaction, batch):
        _write_mark(transaction, batch, BEGUN, start, stop)


def write_attempt(transaction: Transaction, batch: int, index: int, n: int) -> None:
    """Write how many attempts at an item were begun before the present one, which has not begun."""
    if not _has_batch(transaction, batch):
        return
    remove = "DELETE FROM mark WHERE batch = ? AND kind = ? AND start = ?"
    transaction.execute(remove, (batch, ATTEMPT, index))
    _write_mark(transaction, batch, ATTEMPT, index, n)
    # Those that were begun together with it have not ended.
    for start, stop in transaction.execute(
        "SELECT start, stop FROM mark WHERE batch = ? AND kind = ? AND start <= ? AND stop > ?",
        (batch, BEGUN, index, index),
    ).fetchall():
        transaction.execute(f"{remove} AND stop = ?", (batch, BEGUN, start, stop))
        for low, high in ((start, index), (index + 1, stop)):
            if low < high:
                _write_mark(transaction, batch, BEGUN, low, high)


def write_deleted(transaction: Transaction, batch: int, runs: list[tuple[int, int]]) -> None:
    """Mark runs of items as deleted."""
    if _has_batch(transaction, batch):
        for start, stop in runs:
            _write_mark(transaction, batch, DELETED, start, stop)


def _write_mark(transaction: Transaction, batch: int, kind: int, start: int, stop: int) -> None:
    digest = row_digest(batch, kind, start, stop)
    transaction.execute("INSERT OR IGNORE INTO mark VALUES (?, ?, ?, ?, ?)", (batch, kind, start, stop, digest))


def _options_text(options: JobOptions) -> str:
    values = options.as_dict()
    if type(options.depends_on) is range:
        # A map's jids: as long as the map if they were listed.
        jids = options.depends_on
        values["depends_on"] = {"range": [jids.start, jids.stop, jids.step]}
    return json.dumps(values)


def _options_from(text: str) -> JobOptions:
    values = json.loads(text)
    if isinstance(values.get("depends_on"), dict):
        values["depends_on"] = range(*values["depends_on"]["range"])
    return JobOptions.from_dict(values)


# --- reading ----------------------------------------------------------------------------------------------------------


class Part(Stored):
    """The bytes of a chunk or segment: here until they are on disk, then there.

    Attributes:
        content: They themselves, while they are here.
    """

    __slots__ = ("_reader", "_start", "_table", "batch", "content")

    def __init__(self, reader: Reader, table: str, batch: int, start: int, content: bytes | None = None) -> None:
        self._reader = reader
        self._table = table
        self.batch = batch
        self._start = start
        self.content = content

    def load(self) -> bytes:
        content = self.content
        return self._reader.part(self._table, self.batch, self._start) if content is None else content

    def head(self, n_bytes: int) -> bytes:
        content = self.content
        found = self._reader.head(self._table, self.batch, self._start, n_bytes) if content is None else content
        return found[:n_bytes]

    def release(self) -> None:
        """They are on disk now."""
        self.content = None


class Reader:
    """Reads what is committed. Thread-safe.

    Args:
        path: The SQLite file; its writer is open.
        blobs: Its folder of files.
    """

    def __init__(self, path: str, blobs: BlobFolder) -> None:
        self._path = path
        self._blobs = blobs
        self._lock = threading.RLock()
        self._connection = open_reader(path)

    def rows(self, sql: str, values: Sequence[object] = ()) -> list[Row]:
        """All rows of a query.

        Raises:
            BackendError: The file is damaged or cannot be read.
        """
        with self._lock:
            try:
                return self._connection.execute(sql, values).fetchall()
            except sqlite3.Error as exc:
                raise explained(exc, self._path) from exc

    @contextmanager
    def _moment(self) -> Iterator[None]:
        """All that is read meanwhile is as it was at one moment: a batch may be deleted between two queries."""
        with self._lock:
            self.rows("BEGIN")
            try:
                yield
            finally:
                self.rows("COMMIT")

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._connection.close()

    # --- content ------------------------------------------------------------------------------------------------------

    def part(self, table: str, batch: int, start: int) -> bytes:
        """The bytes of a chunk or segment.

        Raises:
            BackendError: They are damaged or gone; it names the job.
            JobNotFound: The job was deleted.
        """
        columns = "batch, start, n, kind, digest, sha, body"
        sql = f"SELECT {columns} FROM {table} WHERE batch = ? AND start = ?"  # noqa: S608 - the table's name is ours
        found = self.rows(sql, (batch, start))
        if not found:
            raise self._damage(batch, start, f"its {table} is gone")
        key, start, n, kind, digest, sha, body = found[0]
        if _part_digest(table, (key, start, n, kind), body if sha is None else sha) != digest:
            raise self._damage(batch, start, f"its {table} is damaged")
        if sha is None:
            return bytes(body)
        try:
            return self._blobs.read(sha)
        except BackendError as exc:
            raise self._damage(batch, start, str(exc)) from exc

    def head(self, table: str, batch: int, start: int, n_bytes: int) -> bytes:
        """The first bytes of a chunk or segment, as they are. Errors as ``part``."""
        sql = f"SELECT sha, substr(body, 1, ?) FROM {table} WHERE batch = ? AND start = ?"  # noqa: S608 - the table's name is ours
        found = self.rows(sql, (n_bytes, batch, start))
        if not found:
            raise self._damage(batch, start, f"its {table} is gone")
        sha, body = found[0]
        return bytes(body) if sha is None else self._blobs.read(sha, n_bytes)

    def _damage(self, batch: int, start: int, what: str) -> CloudException:
        jid0 = self.rows("SELECT jid0 FROM batch WHERE id = ?", (batch,))
        if not jid0:
            return not_found()  # deleted since it was looked up
        job = f"job {jid0[0][0] + start}" if jid0[0][0] is not None else f"item {start} of map {batch}"
        return BackendError(
            f"What is stored of {job} cannot be trusted: {what}", hint="Restore the data folder from a backup."
        )

    def contents(self, which: str) -> dict[int, Function]:
        """Functions by their ids, and surroundings as if they were functions; ``which`` selects the ids."""
        found: dict[int, Function] = {}
        sql = f"SELECT id, sha, name, reusable, digest, body FROM content WHERE id IN ({which})"  # noqa: S608 - ours
        for number, sha, name, reusable, digest, body in self.rows(sql):
            payload = self._blobs.read(sha) if body is None else body
            if row_digest(sha, name, reusable) != digest or sha256(payload).digest() != sha:
                raise BackendError(f"{self._path} is damaged: function {name} does not match its digest")
            found[number] = Function(payload, name, reusable=bool(reusable))
        return found

    # --- batches ------------------------------------------------------------------------------------------------------

    def finished(self, where: str, values: Sequence[object] = ()) -> list[tuple[Batch, bytearray | None]]:
        """Finished batches, and which of their jobs were deleted (one byte each, 1 for those; None for no job).

        Args:
            where: What follows the query's FROM clause; ``b`` is the batch.
            values: Its parameters.
        """
        with self._moment():
            batches = {row[0]: self.batch(row, None) for row in self.rows(f"{_BATCH} {where}", values)}
            self.add_segments(batches)
            deleted = self.add_marks(batches)
        for batch in batches.values():
            if batch.n_final != batch.n:
                raise self._damage(batch.key, 0, f"{batch.n - batch.n_final} of its outcomes are gone")
        return [(batch, deleted.get(key)) for key, batch in batches.items()]

    def batch(self, row: Row, contents: dict[int, Function] | None) -> Batch:
        """A batch as its row has it, without its parts; its function without payload if there are no ``contents``."""
        key, jid0, n, is_map, label, created, depth, options, environment, digest, *content = row
        function_id, name, sha, context_id, context_sha = content
        fields = (key, jid0, n, is_map, label, created, depth, options, environment, sha, context_sha)
        if row_digest(*fields) != digest:
            raise BackendError(
                f"{self._path} is damaged: the row of job {jid0} does not match its digest",
                hint="Restore the data folder from a backup.",
            )
        batch = Batch(
            jid0 or 0,
            Function(b"", name) if contents is None else contents[function_id],
            (0, b"") if contents is None else (_FIRST_CONTEXT + context_id, contents[context_id].payload),
            DEFAULT_OPTIONS if options == "{}" else _options_from(options),
            depth,
            created,
            None if is_map else b"",
            None if environment == "null" else Environment(*json.loads(environment)),
        )
        batch.key = key
        if is_map:
            batch.n = n
            batch.states = bytearray(b"\x01") * n
            batch.sealed = jid0 is not None
        return batch

    def unfinished(self) -> tuple[dict[int, Batch], dict[int, bytearray], list[tuple[int, int, int]]]:
        """Unfinished batches by key, their deleted jobs, and (key, start, stop) of runs marked as begun."""
        which = "SELECT {} FROM batch WHERE finished IS NULL"
        contents = self.contents(f"{which.format('function')} UNION {which.format('context')}")
        rows = self.rows(f"{_BATCH} WHERE b.finished IS NULL ORDER BY b.id")
        batches = {row[0]: self.batch(row, contents) for row in rows}
        self._add_chunks(batches, which.format("id"))
        self.add_segments(batches, which.format("id"))
        begun: list[tuple[int, int, int]] = []
        deleted = self.add_marks(batches, which.format("id"), begun)
        return batches, deleted, begun

    def _add_chunks(self, batches: dict[int, Batch], which: str) -> None:
        token = 0
        columns = "batch, start, n, kind, digest, sha, body"
        for key, start, n, kind, digest, sha, body in self._of(batches, columns, "chunk", which):
            if _chunk_digest((key, start, n, kind), body if sha is None else sha) != digest:
                raise self._damage(key, start, "its chunk is damaged")
            payload: Any = Part(self, "chunk", key, start) if body is None else body
            batch = batches[key]
            if batch.arguments is not None:
                batch.arguments = payload
                continue
            token += 1
            if not batch.sealed:
                batch.n = start + n
                batch.states += b"\x01" * n
            batch.chunks.append(Chunk(_recovered(token), start, n, kind, payload))

    def add_segments(self, batches: dict[int, Batch], which: str = "") -> None:
        """Give batches their states, and outcomes that load when they are asked for."""
        for key, start, n, kind, digest in self._of(batches, "batch, start, n, kind, digest", "segment", which):
            if digest[:16] != _segment_digest((key, start, n, kind)):
                raise self._damage(key, start, "its segment is damaged")
            batch = batches[key]
            batch.states[start : start + n] = bytes((kind,)) * n
            batch.n_final += n
            batch.add_segment(start, n, Part(self, "segment", key, start))

    def add_marks(
        self, batches: dict[int, Batch], which: str = "", begun: list[tuple[int, int, int]] | None = None
    ) -> dict[int, bytearray]:
        """Give batches their attempts; returns their deleted jobs by key, and adds to ``begun``."""
        deleted: dict[int, bytearray] = {}
        for key, kind, start, stop, digest in self._of(batches, "batch, kind, start, stop, digest", "mark", which):
            if row_digest(key, kind, start, stop) != digest:
                raise self._damage(key, start, "its mark is damaged")
            batch = batches[key]
            if kind == DELETED:
                deleted.setdefault(key, bytearray(batch.n))[start:stop] = b"\x01" * (stop - start)
            elif kind == ATTEMPT:
                batch.attempts = batch.attempts or {}
                batch.attempts[start] = stop
            elif begun is not None:
                begun.append((key, start, stop))
        return deleted

    def _of(self, batches: Iterable[int], columns: str, table: str, which: str) -> list[Row]:
        keys: list[int] = [] if which else list(batches)
        if not which and not keys:
            return []
        which = which or ", ".join("?" * len(keys))
        sql = f"SELECT {columns} FROM {table} WHERE batch IN ({which}) ORDER BY batch, start"  # noqa: S608 - the table's name is ours
        return self.rows(sql, keys)


def _recovered(number: int) -> int:
    # Far from those that this process gives out, which begin at 1.
    return (1 << 62) + number


_FIRST_CONTEXT: Final = 1 << 31
"""Likewise; a worker is told a context in 32 bits."""


__all__ = [
    "LARGE_BYTES",
    "BatchRow",
    "Part",
    "Reader",
    "row_digest",
    "write_attempt",
    "write_begun",
    "write_deleted",
    "write_outcome",
    "write_part",
]
