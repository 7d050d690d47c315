"""The server's program: `python -m flash.control_plane.main`, with `--config server.toml` for a team's.

Owns its command line, the settings that it is told, the log, and the order of starting; what it then is, is
`listening`'s.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from flash.catalog.catalog import flash_home
from flash.control_plane.logs import log_as
from flash.control_plane.server_config import load_server_config, load_settings
from flash.errors import ConfigError, FlashError
from flash.launching.preload import Preloaded

log = logging.getLogger("flash.server")


def main(argv: list[str] | None = None) -> int:
    """Without arguments FLASH_HOME and FLASH_SERVER_* say everything: a laptop's server."""
    parser = argparse.ArgumentParser(prog="flash-server", description="The server process.", allow_abbrev=False)
    parser.add_argument("--config", type=Path, help="server.toml")
    parser.add_argument("--check", action="store_true", help="only say whether the settings are sound")
    arguments = parser.parse_args(argv)
    config: Path | None = arguments.config
    settings = None
    try:
        settings = load_settings(flash_home()) if config is None else load_server_config(config)
        if arguments.check:
            return 0
        settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        log_as(settings)
        preloaded = Preloaded(settings.home / "logs" / "preloaded.log")
        if settings.preload and settings.launcher == "local" and settings.devices != ():
            preloaded.start()  # before the imports below: a first run waits for it longest
        from flash.control_plane.listening import serve

        try:
            serve(settings, config=config.absolute() if config else None, preloaded=preloaded)
        finally:
            preloaded.close()
    except FlashError as error:
        if settings is not None:
            log.error("%s", error)
        if settings is None or settings.log_to != "stderr":
            for line in error.problems if isinstance(error, ConfigError) else [str(error)]:
                print(f"error: {line}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
