"""First in the path of a server under test: what it writes fails now and then, as on a disk that is going bad.

FAIL_EACH=n makes the n-th write of the store fail, the 2n-th and so on: rows as SQLite reports it, files as the system
does.
"""

import errno
import os
import sqlite3
from itertools import count

EACH = int(os.environ.get("FAIL_EACH", "0"))

if EACH:
    from cloud.engine.store import journal
    from cloud.engine.store.blobs import BlobFolder

    writes = count(1)

    class Transaction(journal.Transaction):
        def __init__(self, connection, blobs):
            super().__init__(connection, blobs)
            self.execute = lambda *args: self._checked(connection, args)

        @staticmethod
        def _checked(connection, args):
            if next(writes) % EACH == 0:
                failure = sqlite3.OperationalError("disk I/O error")
                failure.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
                raise failure
            return connection.execute(*args)

    def failing(method):
        def write(*args):
            if next(writes) % EACH == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return method(*args)

        return write

    journal.Transaction = Transaction
    BlobFolder.put = failing(BlobFolder.put)
    BlobFolder.sync = failing(BlobFolder.sync)
