"""The operations on stored files, as a workgroup's store answers them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Final

from cloud.backends.requests import Request
from cloud.errors import PayloadTooLarge, StoredFileCorrupt
from cloud.resources.files import FileStore
from cloud.resources.uploads import Uploads
from cloud.wire import MAX_PIECE_BYTES

__all__ = ["FileRequests"]

Answer = tuple[dict[str, Any], tuple[bytes, ...]]

_N_NAMES: Final = 2000


class FileRequests:
    """Answers requests; each method blocks for the disk.

    Args:
        store: The workgroup's files.
        uploads: Its uploads.

    Attributes:
        handlers: By name of the operation.
    """

    def __init__(self, store: FileStore, uploads: Uploads) -> None:
        self._store = store
        self._uploads = uploads
        self.handlers: dict[str, Callable[[Request], Answer]] = {
            "files.put": self._put,
            "files.begin": self._begin,
            "files.append": self._append,
            "files.commit": self._commit,
            "files.abort": self._abort,
            "files.open": self._open,
            "files.read": self._read,
            "files.list": self._list,
            "files.exists": self._exists,
            "files.info": self._info,
            "files.delete": self._delete,
        }

    # --- writing ------------------------------------------------------------------------------------------------------

    def _put(self, request: Request) -> Answer:
        contents, name = _piece(request), request.content["name"]
        if hashlib.sha256(contents).hexdigest() != request.content["sha256"]:
            raise StoredFileCorrupt(f"the contents of {name!r} were damaged on their way; put it again", name)
        self._uploads.check_room(len(contents), len(contents))
        self._store.put_once(contents, name, _key(request))
        return {}, ()

    def _begin(self, request: Request) -> Answer:
        return {"upload": self._uploads.begin()}, ()

    def _append(self, request: Request) -> Answer:
        content = request.content
        return {"size": self._uploads.append(content["upload"], content["offset"], _piece(request))}, ()

    def _commit(self, request: Request) -> Answer:
        content = request.content
        self._uploads.commit(content["upload"], content["name"], content["sha256"])
        return {}, ()

    def _abort(self, request: Request) -> Answer:
        self._uploads.abort(request.content["upload"])
        return {}, ()

    def _delete(self, request: Request) -> Answer:
        return {"deleted": self._store.delete(request.content["name"], _key(request))}, ()

    # --- reading ------------------------------------------------------------------------------------------------------

    def _open(self, request: Request) -> Answer:
        content = request.content
        name, start, n = content["name"], content["start"], min(content["n"], MAX_PIECE_BYTES)
        blob = self._store.open_contents(name)
        piece = self._store.read_contents(blob.digest, name, start, n)
        facts = {"size": blob.size_bytes, "md5": blob.md5, "sha256": blob.digest}
        return {**facts, "piece_sha256": hashlib.sha256(piece).hexdigest()}, (piece,)

    def _read(self, request: Request) -> Answer:
        content = request.content
        n = min(content["n"], MAX_PIECE_BYTES)
        piece = self._store.read_contents(content["sha256"], content["name"], content["start"], n)
        return {"piece_sha256": hashlib.sha256(piece).hexdigest()}, (piece,)

    def _list(self, request: Request) -> Answer:
        content = request.content
        names = self._store.list(content["prefix"], content["after"], _N_NAMES + 1)
        return {"names": names[:_N_NAMES], "more": len(names) > _N_NAMES}, ()

    def _exists(self, request: Request) -> Answer:
        return {"exists": self._store.exists(request.content["name"])}, ()

    def _info(self, request: Request) -> Answer:
        info = self._store.info(request.content["name"])
        facts = {"size": info.size_bytes, "md5": info.md5, "sha256": info.sha256}
        return {**facts, "modified": info.modified.isoformat()}, ()


def _piece(request: Request) -> bytes:
    piece = request.blobs[0]
    if len(piece) > MAX_PIECE_BYTES:
        error = PayloadTooLarge(f"{len(piece):,} bytes of a file in one request, of {MAX_PIECE_BYTES:,} that may be")
        error.size_bytes, error.limit_bytes = len(piece), MAX_PIECE_BYTES
        raise error
    return piece


def _key(request: Request) -> str:
    return f"{request.op}:{request.key}" if request.key else ""
