"""What `flash train --cost` says: computed here, from the config, the catalog and reference prices alone.

Asks no server and no machine, so that one config gives one answer everywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flash.catalog.catalog import ModelEntry, load_catalog
from flash.catalog.cost import CostEstimate, Dataset, plan
from flash.catalog.hardware import HardwareClass, gpu_classes, laptop
from flash.config.load import LoadedConfig
from flash.config.recipes import resolve
from flash.config.run import RunSpec
from flash.environments.sizes import split_size

LAPTOP_MODELS = 50_000_000  # parameters up to which training on a laptop is worth planning


def cost_document(loaded: LoadedConfig, folder: Path, seed: int) -> dict[str, Any]:
    """`{state, model, algorithm, estimate, alternatives, warnings}`.

    `folder` is the config's: an environment that lies there tells how many rows there are. Raises InvalidInput,
    with the key to lower, when the run fits no class.
    """
    catalog = load_catalog()
    spec = resolve(loaded.config, seed=seed, catalog=catalog)
    entry = catalog.get(spec.model)
    dataset, assumed = local_dataset(spec, entry, folder)
    if spec.train.init_from_adapter and "train.lora_rank" in spec.defaulted:
        assumed.append(f"the adapter has rank {spec.train.lora_rank} (the source's own is not known here)")
    chosen, others = plan(spec, entry, planning_classes(entry), dataset)
    document = chosen.document()
    document["assumptions"] = [*assumed, *document["assumptions"]]
    return {
        "state": "cost",
        "model": spec.model,
        "algorithm": spec.algorithm,
        "estimate": document,
        "alternatives": [_brief(each) for each in others],
        "warnings": loaded.warnings,
    }


def planning_classes(entry: ModelEntry) -> list[HardwareClass]:
    """The reference GPUs; for the smallest models a laptop's processor too."""
    gpus = [gpu.hardware for gpu in gpu_classes()]
    return [laptop(), *gpus] if entry.params <= LAPTOP_MODELS else gpus


def local_dataset(spec: RunSpec, entry: ModelEntry, folder: Path) -> tuple[Dataset | None, list[str]]:
    """The rows of the environment beside the config, if one is there, and the words that say so."""
    if not (folder / "environment.py").is_file():
        return None, []
    found = split_size(folder, spec.environment.params)
    if found is None:
        return None, []
    characters = found.input + (found.output if spec.algorithm == "sft" else 0.0)
    source = f"the dataset is {found.file} beside the config: {found.rows:,} rows"
    return Dataset.of_text(entry, found.rows, characters), [source]


def _brief(estimate: CostEstimate) -> dict[str, Any]:
    document = estimate.document()
    names = ("hardware", "usd_per_hour", "memory_bytes", "hardware_memory_bytes", "seconds_per_step", "wall_clock_s")
    return {name: document[name] for name in (*names, "usd")}
