"""LoRA layers over a frozen base, the adapters they may wear, and PEFT's file format for them.

Owns which linear layers are adapted, an adapter's weights, the switch between adapters (one active at a
time, or none: the bare base) and `adapter_model.safetensors` + `adapter_config.json`. The base's weights
are never written to: no merging, since merging into bf16 and taking it out again drifts the base.
Knows nothing of optimisers, tokenizers or where adapters are stored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812  (the field's usual name)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flash.errors import ModelError

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_KEY_PREFIX = "base_model.model."
# Parts of a module's path that are never adapted: the vision tower, multi-token-prediction heads, and
# routers (a linear named `gate`, in layouts that keep theirs as one).
_EXCLUDED_PARTS = frozenset(
    {"visual", "vision_tower", "vision_model", "multi_modal_projector", "mtp", "router"}
)
_EXCLUDED_LEAVES = frozenset({"gate", "router"})


class LoraPair(NamedTuple):
    """One layer's update: `scaling * B @ A`, with A (rank, in) and B (out, rank)."""

    A: nn.Parameter
    B: nn.Parameter
    scaling: float


class LoraLinear(nn.Linear):
    """A frozen linear layer that adds the active adapter's update, where there is one.

    It shares the original layer's parameters under the same names, so that the model's state dict stays
    the base's own; adapters live outside the module tree.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = cast(nn.Parameter, linear.weight)
        self.bias: Any = linear.bias  # None where the layer has none
        self.train(linear.training)
        self.pair: LoraPair | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the base's dtype."""
        out = F.linear(x, self.weight, self.bias)
        if self.pair is None:
            return out
        A: Tensor = self.pair.A
        B: Tensor = self.pair.B
        if x.dtype != A.dtype:  # the small matrices are cast, never the activations
            A, B = A.to(x.dtype), B.to(x.dtype)
        low = x.reshape(-1, self.in_features) @ A.t()
        flat = out.view(-1, self.out_features)
        return torch.addmm(flat, low, B.t(), alpha=self.pair.scaling).view(out.shape)


@dataclass(frozen=True)
class LoraShape:
    """What an adapter file says besides its weights. `use_rslora` scales by alpha / sqrt(rank)."""

    rank: int
    alpha: float
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass
class Adapter:
    """One adapter's weights, by the path of the layer they belong to, in the model's order."""

    shape: LoraShape
    pairs: dict[str, LoraPair] = field(default_factory=dict)

    def parameters(self) -> list[nn.Parameter]:
        return [weight for pair in self.pairs.values() for weight in (pair.A, pair.B)]

    def tensors(self) -> dict[str, Tensor]:
        """The weights under PEFT's names."""
        named: dict[str, Tensor] = {}
        for path, pair in self.pairs.items():
            named[f"{_KEY_PREFIX}{path}.lora_A.weight"] = pair.A.detach()
            named[f"{_KEY_PREFIX}{path}.lora_B.weight"] = pair.B.detach()
        return named

    def target_modules(self) -> list[str]:
        return sorted({path.rsplit(".", 1)[-1] for path in self.pairs})


def adapted_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer of the language model by path, in order; never the head, a router or vision."""
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    found: dict[str, nn.Linear] = {}
    for path, module in model.named_modules():
        parts = path.split(".")
        if (
            isinstance(module, nn.Linear)
            and module is not head
            and parts[-1] != "lm_head"
            and parts[-1] not in _EXCLUDED_LEAVES
            and not _EXCLUDED_PARTS.intersection(parts)
        ):
            found[path] = module
    return found


class Adapters:
    """The adapters of one model, by name, and which of them is active.

    Creating it puts `LoraLinear` in place of the model's linear layers and freezes the base. One thread
    at a time may use a model.
    """

    def __init__(self, model: nn.Module) -> None:
        linears = adapted_linears(model)
        if not linears:
            raise ModelError("the model has no linear layers that an adapter could be trained on")
        model.requires_grad_(False)
        self._layers: dict[str, LoraLinear] = {}
        for path, linear in linears.items():
            parent, _, leaf = path.rpartition(".")
            layer = LoraLinear(linear)
            setattr(model.get_submodule(parent), leaf, layer)
            self._layers[path] = layer
        self._adapters: dict[str, Adapter] = {}
        self._active: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._adapters)

    @property
    def active_name(self) -> str | None:
        return self._active

    def __getitem__(self, name: str) -> Adapter:
        try:
            return self._adapters[name]
        except KeyError:
            raise ModelError(f"no adapter named {name!r} is loaded") from None

    def create(self, name: str, *, rank: int, alpha: float, seed: int) -> Adapter:
        """A fresh trainable adapter: A Kaiming-uniform with a = sqrt(5) as in PEFT, B zero, both fp32.

        The numbers are drawn on the CPU in the layers' order, so a seed gives one adapter on any device.
        """
        shape = LoraShape(rank=rank, alpha=alpha)
        generator = torch.Generator().manual_seed(seed)
        pairs: dict[str, LoraPair] = {}
        for path, layer in self._layers.items():
            A = torch.empty(rank, layer.in_features, dtype=torch.float32)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
            B = torch.zeros(layer.out_features, rank, dtype=torch.float32)
            device = layer.weight.device
            pairs[path] = LoraPair(nn.Parameter(A.to(device)), nn.Parameter(B.to(device)), shape.scaling)
        return self._put(name, Adapter(shape, pairs))

    def load(
        self, name: str, folder: Path, *, trainable: bool = False, alpha: float | None = None
    ) -> Adapter:
        """Loads a PEFT adapter folder under `name`, in place of an adapter of that name.

        `alpha` replaces the folder's own, and with it the scale of the update.

        Raises ModelError when the files are missing, broken, of an unsupported kind, or for another base.
        """
        shape, tensors = read_adapter(folder)
        if alpha is not None:
            shape = replace(shape, alpha=alpha)
        pairs: dict[str, LoraPair] = {}
        for path, layer in self._layers.items():
            A = tensors.pop(f"{_KEY_PREFIX}{path}.lora_A.weight", None)
            B = tensors.pop(f"{_KEY_PREFIX}{path}.lora_B.weight", None)
            if A is None or B is None:
                continue  # an adapter may leave layers out
            expected = (shape.rank, layer.in_features), (layer.out_features, shape.rank)
            if (tuple(A.shape), tuple(B.shape)) != expected:
                raise ModelError(
                    f"the adapter in {folder.name!r} does not fit this base model: {path} has A "
                    f"{tuple(A.shape)} and B {tuple(B.shape)}, but {expected[0]} and {expected[1]} are needed"
                )
            device = layer.weight.device
            # copied into aligned memory: matrix products of a mapped file's tensors differ in the last bits
            pairs[path] = LoraPair(
                nn.Parameter(A.to(device, torch.float32, copy=True), requires_grad=trainable),
                nn.Parameter(B.to(device, torch.float32, copy=True), requires_grad=trainable),
                shape.scaling,
            )
        if tensors or not pairs:
            stray = next(iter(tensors), "no weights at all")
            raise ModelError(
                f"the adapter in {folder.name!r} was made for another base model: it holds {stray}, "
                f"which this model has no layer for"
            )
        return self._put(name, Adapter(shape, pairs))

    def remove(self, name: str) -> None:
        if self._active == name:
            self._switch(None)
        self._adapters.pop(name, None)

    @contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """Inside, the model wears the named adapter (None: the bare base); afterwards what it wore before."""
        before = self._active
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before if before in self._adapters else None)

    def _put(self, name: str, adapter: Adapter) -> Adapter:
        self._adapters[name] = adapter
        if self._active == name:
            self._switch(name)
        return adapter

    def _switch(self, name: str | None) -> None:
        pairs: Mapping[str, LoraPair] = {} if name is None else self[name].pairs
        for path, layer in self._layers.items():
            layer.pair = pairs.get(path)
        self._active = name


def save_adapter(adapter: Adapter, folder: Path, *, base_model: str, revision: str | None = None) -> None:
    """Writes the adapter's two files in PEFT's format. The same weights give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in adapter.tensors().items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config: dict[str, Any] = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(adapter.shape.alpha) if adapter.shape.alpha == int(adapter.shape.alpha)
        else adapter.shape.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter.shape.rank,
        "revision": revision,
        "target_modules": adapter.target_modules(),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": adapter.shape.use_rslora,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} is not an adapter folder: it has no {CONFIG_FILE}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / CONFIG_FILE} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder / CONFIG_FILE} holds no JSON object")
    return config


def read_adapter(folder: Path) -> tuple[LoraShape, dict[str, Tensor]]:
    """An adapter folder's shape and CPU tensors; refuses what plain LoRA can't express."""
    config = read_adapter_config(folder)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder.name!r} holds a {config.get('peft_type')} adapter; only LORA is supported")
    for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters",
                "fan_in_fan_out", "layer_replication", "trainable_token_indices"):
        if config.get(key):
            raise ModelError(f"{folder.name!r} uses {key} = {config[key]!r}, which Flash does not support")
    if config.get("bias", "none") != "none":
        raise ModelError(f"{folder.name!r} trains biases (bias = {config['bias']!r}), which is not supported")
    try:
        shape = LoraShape(int(config["r"]), float(config["lora_alpha"]), bool(config.get("use_rslora")))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder / CONFIG_FILE} lacks a valid r and lora_alpha: {error}") from error
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except FileNotFoundError:
        raise ModelError(f"{folder} is not an adapter folder: it has no {WEIGHTS_FILE}") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS_FILE} can't be read: {error}") from error
    return shape, tensors
