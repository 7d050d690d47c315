"""A leaner forward pass for small fp32 models of the Qwen3 and Llama layouts.

It computes what the model's own forward computes, at less work for training: the last layer's output
projection and MLP run on trained positions only; positions that several rows share are computed once; and a layer is
a few scripted functions over copies of its weights with the adapter's update added (`lean_layers`). Adding in fp32
costs no precision worth naming; bf16 would, so bf16 bases keep their own forward. `lean_forward` returns None wherever
the result would not be the model's own.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812  (the field's usual name)
from torch import Tensor

from flash.inference.loading import BaseModel
from flash.training.batches import Sharing
from flash.training.lean_layers import after_attention, before_attention, last_norm

_MAX_PARAMETERS = 500_000_000  # the copies take as much memory as the adapted weights
_TOLERANCE = 1e-4


class Forward(Protocol):
    def __call__(self, tokens_B_T: Tensor, positions_N: Tensor, sharing: Sharing | None = None) -> Tensor:
        """Hidden states (N, H), after the last norm, at flat positions into B*T; right-padded rows.

        `sharing` may be made use of: it changes the work, never the result.
        """


def model_forward(base: BaseModel) -> Forward:
    """The model's own forward, whatever its layout."""

    def forward(tokens_B_T: Tensor, positions_N: Tensor, sharing: Sharing | None = None) -> Tensor:
        hidden_B_T_H = base.backbone(input_ids=tokens_B_T, use_cache=False).last_hidden_state
        return hidden_B_T_H.reshape(-1, hidden_B_T_H.shape[-1])[positions_N]

    return forward


def lone_rows_forward(base: BaseModel) -> Forward:
    """The model's own forward on one row at a time: slow, and right where rows of a batch would mix."""

    def forward(tokens_B_T: Tensor, positions_N: Tensor, sharing: Sharing | None = None) -> Tensor:
        rows = [base.backbone(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in tokens_B_T]
        return torch.cat(rows)[positions_N]

    return forward


def lean_forward(base: BaseModel) -> LeanForward | None:
    """The lean forward, if the layout is known and its numbers agree with the model's own here."""
    config = base.model.config
    if config.model_type not in ("qwen3", "llama") or config.hidden_act != "silu" or base.dtype != torch.float32:
        return None
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return None
    if sum(weight.numel() for weight in base.model.parameters()) > _MAX_PARAMETERS:
        return None
    lean = LeanForward(base.backbone)
    return lean if _agrees(lean, model_forward(base), base) else None


@torch.no_grad()
def _agrees(lean: Forward, own: Forward, base: BaseModel) -> bool:
    vocabulary = base.head.shape[0]
    tokens = torch.arange(3, 3 + 2 * 24, device=base.device).mul_(7).remainder_(vocabulary).view(2, 24)
    positions = torch.tensor([0, 5, 23, 30, 47], device=base.device)
    ours, theirs = lean(tokens, positions), own(tokens, positions)
    return bool((ours - theirs).abs().max() <= _TOLERANCE * theirs.abs().max().clamp(min=1.0))


class LeanForward:
    """`bare`: as if the model wore no adapter, whatever it wears."""

    def __init__(self, backbone: Any, *, bare: bool = False) -> None:
        self._backbone = backbone
        self._bare = bare

    def without_adapter(self) -> LeanForward:
        return LeanForward(self._backbone, bare=True)

    def __call__(self, tokens_B_T: Tensor, positions_N: Tensor, sharing: Sharing | None = None) -> Tensor:
        backbone = self._backbone
        rows, length = tokens_B_T.shape
        places = torch.arange(length, device=tokens_B_T.device)
        cos_1_T_D, sin_1_T_D = backbone.rotary_emb(backbone.embed_tokens.weight[:1, :1], places[None])
        rotation = cos_1_T_D[0, :, None], sin_1_T_D[0, :, None]
        tokens, needed_N, places_U = tokens_B_T.view(-1), positions_N, None
        if sharing is not None:
            tokens, places_U = tokens[sharing.computed_U], _places(sharing)
            rotation = rotation[0][sharing.computed_U % length], rotation[1][sharing.computed_U % length]
            needed_N = sharing.place_BT[positions_N]
        hidden = backbone.embed_tokens(tokens)
        last = backbone.layers[-1]
        for layer in backbone.layers:
            mixed = self._attention(layer, hidden, rows, length, rotation, sharing)
            if layer is last:
                mixed = mixed.index_select(0, needed_N if places_U is None else places_U[needed_N])
                hidden = hidden.index_select(0, needed_N)
            elif places_U is not None:
                mixed = mixed.index_select(0, places_U)
            hidden = after_attention(layer, hidden, mixed, bare=self._bare)
        return last_norm(backbone.norm, hidden)

    def _attention(
        self,
        layer: Any,
        x: Tensor,
        rows: int,
        length: int,
        rotation: tuple[Tensor, Tensor],
        sharing: Sharing | None,
    ) -> Tensor:
        """Causal attention of right-padded rows, before the output projection: (B*T, heads*D).

        `x` (U, H) holds the computed positions: all B*T of them without sharing. Where attention is split, the result
        holds the openings' positions and then the rows' own: (P*S + B*C, heads*D).
        """
        shape = [rows, length] if sharing is None else [len(x)]
        query, key, value = before_attention(layer, x, *rotation, shape, bare=self._bare)
        scale, grouped = layer.self_attn.scaling, query.shape[-2] != key.shape[-2]

        def attend(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None) -> Tensor:
            mixed = F.scaled_dot_product_attention(
                query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
                attn_mask=hidden, is_causal=hidden is None, scale=scale, enable_gqa=grouped,
            )
            return mixed.transpose(1, 2).flatten(0, 1).flatten(1)

        if sharing is None:
            return attend(query, key, value)
        # every row gets its own view of what it shares
        all_keys, all_values = (_rows_of(part, sharing.place_BT.view(rows, length)) for part in (key, value))
        if sharing.split is None:
            return attend(_rows_of(query, sharing.place_BT.view(rows, length)), all_keys, all_values)
        split = sharing.split
        opened = attend(*(_rows_of(part, split.openings_P_S) for part in (query, key, value)))
        own = attend(_rows_of(query, split.own_B_C), all_keys, all_values, split.hidden_B_1_C_T)
        return torch.cat([opened, own])


def _places(sharing: Sharing) -> Tensor:
    """Where in what `_attention` returns each of the computed positions stands."""
    return sharing.computed_U if sharing.split is None else sharing.split.place_U


def _rows_of(parts_U: Tensor, place_B_T: Tensor) -> Tensor:
    """(U, heads, D) laid out as (B, T, heads, D)."""
    return parts_U.index_select(0, place_B_T.reshape(-1)).view(*place_B_T.shape, *parts_U.shape[1:])
