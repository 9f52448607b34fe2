"""First in the path of a server under test: what it writes fails now and then, as on a disk that is going bad.

FAIL_EACH=n makes a write of the store fail, n writes after the commit that followed the failure before: rows as SQLite
reports it, files as the system does.
"""

import errno
import os
import sqlite3

EACH = int(os.environ.get("FAIL_EACH", "0"))

if EACH:
    from cloud.engine.store import journal
    from cloud.engine.store.blobs import BlobFolder

    left = [EACH]

    def fails():
        left[0] -= 1
        return left[0] == 0

    class Transaction(journal.Transaction):
        def __init__(self, connection, blobs):
            super().__init__(connection, blobs)

            def execute(*args):
                if fails():
                    failure = sqlite3.OperationalError("disk I/O error")
                    failure.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
                    raise failure
                return connection.execute(*args)

            self.execute = execute

    def failing(method):
        def write(*args):
            if fails():
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return method(*args)

        return write

    def written(method):
        def write(*args):
            method(*args)
            if left[0] <= 0:
                left[0] = EACH

        return write

    journal.Transaction = Transaction
    journal.Journal._write = written(journal.Journal._write)
    BlobFolder.put = failing(BlobFolder.put)
    BlobFolder.sync = failing(BlobFolder.sync)
