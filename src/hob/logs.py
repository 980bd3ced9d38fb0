"""How both processes log: one line each, for people or as JSON. Knows no other part of Hob."""

from __future__ import annotations

import json
import logging
import os
import sys
import time

ENVIRONMENT = "HOB_LOG_JSON"
"""How the engine process learns it from the daemon."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line; a record's `fields` (logging's `extra`) are its own keys."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["stack"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up(as_json: bool, plain: str = "%(asctime)s %(levelname)s %(name)s: %(message)s") -> None:
    """Log to stderr at the level of HOB_LOG (info)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter(plain))
    logging.basicConfig(level=os.environ.get("HOB_LOG", "INFO").upper(), handlers=[handler])
    # What no line of ours says is not looked up for each (logging's documented switches).
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    os.environ[ENVIRONMENT] = "true" if as_json else "false"
