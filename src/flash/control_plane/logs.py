"""The server's own log: where it goes and in which form. What is logged is everybody's own affair."""

from __future__ import annotations

import json
import logging
import logging.handlers
import sys
import time

from flash.control_plane.settings import ServerSettings

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class JsonLines(logging.Formatter):
    """One object a line: time (UTC), level, logger, message, whatever else was said, and a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        told = {name: value for name, value in vars(record).items() if name not in _PLAIN and value is not None}
        line = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **told,
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_as(settings: ServerSettings) -> None:
    """Sends everything that is logged to where the settings say."""
    handler: logging.Handler
    if settings.log_to == "stderr":
        handler = logging.StreamHandler(sys.stderr)
    else:
        path = settings.home / "logs" / "server.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.handlers.RotatingFileHandler(path, maxBytes=10 << 20, backupCount=3)
    if settings.log_format == "json":
        handler.setFormatter(JsonLines())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    for name in ("alembic", "uvicorn.error", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
