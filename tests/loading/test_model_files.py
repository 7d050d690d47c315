"""What can be told of a model folder before it is read: no file, however odd, is more than one clear line."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from flash.errors import ModelError
from flash.inference.model_files import INDEX, WEIGHTS, check, damage, is_complete, is_safe

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=9), below, max_size=3),
    max_leaves=9,
)
OFFSETS = st.fixed_dictionaries({"data_offsets": JSON | st.lists(st.integers(-9, 99), min_size=2, max_size=2)})


def tensors(header: object, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


FILES = st.binary(max_size=60) | st.builds(
    tensors, JSON | st.dictionaries(st.text(max_size=5), OFFSETS | JSON, max_size=3), st.binary(max_size=60)
)


@settings(max_examples=200)
@given(weights=FILES, index=st.none() | JSON.map(json.dumps) | st.text(max_size=30), config=JSON.map(json.dumps))
def test_odd_files_are_named_and_never_a_traceback(weights, index, config):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / WEIGHTS).write_bytes(weights)
        (folder / "config.json").write_text(config)
        fault = damage(folder / WEIGHTS)
        assert is_complete(folder) == (fault is None)
        if index is not None:
            (folder / WEIGHTS).rename(folder / "other.safetensors")
            (folder / INDEX).write_text(index)
            is_complete(folder)
        try:
            check(folder, "my/model")
        except ModelError as error:
            assert str(error).startswith("my/model: ")


@given(size=st.integers(0, 500), cut=st.integers(1, 400))
def test_a_file_that_was_cut_anywhere_is_damaged(size, cut):
    whole = tensors({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}, bytes(size))
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / WEIGHTS
        path.write_bytes(whole)
        assert damage(path) is None
        path.write_bytes(whole[: max(0, len(whole) - cut)])
        assert damage(path) is not None
        path.write_bytes(whole + bytes(cut))
        assert damage(path) is not None


@given(name=st.text(st.sampled_from("ab./\\"), max_size=12))
def test_a_safe_name_stays_in_its_folder(name):
    if is_safe(name):
        root = Path("/cache/snapshot")
        assert (root / name).resolve().is_relative_to(root) and (root / name).resolve() != root
