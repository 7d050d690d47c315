"""The real server with workers of the tests' own: by script, or those of the file named on the command line."""

import logging
import sys
from pathlib import Path

from flash.catalog.catalog import flash_home
from flash.control_plane.listening import serve
from flash.control_plane.server_config import load_settings
from flash.launching.local import LocalLauncher

logging.basicConfig(level=logging.INFO)  # into the machine's server.out
home = flash_home()
worker = Path(__file__).with_name(sys.argv[1] if len(sys.argv) > 1 else "scripted_supervisor.py")
launcher = LocalLauncher(home / "work", devices=("cpu",), command=(sys.executable, str(worker)))
serve(load_settings(home), launcher=launcher)
