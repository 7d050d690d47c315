"""Scripted functions are scripted here, and give what their Python gives."""

from __future__ import annotations

import pytest
import torch

from flash.inference import adapter_updates, copied_layers, mixed_layers, sampling
from flash.inference.scripting import scripted
from flash.training import lean_layers


@pytest.mark.parametrize(
    "function",
    [
        adapter_updates.add_parts,
        adapter_updates.add_runs,
        copied_layers.decode_step,
        copied_layers.prefill,
        mixed_layers.step_rows,
        mixed_layers.take_runs,
        sampling._choose_plainly,
        lean_layers._before,
        lean_layers._before_backward,
        lean_layers._after,
        lean_layers._after_backward,
    ],
    ids=lambda function: function.name if isinstance(function, torch.jit.ScriptFunction) else function.__name__,
)
def test_torchscript_takes_it(function):
    assert isinstance(function, torch.jit.ScriptFunction)


def test_what_torchscript_refuses_runs_as_python():
    def unknown(text):
        return {letter: text.count(letter) for letter in sorted(set(text))}

    assert scripted(unknown) is unknown


def test_its_numbers_are_those_of_its_python():
    def drawn(logits_B_V: torch.Tensor, u_B_1: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(torch.softmax(logits_B_V, -1).cumsum(-1), u_B_1)

    generator = torch.Generator().manual_seed(0)
    for _ in range(4):  # TorchScript looks at the first calls before it settles
        logits_B_V = torch.randn(5, 640, generator=generator)
        u_B_1 = torch.rand(5, 1, generator=generator)
        assert torch.equal(scripted(drawn)(logits_B_V, u_B_1), drawn(logits_B_V, u_B_1))
        tokens_B, logprobs_B = sampling._choose_plainly(logits_B_V, u_B_1.double())
        probs_B_V = logits_B_V.softmax(-1).double()
        assert torch.equal(tokens_B, (probs_B_V.cumsum(-1) <= u_B_1.double()).sum(-1))
        assert torch.allclose(logprobs_B, logits_B_V.log_softmax(-1).gather(1, tokens_B[:, None])[:, 0])
