"""What a bank's adapters add to a batch's outputs, in functions that run through without the interpreter.

Owns the two ways: rows of a batch, a token each, under any adapters; and runs of tokens, each under one. Which
adapter lies where is the bank's to know. A site is a group of linear layers that share an input, see `Site`.
"""
# ruff: noqa: UP045
# TorchScript reads the annotations themselves: no `from __future__ import annotations` here, and `Optional`.

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from flash.inference.scripting import scripted


class Part(NamedTuple):
    """Rows of a batch, a token each, whose adapters lie on one shelf, in tables by site."""

    rank: int
    downs: list[Tensor]  # (slots, in, layers * R)
    ups: list[Tensor]  # (slots, pieces, R, W)
    layer_of_piece: list[Tensor]
    rows_N: Optional[Tensor]  # None: all
    slots_N: Tensor
    # for each site index and offsets of the first factors' bags and of the second ones'; none: products are batched
    bags: list[Tensor]


class Run(NamedTuple):
    """Tokens `first` to `stop` of a batch, under the adapter in one slot of a shelf."""

    first: int
    stop: int
    slot: int
    rank: int
    downs: list[Tensor]
    ups: list[Tensor]
    layer_of_piece: list[Tensor]


@scripted
def add_parts(parts: list[Part], out_B_O: Tensor, x_B_I: Tensor, site: int) -> None:
    """Adds to `out` (contiguous), in place, each row's update for its `x`."""
    for part in parts:
        rows_N = part.rows_N
        x_N_I = x_B_I if rows_N is None else x_B_I[rows_N]
        down, up, of_piece = part.downs[site], part.ups[site], part.layer_of_piece[site]
        N, C, R, W = x_N_I.size(0), up.size(1), up.size(2), up.size(3)
        summed = len(part.bags) > 0
        if summed:
            index, offsets = part.bags[4 * site], part.bags[4 * site + 1]
            table, weights = down.view(-1, down.size(2)), x_N_I.reshape(-1)
            low_N_GR = torch.embedding_bag(table, index, offsets, False, 0, False, weights)[0]
        else:
            low_N_GR = torch.bmm(x_N_I.unsqueeze(1), down[part.slots_N]).squeeze(1)
        low_N_C_R = low_N_GR.view(N, -1, R)
        if low_N_C_R.size(1) != C:
            low_N_C_R = low_N_C_R[:, of_piece]
        if summed:
            index, offsets = part.bags[4 * site + 2], part.bags[4 * site + 3]
            update = torch.embedding_bag(up.view(-1, W), index, offsets, False, 0, False, low_N_C_R.reshape(-1))[0]
        else:
            update = torch.bmm(low_N_C_R.reshape(-1, 1, R), up[part.slots_N].flatten(0, 1))
        update_N_O = update.view(N, -1)
        if rows_N is None:
            out_B_O.add_(update_N_O)
        else:
            out_B_O.index_add_(0, rows_N, update_N_O)


@scripted
def add_runs(runs: list[Run], out_N_O: Tensor, x_N_I: Tensor, site: int) -> None:
    """Adds to `out` (contiguous), in place, each token's update for its `x`."""
    for run in runs:
        out, x = out_N_O[run.first : run.stop], x_N_I[run.first : run.stop]
        up_C_R_W, of_piece = run.ups[site][run.slot], run.layer_of_piece[site]
        low_N_GR = x @ run.downs[site][run.slot]
        if up_C_R_W.size(0) == 1:
            out.addmm_(low_N_GR, up_C_R_W[0])
        else:
            low_N_C_R = low_N_GR.view(x.size(0), -1, run.rank)[:, of_piece]
            update_C_N_W = torch.bmm(low_N_C_R.transpose(0, 1), up_C_R_W)
            out.view(x.size(0), up_C_R_W.size(0), up_C_R_W.size(2)).add_(update_C_N_W.transpose(0, 1))
