"""The real supervisor with the scripted trainer."""

import sys
from pathlib import Path

from flash.worker.supervisor import main

main(trainer=(sys.executable, str(Path(__file__).with_name("scripted_trainer.py"))))
