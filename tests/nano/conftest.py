"""The shipped `flash/nano`, loaded once, and the development package that makes it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import flash.catalog

REPOSITORY = Path(__file__).resolve().parents[2]
# `nano/` is development code at the root of the repository, so it is not installed.
sys.path.insert(0, str(REPOSITORY))


@pytest.fixture(scope="session")
def nano_folder() -> Path:
    """The model folder as the package ships it."""
    return Path(flash.catalog.__file__).parent / "nano"


@pytest.fixture(scope="session")
def tokenizer(nano_folder: Path) -> Any:
    """The shipped tokenizer, loaded as any Hugging Face user would."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(nano_folder)


@pytest.fixture(scope="session")
def model(nano_folder: Path) -> Any:
    """The shipped weights in fp32."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(nano_folder, dtype=torch.float32).eval()
