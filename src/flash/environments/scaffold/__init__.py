"""The starter environment that `flash env setup` writes: a small task that works as it stands.

The files in `starter/` are the environment itself; `write_scaffold` copies them and adds the config.
"""

from __future__ import annotations

from pathlib import Path

from flash.config.reference import starter_toml
from flash.environments.package import slug
from flash.errors import InvalidInput

STARTER = Path(__file__).parent / "starter"
FILES = (
    "environment.py",
    "test_reward.py",
    "dataset/train.jsonl",
    "dataset/eval.jsonl",
    "README.md",
    "TRAINING.md",
)
CONFIG_FILE = "config.toml"


def write_scaffold(
    folder: str | Path, name: str | None = None, *, namespace: str = "local", force: bool = False
) -> tuple[str, ...]:
    """Writes the starter into `folder` and returns the names of its files.

    `name` is what the environment will be pushed as (default: the folder's own name). Files that are there
    already are an error unless `force`; nothing is written then.
    """
    folder = Path(folder)
    name = slug(folder.resolve().name if name is None else name)
    contents = {file: (STARTER / file).read_bytes() for file in FILES}
    contents[CONFIG_FILE] = starter_toml(f"{namespace}/{name}").encode()
    for file in ("README.md", "TRAINING.md"):
        text = contents[file].decode()
        contents[file] = text.replace("{{name}}", name).replace("{{namespace}}", namespace).encode()
    existing = [file for file in contents if (folder / file).exists()]
    if existing and not force:
        raise InvalidInput(f"{folder / existing[0]} is there already", remedy="choose an empty folder")
    for file, content in contents.items():
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return tuple(sorted(contents))
