"""A worker's upload alone, in a process of its own: one checkpoint into the bucket, then the manifest's SHA-256."""

import json
import sys
from pathlib import Path

from flash.artifacts.manifests import write_checkpoint
from flash.artifacts.store import Store
from flash.errors import FlashError

job = json.loads(sys.stdin.read())
try:
    store = Store(job["url"], job["options"])
    _, sha256 = write_checkpoint(
        store, job["run_id"], job["step"], Path(job["folder"]), job["final"], {}, part_bytes=job["part_bytes"]
    )
    print(json.dumps({"sha256": sha256}))
except FlashError as error:
    print(json.dumps({"error": error.to_wire()}))
