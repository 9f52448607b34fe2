"""`cloud`, with limits and patience of a server that a test can reach: what ``SERVER_TUNING`` says, as JSON."""

from __future__ import annotations

import json
import os
import sys

from cloud.cli import main
from cloud.server import messages
from cloud.server.config import ServerConfig

if __name__ == "__main__":
    tuning = json.loads(os.environ["SERVER_TUNING"])
    messages._SLOW_AFTER_S = tuning.pop("slow_after_s", messages._SLOW_AFTER_S)  # type: ignore[misc]
    ServerConfig.__init__.__kwdefaults__.update(tuning)
    sys.exit(main())
