"""`python benchmarks/run.py [NAME ...]`: runs the named benchmarks, or all of them."""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

BENCHMARKS = ("sft_cpu", "grpo_cpu", "serve_cpu", "checkpoint_stall", "waits", "growth", "curves", "levers", "quality")

if __name__ == "__main__":
    unknown = [name for name in sys.argv[1:] if name not in BENCHMARKS]
    if unknown:
        sys.exit(f"error: no benchmark is called {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    for name in sys.argv[1:] or BENCHMARKS:
        importlib.import_module(f"benchmarks.{name}").main()
