"""The real server, whose workers train by script."""

import sys
from pathlib import Path

from flash.catalog.catalog import flash_home
from flash.control_plane.main import serve
from flash.control_plane.settings import load_settings
from flash.launching.local import LocalLauncher

home = flash_home()
supervisor = (sys.executable, str(Path(__file__).with_name("scripted_supervisor.py")))
serve(load_settings(home), launcher=LocalLauncher(home / "work", devices=("cpu",), command=supervisor))
