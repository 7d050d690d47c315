"""LoRA layers over a frozen base, the adapters they may wear, and PEFT's file format for them.

Owns which layers are adapted, an adapter's weights, the switch between adapters (one active at a
time, or none: the bare base) and `adapter_model.safetensors` + `adapter_config.json`. The base's weights
are never written to: no merging, since merging into bf16 and taking it out again drifts the base.
Knows nothing of optimisers, tokenizers or where adapters are stored.

Adapted are all linear layers of the language model and, in a mixture of experts, the routed experts too. Those
are two stacks of matrices, no linear layers; each expert's update has the rank divided by the experts that work
on a token, so that a token meets about as much adapter as in a dense layer. The scale of the update is the same
everywhere: PEFT reads the experts' rank from `rank_pattern`, vLLM from the shapes and knows one scale only.
"""

from __future__ import annotations

import json
import math
import re
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
_STACKS = ("experts.gate_up_proj", "experts.down_proj")  # routed experts, in transformers' form
_EXCLUDED_LEAVES = frozenset({"gate", "router"})


class LoraPair(NamedTuple):
    """One layer's update: `scaling * B @ A`, with A (rank, in) and B (out, rank).

    For a stack of experts: A (experts, rank, in) and B (experts, out, rank).
    """

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

    def stored_shapes(self, shape: LoraShape) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of A and B in a file."""
        return (shape.rank, self.in_features), (self.out_features, shape.rank)

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


class ExpertStack:
    """One projection of all routed experts, as a place for an adapter's update; see `LoraExperts`."""

    def __init__(self, weight_E_O_I: Tensor) -> None:
        self.weight = weight_E_O_I
        self.experts, self.out_features, self.in_features = weight_E_O_I.shape
        self.pair: LoraPair | None = None

    def stored_shapes(self, shape: LoraShape) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of A and B in a file: all experts' side by side."""
        rows = shape.expert_rank * self.experts
        return (rows, self.in_features), (self.out_features, rows)


class LoraExperts(nn.Module):
    """The routed experts of a mixture, with the active adapter's update of each, where there is one.

    It shares the original module's parameters under the same names. Tokens are sorted by expert, so that each
    projection is one grouped matrix product over all experts, and one more for either factor of the update.
    """

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.gate_up_proj: nn.Parameter = experts.gate_up_proj  # (experts, 2 * ffn, hidden)
        self.down_proj: nn.Parameter = experts.down_proj  # (experts, hidden, ffn)
        self.act_fn = experts.act_fn
        self.train(experts.training)
        self.gate_up = ExpertStack(self.gate_up_proj)
        self.down = ExpertStack(self.down_proj)

    def forward(self, hidden_N_H: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, hidden) -> (tokens, hidden): the chosen experts' outputs, weighted and summed.

        `top_k_index` and `top_k_weights` (tokens, active experts) come from the router.
        """
        tokens, active = top_k_index.shape
        chosen_S = top_k_index.reshape(-1)
        order_S = chosen_S.argsort(stable=True)
        experts = torch.arange(self.gate_up.experts, device=chosen_S.device)
        ends_E = torch.searchsorted(chosen_S[order_S], experts, right=True).to(torch.int32)
        x_S_H = hidden_N_H[order_S // active]
        gate, up = _grouped(x_S_H, self.gate_up_proj, self.gate_up.pair, ends_E).chunk(2, dim=-1)
        # weighted here and not at the end: these rows are narrower, and are kept for the backward pass
        mixed_S_F = self.act_fn(gate) * up * top_k_weights.reshape(-1)[order_S, None]
        out_S_H = _grouped(mixed_S_F, self.down_proj, self.down.pair, ends_E)
        # back in the tokens' order and summed by shape: adding by index would not repeat itself on a GPU
        summed = out_S_H[order_S.argsort()].view(tokens, active, -1).sum(dim=1)
        return summed.to(hidden_N_H.dtype)


def _grouped(x_S_I: Tensor, weight_E_O_I: Tensor, pair: LoraPair | None, ends_E: Tensor) -> Tensor:
    """x @ W[e]^T for the rows of expert e, which end at `ends[e]`, plus the update's part."""
    out_S_O: Tensor = F.grouped_mm(x_S_I, weight_E_O_I.transpose(1, 2), offs=ends_E)
    if pair is None:
        return out_S_O
    A, B = pair.A.to(x_S_I.dtype), pair.B.to(x_S_I.dtype)
    if missing := -A.shape[1] % (16 // A.element_size()):
        # the product wants rows of whole 16 bytes; ranks of zeros add nothing
        A, B = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))
    low_S_R = F.grouped_mm(x_S_I, A.transpose(1, 2), offs=ends_E)
    return out_S_O.add(F.grouped_mm(low_S_R, B.transpose(1, 2), offs=ends_E), alpha=pair.scaling)


@dataclass(frozen=True)
class LoraShape:
    """What an adapter file says besides its weights. `use_rslora` scales by alpha / sqrt(rank).

    `expert_rank` is the rank of each routed expert's update, at the same scale as all others.
    """

    rank: int
    alpha: float
    use_rslora: bool = False
    expert_rank: int = 0  # 0: no experts are adapted

    @property
    def scaling(self) -> float:
        return self.alpha / self._norm(self.rank)

    def alpha_for(self, rank: int) -> float:
        """The alpha that gives an update of another rank the same scale."""
        return self.scaling * self._norm(rank)

    def _norm(self, rank: int) -> float:
        return math.sqrt(rank) if self.use_rslora else rank


@dataclass
class Adapter:
    """One adapter's weights, by the path of the layer or stack of experts they belong to, in the model's order."""

    shape: LoraShape
    pairs: dict[str, LoraPair] = field(default_factory=dict)

    def parameters(self) -> list[nn.Parameter]:
        return [weight for pair in self.pairs.values() for weight in (pair.A, pair.B)]

    def tensors(self) -> dict[str, Tensor]:
        """The weights under PEFT's names and in its shapes."""
        named: dict[str, Tensor] = {}
        for path, pair in self.pairs.items():
            A, B = pair.A.detach(), pair.B.detach()
            if A.dim() == 3:
                A, B = _as_stored(A, B)
            stem = _key_of(path)
            named[f"{stem}.lora_A.weight"], named[f"{stem}.lora_B.weight"] = A, B
        return named

    def target_modules(self) -> list[str]:
        return sorted({path.rsplit(".", 1)[-1] for path, pair in self.pairs.items() if pair.A.dim() == 2})

    def target_parameters(self) -> list[str]:
        """Stacks of experts as PEFT is told of them: "mlp.experts.down_proj"."""
        return sorted({_short(path) for path, pair in self.pairs.items() if pair.A.dim() == 3})


def _short(path: str) -> str:
    """A stack's path without the layer's number and what comes before it."""
    return re.sub(r"^.*\.\d+\.", "", path)


def _key_of(path: str) -> str:
    """What PEFT calls the layer: it wraps a module once for each adapted parameter, the first one innermost."""
    for name, key in ((".experts.gate_up_proj", ".experts.base_layer"), (".experts.down_proj", ".experts")):
        if path.endswith(name):
            return f"{_KEY_PREFIX}{path.removesuffix(name)}{key}"
    return f"{_KEY_PREFIX}{path}"


def _as_stored(A_E_R_I: Tensor, B_E_O_R: Tensor) -> tuple[Tensor, Tensor]:
    """PEFT's form of a stack's update: A (experts * rank, in), experts first; B (out, rank * experts), experts last."""
    return A_E_R_I.flatten(0, 1), B_E_O_R.permute(1, 2, 0).flatten(1)


def _from_stored(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """(experts, rank, in) and (experts, out, rank); contiguous."""
    A_E_R_I = A.view(experts, -1, A.shape[1])
    return A_E_R_I, B.view(len(B), -1, experts).permute(2, 0, 1).contiguous()


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


def adapted_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold routed experts as two stacks of matrices, by path: gate and up in one, and down."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
        if (
            path.endswith("experts")
            and isinstance(gate_up, nn.Parameter)
            and isinstance(down, nn.Parameter)
            and gate_up.shape == (len(down), 2 * down.shape[2], down.shape[1])
            and hasattr(module, "act_fn")
            and not any(name.endswith("bias") for name, _ in module.named_parameters())
            and not _EXCLUDED_PARTS.intersection(path.split("."))
        ):
            found[path] = module
    return found


class Adapters:
    """The adapters of one model, by name, and which of them is active.

    Creating it puts `LoraLinear` and `LoraExperts` in place of what is adapted and freezes the base. One thread
    at a time may use a model.
    """

    def __init__(self, model: nn.Module) -> None:
        linears = adapted_linears(model)
        if not linears:
            raise ModelError("the model has no linear layers that an adapter could be trained on")
        model.requires_grad_(False)
        self._layers: dict[str, LoraLinear | ExpertStack] = {}
        self._active_experts = 0  # of the routed experts, on one token; 0: there are none
        for path, linear in linears.items():
            layer = LoraLinear(linear)
            _replace(model, path, layer)
            self._layers[path] = layer
        for path, module in adapted_experts(model).items():
            experts = LoraExperts(module)
            _replace(model, path, experts)
            self._active_experts = _active_experts(model)
            self._layers[f"{path}.gate_up_proj"] = experts.gate_up
            self._layers[f"{path}.down_proj"] = experts.down
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
        shape = LoraShape(rank=rank, alpha=alpha, expert_rank=self._expert_rank(rank))
        generator = torch.Generator().manual_seed(seed)
        pairs: dict[str, LoraPair] = {}
        for path, layer in self._layers.items():
            shape_of_A, shape_of_B = layer.stored_shapes(shape)
            A = torch.empty(shape_of_A, dtype=torch.float32)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
            B = torch.zeros(shape_of_B, dtype=torch.float32)
            pairs[path] = _pair(layer, A, B, shape.scaling, trainable=True)
        return self._put(name, Adapter(shape, pairs))

    def load(
        self,
        name: str,
        folder: Path,
        *,
        trainable: bool = False,
        alpha: float | None = None,
        device: torch.device | None = None,
    ) -> Adapter:
        """Loads a PEFT adapter folder under `name`, in place of an adapter of that name.

        `alpha` replaces the folder's own, and with it the scale of the update. On another `device` than the model's
        an adapter can be kept, but not worn.

        Raises ModelError when the files are missing, broken, of an unsupported kind, or for another base.
        """
        shape, tensors = read_adapter(folder)
        if alpha is not None:
            shape = replace(shape, alpha=alpha)
        pairs: dict[str, LoraPair] = {}
        for path, layer in self._layers.items():
            stem = _key_of(path)
            A = tensors.pop(f"{stem}.lora_A.weight", None)
            B = tensors.pop(f"{stem}.lora_B.weight", None)
            if A is None or B is None:
                continue  # an adapter may leave layers out
            expected = layer.stored_shapes(shape)
            if (tuple(A.shape), tuple(B.shape)) != expected:
                raise ModelError(
                    f"the adapter in {folder.name!r} does not fit this base model: {path} has A "
                    f"{tuple(A.shape)} and B {tuple(B.shape)}, but {expected[0]} and {expected[1]} are needed"
                )
            # copied into aligned memory: matrix products of a mapped file's tensors differ in the last bits
            A, B = A.to(torch.float32, copy=True), B.to(torch.float32, copy=True)
            pairs[path] = _pair(layer, A, B, shape.scaling, trainable=trainable, device=device)
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
        if name != before:  # lanes ask for what is worn already, before every pass
            self._switch(name)
        try:
            yield
        finally:
            if self._active != before:
                self._switch(before if before in self._adapters else None)

    def _expert_rank(self, rank: int) -> int:
        return max(1, rank // self._active_experts) if self._active_experts else 0

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


def _active_experts(model: nn.Module) -> int:
    """How many routed experts work on one token."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "num_experts_per_tok", None) or 1)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _pair(
    layer: LoraLinear | ExpertStack,
    A: Tensor,
    B: Tensor,
    scaling: float,
    *,
    trainable: bool,
    device: torch.device | None = None,
) -> LoraPair:
    """The factors, given in a file's shapes, in the layer's own form and on its device, if no other is wanted."""
    if isinstance(layer, ExpertStack):
        A, B = _from_stored(A, B, layer.experts)
    device = device or layer.weight.device
    return LoraPair(nn.Parameter(A.to(device), trainable), nn.Parameter(B.to(device), trainable), scaling)


def save_adapter(adapter: Adapter, folder: Path, *, base_model: str, revision: str | None = None) -> None:
    """Writes the adapter's two files in PEFT's format. The same weights give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in adapter.tensors().items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    stacks, experts = adapter.target_parameters(), adapter.shape.expert_rank
    config: dict[str, Any] = {
        "alpha_pattern": {name: _whole(adapter.shape.alpha_for(experts)) for name in stacks},
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _whole(adapter.shape.alpha),
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter.shape.rank,
        "rank_pattern": dict.fromkeys(stacks, experts),
        "revision": revision,
        "target_modules": adapter.target_modules(),
        "target_parameters": stacks or None,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": adapter.shape.use_rslora,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


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
    for key in ("use_dora", "modules_to_save", "fan_in_fan_out", "layer_replication", "trainable_token_indices"):
        if config.get(key):
            raise ModelError(f"{folder.name!r} uses {key} = {config[key]!r}, which Flash does not support")
    if config.get("bias", "none") != "none":
        raise ModelError(f"{folder.name!r} trains biases (bias = {config['bias']!r}), which is not supported")
    try:
        shape = LoraShape(int(config["r"]), float(config["lora_alpha"]), bool(config.get("use_rslora")))
        shape = replace(shape, expert_rank=_expert_rank(folder, config, shape))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder / CONFIG_FILE} lacks a valid r and lora_alpha: {error}") from error
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except FileNotFoundError:
        raise ModelError(f"{folder} is not an adapter folder: it has no {WEIGHTS_FILE}") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS_FILE} can't be read: {error}") from error
    return shape, tensors


def _expert_rank(folder: Path, config: Mapping[str, Any], shape: LoraShape) -> int:
    """The rank of the routed experts' updates; 0 where there are none.

    Refuses all other ranks and scales that differ by layer.
    """
    stacks = sorted(config.get("target_parameters") or ())
    if unknown := [name for name in stacks if not name.endswith(_STACKS)]:
        raise ModelError(f"{folder.name!r} adapts the parameter {unknown[0]}, which Flash does not support")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for key, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not set(pattern) <= set(stacks):
            raise ModelError(f"{folder.name!r} uses {key} = {pattern!r}, which Flash does not support")
    found = {int(ranks.get(name, shape.rank)) for name in stacks}
    if len(found) > 1:
        raise ModelError(f"{folder.name!r} uses rank_pattern = {ranks!r}: experts of one rank only are supported")
    for name in stacks:
        if not math.isclose(alphas.get(name, shape.alpha), shape.alpha_for(*found), rel_tol=1e-6):
            raise ModelError(
                f"{folder.name!r} scales the update of {name} by another factor than that of its linear layers, "
                "which Flash does not support"
            )
    return found.pop() if found else 0
