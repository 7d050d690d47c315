"""How the next token is drawn, and when a completion ends. Owns temperature, top-p, randomness and stops.

Pure functions over logits and texts. Knows no model, no cache and no batch: a draw depends on the
request's seed, the sample's index and the token's position alone, so it is the same in any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flash.inference.engine import Sampling, Scored
from flash.inference.scripting import scripted

Decode = Callable[[Sequence[int]], str]

_AHEAD = 16  # positions whose numbers are drawn together
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection on 64-bit words."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def stream_key(*parts: int) -> int:
    """A 64-bit key for a stream of draws, from any integers (run seed, step, prompt, sample, ...)."""
    key = 0
    for part in parts:
        key = _mix((key + _GOLDEN + (part & _MASK)) & _MASK)
    return key


def uniforms(keys: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers in [0, 1): draw `positions[..., i]` of the stream `keys[i]`. Counter-based: no state."""
    x = keys + (positions + np.uint64(1)) * np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    drawn: NDArray[np.float64] = (x >> np.uint64(11)).astype(np.float64) * (1.0 / (1 << 53))
    return drawn


@dataclass(frozen=True)
class Knobs:
    """How each row of a batch is sampled; None is the common case, for which nothing is computed."""

    drawn: bool  # False: all rows are greedy
    temperature_B_1: Tensor | None = None  # None: 1 for all
    greedy_B_1: Tensor | None = None  # None: none is
    top_p_B_1: Tensor | None = None  # None: 1 for all
    tempered_B_1: Tensor | None = None  # rows whose log-probs are wanted under the tempered distribution

    @property
    def plain(self) -> bool:
        """Every row is drawn at temperature 1 from all tokens."""
        knobs = (self.temperature_B_1, self.greedy_B_1, self.top_p_B_1, self.tempered_B_1)
        return self.drawn and all(knob is None for knob in knobs)

    @classmethod
    def of(cls, samplings: Sequence[Sampling], device: torch.device) -> Knobs:
        def column(values: list[Any]) -> Tensor:
            return torch.tensor(values, device=device)[:, None]

        temperatures = [sampling.temperature for sampling in samplings]
        greedy = [temperature == 0 for temperature in temperatures]
        if all(greedy):
            return cls(drawn=False)
        plain = all(temperature in (0, 1) for temperature in temperatures)
        nucleus = any(sampling.top_p < 1 for sampling in samplings)
        tempered = not plain and any(sampling.tempered_logprobs for sampling in samplings)
        return cls(
            drawn=True,
            temperature_B_1=None if plain else column([temperature or 1.0 for temperature in temperatures]),
            greedy_B_1=column(greedy) if any(greedy) else None,
            top_p_B_1=column([sampling.top_p for sampling in samplings]) if nucleus else None,
            tempered_B_1=column([sampling.tempered_logprobs for sampling in samplings]) if tempered else None,
        )


def choose(
    logits_B_V: Tensor, knobs: Knobs, u_B_1: Tensor | None, banned_B_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draws one token a row: (tokens_B, logprobs_B), log-probs in fp32.

    `u_B_1` (fp64, uniform) picks from the cumulative distribution, so equal draws give equal tokens. Tokens
    `banned` are never drawn; the log-probs are those of the model all the same.
    """
    if knobs.plain and u_B_1 is not None and banned_B_V is None:
        return _choose_plainly(logits_B_V, u_B_1)
    logprobs_B_V = torch.log_softmax(logits_B_V.float(), dim=-1)
    if banned_B_V is not None:
        logits_B_V = logits_B_V.masked_fill(banned_B_V, float("-inf"))
    if u_B_1 is None or not knobs.drawn:
        tokens_B_1 = logits_B_V.argmax(dim=-1, keepdim=True)
        return tokens_B_1.squeeze(1), logprobs_B_V.gather(1, tokens_B_1).squeeze(1)
    scaled_B_V = logprobs_B_V
    if banned_B_V is not None:
        scaled_B_V = torch.log_softmax(logits_B_V.float(), dim=-1)
    if knobs.temperature_B_1 is not None:
        scaled_B_V = torch.log_softmax(scaled_B_V / knobs.temperature_B_1, dim=-1)
    probs_B_V = scaled_B_V.exp()
    if knobs.top_p_B_1 is not None:
        probs_B_V = _nucleus(probs_B_V, knobs.top_p_B_1)
    cumulative_B_V = probs_B_V.cumsum(dim=-1, dtype=torch.float64)
    # right=True: the first token whose cumulative mass exceeds the draw, never one of zero probability
    tokens_B_1 = torch.searchsorted(cumulative_B_V, u_B_1 * cumulative_B_V[:, -1:], right=True)
    tokens_B_1 = tokens_B_1.clamp_(max=probs_B_V.shape[1] - 1)
    if knobs.greedy_B_1 is not None:
        tokens_B_1 = torch.where(knobs.greedy_B_1, logits_B_V.argmax(dim=-1, keepdim=True), tokens_B_1)
    chosen_B_1 = logprobs_B_V.gather(1, tokens_B_1)
    if knobs.tempered_B_1 is not None:
        chosen_B_1 = torch.where(knobs.tempered_B_1, scaled_B_V.gather(1, tokens_B_1), chosen_B_1)
    return tokens_B_1.squeeze(1), chosen_B_1.squeeze(1)


@scripted
def _choose_plainly(logits_B_V: Tensor, u_B_1: Tensor) -> tuple[Tensor, Tensor]:
    """`choose` with nothing but draws at temperature 1."""
    logprobs_B_V = torch.log_softmax(logits_B_V.float(), dim=-1)
    cumulative_B_V = logprobs_B_V.exp().cumsum(dim=-1, dtype=torch.float64)
    tokens_B_1 = torch.searchsorted(cumulative_B_V, u_B_1 * cumulative_B_V[:, -1:], right=True)
    tokens_B_1 = tokens_B_1.clamp_(max=logits_B_V.shape[1] - 1)
    return tokens_B_1.squeeze(1), logprobs_B_V.gather(1, tokens_B_1).squeeze(1)


class Draws:
    """Draws the next token of each row of a batch, again and again until its rows change."""

    def __init__(self, rows: Sequence[tuple[Sampling, int, int]], device: torch.device) -> None:
        """Each row as (sampling, stream key, tokens drawn already)."""
        self._device = device
        self._knobs = Knobs.of([sampling for sampling, _, _ in rows], device)
        self._keys = np.array([key for _, key, _ in rows], dtype=np.uint64)
        self._drawn = np.array([drawn for _, _, drawn in rows], dtype=np.uint64)
        self._ahead: list[Tensor] = []  # the next positions' uniforms [B, 1], nearest last

    def next(self, logits_B_V: Tensor, banned_B_V: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(tokens_B, logprobs_B); see `choose`."""
        u_B_1 = None
        if self._knobs.drawn:
            u_B_1 = (self._ahead or self._look_ahead()).pop()
        return choose(logits_B_V, self._knobs, u_B_1, banned_B_V)

    def _look_ahead(self) -> list[Tensor]:
        positions = self._drawn + np.arange(_AHEAD, dtype=np.uint64)[:, None]
        u_P_B_1 = torch.from_numpy(uniforms(self._keys, positions)).to(self._device)[:, :, None]
        self._drawn += np.uint64(_AHEAD)
        self._ahead = list(u_P_B_1.flip(0))
        return self._ahead


def likeliest(logits_N_V: Tensor, count: int) -> list[tuple[tuple[int, float], ...]]:
    """For each row the `count` likeliest tokens with their fp32 log-probs, best first."""
    best = torch.log_softmax(logits_N_V.float(), dim=-1).topk(min(count, logits_N_V.shape[1]), dim=-1)
    return [
        tuple(zip(tokens, logprobs, strict=True))
        for tokens, logprobs in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def score(logits_N_V: Tensor, tokens: Sequence[int], top: int) -> list[Scored]:
    """How likely each token was after the logits of its row, with the `top` likeliest ones beside it."""
    tokens_N_1 = torch.tensor(tokens, dtype=torch.long, device=logits_N_V.device)[:, None]
    own = torch.log_softmax(logits_N_V.float(), dim=-1).gather(1, tokens_N_1).squeeze(1).tolist()
    tops = likeliest(logits_N_V, top) if top else [()] * len(own)
    return [Scored(*each) for each in zip(tokens, own, tops, strict=True)]


def _nucleus(probs_B_V: Tensor, top_p_B_1: Tensor) -> Tensor:
    """Zeroes all but the smallest set of most likely tokens whose mass reaches top-p (at least one)."""
    sorted_B_V, order_B_V = probs_B_V.sort(dim=-1, descending=True, stable=True)
    before_B_V = sorted_B_V.cumsum(dim=-1) - sorted_B_V
    kept_B_V = sorted_B_V.masked_fill(before_B_V >= top_p_B_1, 0.0)
    return torch.zeros_like(probs_B_V).scatter_(1, order_B_V, kept_B_V)


class StopMatcher:
    """Tells whether a completion's newest token completes one of the stop sequences in its text.

    Matching is on decoded text, so a stop may begin and end inside tokens. Only the tail that a stop
    can reach is decoded, and only when the newest token could complete one.
    """

    def __init__(self, stops: Sequence[str], decode: Decode) -> None:
        self._stops = tuple(stops)
        self._decode = decode
        # every token is at least one byte, so a stop that the newest token completes starts in this window;
        # the margin keeps away from the window's edge, where decoders drop spaces or split characters
        self._window = max(len(stop.encode()) for stop in stops) + 4
        self._completes: dict[int, bool] = {}

    def completed(self, tokens: Sequence[int]) -> bool:
        """True if the last of `tokens` completed a stop (earlier ones are taken to be checked already)."""
        newest = tokens[-1]
        possible = self._completes.get(newest)
        if possible is None:
            possible = self._completes[newest] = self._can_complete(self._decode([newest]))
        if not possible:
            return False
        text = self._decode(tokens[-self._window :])
        return any(stop in text for stop in self._stops)

    def _can_complete(self, piece: str) -> bool:
        if not piece or "�" in piece:  # part of a character: only the decoded tail can tell
            return True
        piece = piece.lstrip(" ")  # some decoders drop the space a word opens with
        return any(
            stop in piece or any(piece.startswith(stop[i:].lstrip(" ")) for i in range(len(stop)))
            for stop in self._stops
        )
