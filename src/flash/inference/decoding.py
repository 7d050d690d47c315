"""How a model advances a batch of rows by one token: prefill, step, retire. Owns the key-value cache.

Two decoders with one face. `RowDecoder` reads the weights of Qwen3- and Llama-layout models itself, and lets
rows join and leave at any step. `CacheDecoder` drives
any causal model through its own forward and cache, with prompts padded on the left. Neither samples,
stops or knows a request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812  (the field's usual name)
from torch import Tensor, nn

from flash.errors import ModelError
from flash.inference.copied_layers import Weights, copied, copied_head, decode_step, prefill
from flash.inference.scripting import scripted

_PREFILL_TOKENS = 8192  # padded prompt tokens in one prefill forward; bounds its activations
_GROWTH = 128  # columns by which a full cache grows
_KEPT_BYTES = 64 << 20  # of a cache that stays for the next batch: fresh memory costs as much as a few tokens
_MOST_COPIED = 20_000_000  # parameters of a model whose adapted weights are copied for each batch


class Decoder(Protocol):
    joinable: bool  # may rows be admitted while others are decoding?
    forks_cheaply: bool  # else `fork` moves the whole cache

    @property
    def rows(self) -> int: ...

    def admit(self, prompts: Sequence[Sequence[int]], repeats: Sequence[int], *, room: int = 0) -> Tensor:
        """Prefills each prompt once and appends `repeats[i]` rows for it; logits [new rows, V] of its end.

        `room`: how many rows there may be once some were forked.
        """

    def step(self, tokens_B: Tensor) -> Tensor:
        """Appends one token to each row; logits [rows, V] after it."""

    def fork(self, rows_F: Tensor) -> None:
        """Appends a copy of each of these rows."""

    def keep(self, rows_K: Tensor) -> None:
        """Drops all rows but those given (ascending indices)."""

    def clear(self) -> None: ...


def build_decoder(model: nn.Module) -> Decoder:
    """The fast decoder where the model's layout is known and its logits agree, else the general one."""
    if row_layout(model):
        decoder = RowDecoder(model)
        if _agrees(model, decoder):
            return decoder
    check_rows_stay_apart(model)
    return CacheDecoder(model)


def row_layout(model: nn.Module) -> bool:
    config: Any = model.config
    if config.model_type not in ("qwen3", "llama"):
        return False
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return False
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("rope_type", "default") not in ("dynamic", "longrope")


def _agrees(model: nn.Module, decoder: Decoder) -> bool:
    def ours(tokens_T: Tensor) -> Tensor:
        rows = [decoder.admit([tokens_T[:-2].tolist()], [1])]
        return torch.cat([*rows, *(decoder.step(token_1) for token_1 in tokens_T[-2:].split(1))])

    try:
        return agrees(model, ours)
    finally:
        decoder.clear()


def agrees(model: nn.Module, ours: Callable[[Tensor], Tensor]) -> bool:
    """Gives `ours` the logits of the model's own forward on a short made-up sequence?

    `ours` prefills all but the last two tokens and steps through those: logits [3, V].
    """
    vocab = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    device = next(model.parameters()).device
    tokens_T = torch.tensor([(7 * i + 3) % vocab for i in range(9)], device=device)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            full_T_V = model(tokens_T[None], use_cache=False).logits[0].float()
            ours_3_V = ours(tokens_T).float()
    finally:
        model.train(training)
    scale = full_T_V[6:].abs().max().clamp(min=1.0)
    tolerance = 1e-4 if full_T_V.dtype == next(model.parameters()).dtype else 5e-2
    return bool((full_T_V[6:] - ours_3_V).abs().max() <= tolerance * scale)


def check_rows_stay_apart(model: nn.Module) -> None:
    """Rows that `CacheDecoder` decodes together come out as each does alone, on two short made-up sequences.

    Raises ModelError where they don't: padding, or another row's state, has got into one.
    """
    vocab = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    device = next(model.parameters()).device
    rows = [[(7 * i + 3) % vocab for i in range(11)], [(5 * i + 11) % vocab for i in range(6)]]
    decoder = CacheDecoder(model)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            decoder.admit([row[:-2] for row in rows], [1, 2])
            decoder.step(torch.tensor([rows[0][-2], rows[1][-2], rows[1][-2]], device=device))
            decoder.keep(torch.tensor([0, 2], device=device))
            together = decoder.step(torch.tensor([row[-1] for row in rows], device=device)).float()
            alone = [model(torch.tensor([row], device=device), use_cache=False).logits[0, -1].float() for row in rows]
    finally:
        decoder.clear()
        model.train(training)
    # as a share of their size: in narrow numbers rounding alone may send a token to another expert
    gap = max(float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in zip(together, alone, strict=True))
    if not gap <= (1e-3 if next(model.parameters()).dtype == torch.float32 else 0.1):
        raise ModelError(
            f"{type(model).__name__}: rows that are decoded together affect each other (logits differ by {gap:.2g} of "
            "their size)",
            remedy="update transformers and its kernels, or choose another model",
        )


def _chunks(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of the prompts, shortest first, in chunks whose padded size stays under the prefill budget."""
    chunks: list[list[int]] = []
    for index in sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i)):
        if chunks and (len(chunks[-1]) + 1) * len(prompts[index]) <= _PREFILL_TOKENS:
            chunks[-1].append(index)
        else:
            chunks.append([index])
    return chunks


class RowDecoder:
    """Decodes Qwen3- and Llama-layout models straight from their modules, with no per-layer framework cost.

    Keys and values lie in one tensor a layer, [rows, kv heads, columns, head dim]. All rows end at the same
    column, so a step writes one column for all; row b begins at column `starts[b]`, wherever it was admitted.
    """

    joinable = True
    forks_cheaply = True

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._body: Any = model.model
        config: Any = model.config
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._copies = _may_be_copied(model)
        self._layers = [] if self._copies else _layers_of(model)
        self._copied: list[Weights] = []  # made anew for every batch, with the adapter that it wears
        self._head = torch.zeros(0)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._starts_B = torch.zeros(0, dtype=torch.long)
        self._column = 0  # the first free one
        self._hidden_BK_1_T: Tensor | None = None  # -inf where a row has not begun yet, 0 elsewhere
        self._rotations = Rotations(self._body, self._head_dim)

    @property
    def rows(self) -> int:
        return int(self._starts_B.shape[0])

    def clear(self) -> None:
        self._copied = []
        if sum(tensor.nbytes for tensor in (*self._keys, *self._values)) > _KEPT_BYTES:
            self._keys, self._values = [], []
        self._starts_B = self._starts_B[:0]
        self._column = 0
        self._hidden_BK_1_T = None

    def admit(self, prompts: Sequence[Sequence[int]], repeats: Sequence[int], *, room: int = 0) -> Tensor:
        device = self._body.embed_tokens.weight.device
        if self._copies and not self._copied:
            self._copied = [copied(layer) for layer in self._body.layers]
            self._head = copied_head(self._model)
        lengths_P = torch.tensor([len(prompt) for prompt in prompts], device=device)
        owner_N = torch.repeat_interleave(torch.tensor(list(repeats))).to(device)
        first = self.rows
        self._open_columns(int(lengths_P.max()))
        self._starts_B = torch.cat([self._starts_B.to(device), self._column - lengths_P[owner_N]])
        self._reserve(max(self.rows, room), self._column + 1)
        for tensor in (*self._keys, *self._values):
            _blank(tensor[first : self.rows, :, : self._column])
        logits: dict[int, Tensor] = {}
        for chunk in _chunks(prompts):
            width = len(prompts[chunk[-1]])
            padded = [[*prompts[i], *[0] * (width - len(prompts[i]))] for i in chunk]
            rows_of = [(owner_N == i).nonzero().squeeze(1) + first for i in chunk]
            ended = self._prefill(torch.tensor(padded, device=device), lengths_P[chunk], rows_of)
            logits.update(zip(chunk, ended, strict=True))
        return torch.stack([logits[i] for i in range(len(prompts))])[owner_N]

    def _prefill(self, tokens_P_T: Tensor, lengths_P: Tensor, rows_of: list[Tensor]) -> Tensor:
        """Runs prompts padded on the right (causal attention keeps the padding out), files their keys and
        values into their rows, and returns the logits [P, V] at their ends."""
        P, T = tokens_P_T.shape
        cos, sin = self._rotations.at(torch.arange(T, device=tokens_P_T.device), T)
        rows_N = torch.cat(rows_of)
        source_N = torch.repeat_interleave(torch.tensor([len(rows) for rows in rows_of])).to(rows_N.device)
        # the prompts' tokens, moved to the right end of a window of T columns
        place_N_T = torch.arange(T, device=rows_N.device) - (T - lengths_P[source_N])[:, None]
        place_N_T = place_N_T.clamp_(min=0)
        window = slice(self._column - T, self._column)
        x = self._body.embed_tokens(tokens_P_T)
        if self._copied:
            return prefill(
                x, cos, sin, self._heads, rows_N, source_N, place_N_T, window.start, lengths_P - 1, self._keys,
                self._values, self._copied, self._head,
            )  # fmt: skip
        groups = self._heads // self._kv_heads
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            q, k, v = self._heads_of(layer, layer.attention_norm(x), cos, sin)  # [P, T, heads, d]
            keys[rows_N, :, window] = k[source_N[:, None], place_N_T].transpose(1, 2)
            values[rows_N, :, window] = v[source_N[:, None], place_N_T].transpose(1, 2)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            if groups > 1:
                k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layer.out(attended.transpose(1, 2).reshape(P, T, -1))
            x = x + layer.mlp(layer.mlp_norm(x))
        ended_P_H = x[torch.arange(P, device=x.device), lengths_P - 1]
        return self._model.lm_head(self._body.norm(ended_P_H))

    def step(self, tokens_B: Tensor) -> Tensor:
        B, K, column = self.rows, self._kv_heads, self._column
        self._reserve(B, column + 1)
        hidden_BK_1_C = self._hidden_columns()
        scale = self._head_dim**-0.5
        x = self._body.embed_tokens(tokens_B)
        self._column += 1
        if self._copied:
            return decode_step(
                x, self._starts_B, hidden_BK_1_C, column, *self._rotations.table(column + 1), self._heads, scale,
                self._keys, self._values, self._copied, self._head,
            )  # fmt: skip
        cos, sin = self._rotations.at(column - self._starts_B, column + 1)
        hidden_BK_1_T = hidden_BK_1_C[:, :, : column + 1]
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            q, k, v = self._heads_of(layer, layer.attention_norm(x), cos, sin)  # [B, heads, d]
            keys[:B, :, column] = k
            values[:B, :, column] = v
            keys_BK_T_D = keys.view(-1, keys.shape[2], self._head_dim)[: B * K, : column + 1]
            values_BK_T_D = values.view(-1, values.shape[2], self._head_dim)[: B * K, : column + 1]
            grouped = q.reshape(B * K, -1, self._head_dim)  # the queries that share a kv head
            scores = torch.baddbmm(hidden_BK_1_T, grouped, keys_BK_T_D.transpose(1, 2), alpha=scale)
            weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(x.dtype)
            attended = torch.bmm(weights, values_BK_T_D)
            x = x + layer.out(attended.view(B, -1))
            x = x + layer.mlp(layer.mlp_norm(x))
        return self._model.lm_head(self._body.norm(x))

    def fork(self, rows_F: Tensor) -> None:
        before, K = self.rows, self._kv_heads
        self._reserve(before + len(rows_F), self._column)
        _copy_rows([*self._keys, *self._values], rows_F, before, self._column)
        self._starts_B = torch.cat([self._starts_B, self._starts_B[rows_F]])
        if self._hidden_BK_1_T is not None:
            hidden_B_K_T = self._hidden_BK_1_T.view(before, K, -1)
            self._hidden_BK_1_T = torch.cat([hidden_B_K_T, hidden_B_K_T[rows_F]]).view(-1, 1, hidden_B_K_T.shape[2])

    def keep(self, rows_K: Tensor) -> None:
        kept = int(rows_K.shape[0])
        starts = self._starts_B[rows_K]
        unused = int(starts.min()) if kept else self._column
        for cache in (self._keys, self._values):
            for tensor in cache:
                # indexing copies first, so source and destination may overlap
                tensor[:kept, :, : self._column - unused] = tensor[rows_K, :, unused : self._column]
        self._starts_B = starts - unused
        self._column -= unused
        self._hidden_BK_1_T = None

    def _open_columns(self, longest: int) -> None:
        """Moves what is there to the right, if a prompt needs more columns than lie before the current one."""
        missing = longest - self._column
        if missing > 0:
            rows, before = self.rows, self._column
            self._column = longest
            self._starts_B = self._starts_B + missing
            self._reserve(rows, longest)
            for cache in (self._keys, self._values) if rows else ():
                for tensor in cache:
                    tensor[:rows, :, missing:longest] = tensor[:rows, :, :before].clone()
                    _blank(tensor[:rows, :, :missing])
        self._hidden_BK_1_T = None

    def _hidden_columns(self) -> Tensor:
        """What to add to the scores [rows * kv heads, 1, capacity] so that no row sees what is not its own."""
        if self._hidden_BK_1_T is None:
            capacity = self._keys[0].shape[2]
            before_B_T = torch.arange(capacity, device=self._starts_B.device) < self._starts_B[:, None]
            bias_B_T = torch.zeros(before_B_T.shape, dtype=self._keys[0].dtype, device=before_B_T.device)
            bias_B_T.masked_fill_(before_B_T, float("-inf"))
            self._hidden_BK_1_T = bias_B_T.repeat_interleave(self._kv_heads, dim=0)[:, None]
        return self._hidden_BK_1_T

    def _heads_of(self, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [..., heads, head dim], normed where the layout says so, and rotated."""
        qkv = layer.qkv(x).view(*x.shape[:-1], -1, self._head_dim)
        qk, v = qkv.split([self._heads + self._kv_heads, self._kv_heads], dim=-2)
        qk = rotated(layer.qk_norm(qk, self._heads), cos, sin)
        return qk[..., : self._heads, :], qk[..., self._heads :, :], v

    def _reserve(self, rows: int, columns: int) -> None:
        """Makes room for that many rows and columns, moving what is there."""
        have = self._keys[0].shape if self._keys else (0, 0, 0, 0)
        if rows <= have[0] and columns <= have[2]:
            return
        rows = max(rows, have[0])
        columns = max(-(-columns // _GROWTH) * _GROWTH, have[2])
        weight = self._body.embed_tokens.weight
        shape = (rows, self._kv_heads, columns, self._head_dim)
        for name in ("_keys", "_values"):
            old: list[Tensor] = getattr(self, name)
            fresh = [torch.empty(shape, dtype=weight.dtype, device=weight.device) for _ in self._body.layers]
            for new, before in zip(fresh, old, strict=False):
                new[: have[0], :, : have[2]] = before
            setattr(self, name, fresh)
        self._hidden_BK_1_T = None


def _blank(columns: Tensor) -> None:
    """A hidden column takes part in scores and weighted values all the same, as 0 times its content: so that must be
    a number."""
    columns.zero_()


@scripted
def _copy_rows(caches: list[Tensor], rows_F: Tensor, first: int, columns: int) -> None:
    """Files the first `columns` of these rows once more, from row `first` on."""
    for cache in caches:
        cache[first : first + rows_F.size(0), :, :columns] = cache[:, :, :columns].index_select(0, rows_F)


class Rotations:
    """Rotary position embeddings from a table that grows with the longest row."""

    def __init__(self, body: Any, head_dim: int) -> None:
        self._body = body
        self._half = head_dim // 2
        self._angles: tuple[Tensor, Tensor] | None = None  # cos, sin by position

    def at(self, positions: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin [positions, 1, head dim]; all positions are below `longest`."""
        cos, sin = self.table(longest)
        return cos[positions], sin[positions]

    def table(self, longest: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin of all positions below `longest`, and some more: [positions, 1, head dim]."""
        if self._angles is None or self._angles[0].shape[0] < longest:
            size = longest + 4 * _GROWTH
            x = self._body.embed_tokens.weight[:1, :1]
            cos, sin = self._body.rotary_emb(x, torch.arange(size, device=x.device)[None])
            # the half turn's sign, once for all
            sin = torch.cat((-sin[0, :, : self._half], sin[0, :, self._half :]), dim=-1)
            self._angles = (cos[0, :, None, :].contiguous(), sin[:, None, :])
        return self._angles


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries and keys [..., heads, head dim], turned by what `Rotations.at` gave."""
    half = heads.shape[-1] // 2
    turned = torch.cat((heads[..., half:], heads[..., :half]), dim=-1)
    return (heads * cos).addcmul_(turned, sin)


def _layers_of(model: Any) -> list[_Layer]:
    return [_Layer(layer) for layer in model.model.layers]


def _may_be_copied(model: Any) -> bool:
    weights = sum(weight.numel() for weight in model.parameters())
    silu = getattr(model.config, "hidden_act", None) == "silu"
    return model.dtype == torch.float32 and weights <= _MOST_COPIED and silu


class _Layer:
    """One transformer layer's parts, as modules: a LoRA layer in place of a linear takes part as in the trainer's
    forward."""

    def __init__(self, layer: Any) -> None:
        self._attention = layer.self_attn
        self.attention_norm = layer.input_layernorm
        self.mlp_norm = layer.post_attention_layernorm
        self.out = layer.self_attn.o_proj
        self.mlp = layer.mlp

    def qkv(self, x: Tensor) -> Tensor:
        """Queries, keys and values side by side."""
        attention = self._attention
        return torch.cat((attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)), dim=-1)

    def qk_norm(self, qk: Tensor, heads: int) -> Tensor:
        """Norms queries [..., :heads, d] and keys [..., heads:, d] where the layout does."""
        attention = self._attention
        if not hasattr(attention, "q_norm"):
            return qk
        return torch.cat((attention.q_norm(qk[..., :heads, :]), attention.k_norm(qk[..., heads:, :])), dim=-2)


class CacheDecoder:
    """Decodes any causal model of transformers through its forward and its own cache.

    Prompts are padded on the left: a hybrid's recurrent state must end at the last real token. Rows join
    only when no other is decoding.
    """

    joinable = False
    forks_cheaply = False

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._cache: Any = None
        self._mask_B_T = torch.zeros(0, 0, dtype=torch.long)

    @property
    def rows(self) -> int:
        return int(self._mask_B_T.shape[0])

    def clear(self) -> None:
        self._cache = None
        self._mask_B_T = self._mask_B_T[:0]

    def admit(self, prompts: Sequence[Sequence[int]], repeats: Sequence[int], *, room: int = 0) -> Tensor:
        if self.rows:
            raise RuntimeError("CacheDecoder.admit: rows are still decoding; keep none of them first")
        from transformers import DynamicCache

        device = next(self._model.parameters()).device
        width = max(len(prompt) for prompt in prompts)
        tokens_P_T = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask_P_T = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        positions_P_T = (mask_P_T.cumsum(dim=1) - 1).clamp(min=0)
        self._cache = DynamicCache(config=self._model.config)
        logits_P_V = self._forward(tokens_P_T, mask_P_T, positions_P_T)
        owner_N = torch.repeat_interleave(torch.tensor(list(repeats))).to(device)
        self._cache.reorder_cache(owner_N)
        self._mask_B_T = mask_P_T[owner_N]
        return logits_P_V[owner_N]

    def step(self, tokens_B: Tensor) -> Tensor:
        positions_B_1 = self._mask_B_T.sum(dim=1, keepdim=True)
        self._mask_B_T = F.pad(self._mask_B_T, (0, 1), value=1)
        return self._forward(tokens_B[:, None], self._mask_B_T, positions_B_1)

    def fork(self, rows_F: Tensor) -> None:
        order = torch.cat([torch.arange(self.rows, device=rows_F.device), rows_F])
        self._cache.reorder_cache(order)
        self._mask_B_T = self._mask_B_T[order]

    def keep(self, rows_K: Tensor) -> None:
        self._mask_B_T = self._mask_B_T[rows_K]
        if rows_K.shape[0]:
            self._cache.reorder_cache(rows_K)
        else:
            self._cache = None

    def _forward(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        output = self._model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]
