"""TorchEngine on tiny random models: its tokens and log-probs are the model's own."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flash.errors import InvalidInput, ModelError
from flash.inference.decoding import CacheDecoder, RowDecoder, build_decoder
from flash.inference.engine import Completion, Request, Sampling
from flash.inference.loading import BaseModel
from flash.inference.lora import Adapters, save_adapter
from flash.inference.torch_engine import TorchEngine

VOCAB = 260
END = 259
SIZES: dict[str, Any] = dict(  # noqa: C408
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=True,
    initializer_range=0.3,
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<a>", "<b>", "<pad>", "<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")


def tiny(layout: str, *, stop_ids: tuple[int, ...] = (END,)) -> BaseModel:
    torch.manual_seed(3)
    if layout == "qwen3":
        model: Any = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=2, head_dim=16, **SIZES))
    elif layout == "llama":
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, head_dim=16, **SIZES))
    else:
        kinds = ["linear_attention", "full_attention"]
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(
            num_hidden_layers=2, layer_types=kinds, head_dim=16, linear_key_head_dim=8, linear_value_head_dim=8,
            linear_num_key_heads=2, linear_num_value_heads=4, pad_token_id=None, bos_token_id=None,
            eos_token_id=None, **SIZES,
        ))  # fmt: skip
    model.eval()
    return BaseModel(
        name=layout,
        revision=None,
        model=model,
        tokenizer=byte_tokenizer(),
        adapters=Adapters(model),
        stop_ids=stop_ids,
        pad_id=258,
        context_length=256,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def noisy_adapter(base: BaseModel, name: str = "policy", seed: int = 1) -> None:
    """An adapter whose B is not zero, so that wearing it shows."""
    adapter = base.adapters.create(name, rank=4, alpha=8, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for pair in adapter.pairs.values():
        pair.B.data.normal_(0, 0.2, generator=generator)


def prompts(*lengths: int) -> list[tuple[int, ...]]:
    return [tuple((11 * i + 7 * j + 5) % 256 for j in range(length)) for i, length in enumerate(lengths)]


def own_logprobs(base: BaseModel, adapter: str | None, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> Any:
    with base.adapters.active(adapter), torch.no_grad():
        logits = base.model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]


@pytest.mark.parametrize("layout", ["qwen3", "llama", "qwen3.5"])
def test_greedy_tokens_are_those_of_transformers_generate(layout: str) -> None:
    base = tiny(layout)
    noisy_adapter(base)
    requests = [Request(p, Sampling(20, temperature=0.0), adapter="policy") for p in prompts(3, 11, 1, 7)]
    ours = TorchEngine(base).generate(requests)
    for request, [completion] in zip(requests, ours, strict=True):
        with base.adapters.active("policy"), torch.no_grad():
            theirs = base.model.generate(
                torch.tensor([request.prompt]),
                max_new_tokens=20,
                do_sample=False,
                eos_token_id=END,
                pad_token_id=258,
            )[0, len(request.prompt) :].tolist()
        assert list(completion.tokens) == theirs
        assert completion.finish_reason == ("stop" if theirs[-1] == END else "length")


@pytest.mark.parametrize("layout", ["qwen3", "llama", "qwen3.5"])
def test_logprobs_are_the_models_own_untempered_ones(layout: str) -> None:
    base = tiny(layout)
    noisy_adapter(base)
    requests = [
        Request(p, Sampling(12, temperature=1.7, top_p=0.9, seed=i), n=3, adapter=adapter)
        for i, p in enumerate(prompts(5, 9, 2))
        for adapter in ("policy", None)
    ]
    for request, group in zip(requests, TorchEngine(base).generate(requests), strict=True):
        for completion in group:
            expected = own_logprobs(base, request.adapter, request.prompt, completion.tokens)
            assert torch.allclose(torch.tensor(completion.logprobs).double(), expected, atol=1e-5)


def test_tempered_logprobs_are_those_of_the_distribution_drawn_from() -> None:
    base = tiny("qwen3")
    sampling = Sampling(6, temperature=0.6, seed=2, tempered_logprobs=True)
    mixed = [Request(prompts(5)[0], sampling), Request(prompts(5)[0], replace(sampling, tempered_logprobs=False))]
    [tempered], [plain] = TorchEngine(base).generate(mixed)
    assert tempered.tokens == plain.tokens
    with torch.no_grad():
        logits = base.model(torch.tensor([[*mixed[0].prompt, *tempered.tokens]])).logits[0, 4:-1]
    expected = (logits / 0.6).log_softmax(-1).gather(1, torch.tensor(tempered.tokens)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(tempered.logprobs), expected, atol=1e-5)
    assert tempered.logprobs != plain.logprobs


def test_layouts_get_their_decoder() -> None:
    assert isinstance(build_decoder(tiny("qwen3").model), RowDecoder)
    assert isinstance(build_decoder(tiny("llama").model), RowDecoder)
    assert isinstance(build_decoder(tiny("qwen3.5").model), CacheDecoder)


def test_a_model_that_departs_from_its_layout_falls_back() -> None:
    base = tiny("qwen3")
    base.model.model.layers[0].post_attention_layernorm.register_forward_hook(lambda m, i, out: out)
    assert isinstance(build_decoder(base.model), RowDecoder)
    base.model.model.register_forward_pre_hook(  # the model's own forward now differs from its modules'
        lambda m, args, kwargs: (args, {**kwargs, "input_ids": kwargs["input_ids"].clamp(min=20)}),
        with_kwargs=True,
    )
    assert isinstance(build_decoder(base.model), CacheDecoder)


@pytest.mark.parametrize("layout", ["qwen3", "qwen3.5"])
def test_a_sample_depends_on_its_request_alone(layout: str) -> None:
    base = tiny(layout)
    wanted = Request(prompts(6)[0], Sampling(10, seed=42), n=4)
    others = [Request(p, Sampling(15, temperature=0.5, seed=i)) for i, p in enumerate(prompts(3, 12, 8))]
    alone = TorchEngine(base).generate([wanted])[0]
    among = TorchEngine(base).generate([*others, wanted])[-1]
    squeezed = TorchEngine(base, max_rows=2).generate([*others, wanted])[-1]
    assert [c.tokens for c in alone] == [c.tokens for c in among] == [c.tokens for c in squeezed]
    assert len({c.tokens for c in alone}) == 4
    other_seed = TorchEngine(base).generate([Request(wanted.prompt, Sampling(10, seed=43), n=4)])[0]
    assert not {c.tokens for c in alone} & {c.tokens for c in other_seed}


def test_samples_are_one_row_until_they_differ() -> None:
    base = tiny("qwen3", stop_ids=())
    noisy_adapter(base)
    requests = [
        Request(p, Sampling(12, temperature=0.2, seed=i), n=6, adapter="policy") for i, p in enumerate(prompts(5, 9, 2))
    ]
    alone = TorchEngine(base, max_rows=1).generate(requests)
    engine = TorchEngine(base)
    engine.generate(requests[:1])  # its decoder has been checked now
    stepped = [0]

    def count(module: Any, args: Any, output: Any) -> None:
        stepped[0] += len(args[0]) if args[0].dim() == 1 else 0  # else prompts

    base.model.model.embed_tokens.register_forward_hook(count)
    together = engine.generate(requests)
    pairs = [(a, b) for ones, others in zip(alone, together, strict=True) for a, b in zip(ones, others, strict=True)]
    assert all(a.tokens == b.tokens for a, b in pairs)
    assert all(torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5) for a, b in pairs)
    begun = {(i, c.tokens[:end]) for i, group in enumerate(together) for c in group for end in range(1, 12)}
    assert stepped[0] == len(begun) < 0.8 * len(pairs) * 11


@pytest.mark.parametrize("layout", ["qwen3", "qwen3.5"])
def test_a_forked_row_goes_its_own_way(layout: str) -> None:
    base = tiny(layout)
    decoder = build_decoder(base.model)
    first, second = prompts(7, 4)

    def step(*tokens: int) -> torch.Tensor:
        return decoder.step(torch.tensor(tokens))

    with torch.inference_mode():
        decoder.admit([first, second], [1, 1])
        step(3, 4)
        decoder.fork(torch.tensor([1, 0, 1]))
        step(5, 6, 7, 8, 9)
        decoder.keep(torch.tensor([1, 2, 4]))
        found = step(10, 11, 12)
        whole = [[*second, 4, 6, 10], [*second, 4, 7, 11], [*second, 4, 9, 12]]
        own = torch.cat([base.model(torch.tensor([row])).logits[:, -1] for row in whole])
    assert torch.allclose(found, own, atol=1e-4)


def test_the_same_call_gives_the_same_bits() -> None:
    base = tiny("qwen3")
    noisy_adapter(base)
    requests = [Request(p, Sampling(9, seed=i), n=5, adapter="policy") for i, p in enumerate(prompts(4, 6))]
    assert TorchEngine(base).generate(requests) == TorchEngine(base).generate(requests)


def test_samples_follow_the_distribution() -> None:
    base = tiny("qwen3")
    request = Request(prompts(5)[0], Sampling(1, temperature=0.7, seed=5), n=4000)
    drawn = torch.bincount(
        torch.tensor([c.tokens[0] for c in TorchEngine(base, max_rows=4000).generate([request])[0]]),
        minlength=VOCAB,
    )
    with torch.no_grad():
        logits = base.model(torch.tensor([request.prompt])).logits[0, -1]
    expected = (logits / 0.7).softmax(-1) * 4000
    likely = expected > 5
    chi_squared = ((drawn - expected) ** 2 / expected)[likely].sum()
    assert chi_squared < likely.sum() + 4 * (2 * likely.sum()) ** 0.5


def test_top_p_keeps_the_smallest_likely_set() -> None:
    base = tiny("qwen3")
    request = Request(prompts(5)[0], Sampling(1, top_p=0.5, seed=5), n=500)
    drawn = {c.tokens[0] for c in TorchEngine(base).generate([request])[0]}
    with torch.no_grad():
        probs, order = base.model(torch.tensor([request.prompt])).logits[0, -1].softmax(-1).sort(descending=True)
    size = int((probs.cumsum(0) < 0.5).sum()) + 1
    assert drawn <= set(order[:size].tolist())
    assert len(drawn) > 1


def test_stop_ids_and_limits_end_a_completion() -> None:
    base = tiny("qwen3")
    request = Request(prompts(4)[0], Sampling(30, seed=1), n=8)
    free = TorchEngine(base, ignore_stop_ids=True).generate([request])[0]
    assert {c.finish_reason for c in free} == {"length"} and {len(c.tokens) for c in free} == {30}
    stop = free[0].tokens[4]
    stopped = TorchEngine(tiny("qwen3", stop_ids=(stop, END))).generate([request])[0]
    for whole, cut in zip(free, stopped, strict=True):
        ends = [i for i, token in enumerate(whole.tokens) if token in (stop, END)]
        assert cut.tokens == (whole.tokens[: ends[0] + 1] if ends else whole.tokens)
        assert cut.finish_reason == ("stop" if ends else "length")


def test_a_stop_sequence_ends_at_the_token_that_completes_it() -> None:
    base = tiny("qwen3")
    tokenizer = base.tokenizer
    request = Request(prompts(4)[0], Sampling(40, seed=1), n=4)
    free = TorchEngine(base, ignore_stop_ids=True).generate([request])[0]
    text = tokenizer.decode(free[2].tokens[5:8])
    assert "�" not in text or text  # any text will do, broken characters too
    stop = tokenizer.decode(free[2].tokens[5:7])
    sampling = Sampling(40, seed=1, stop=("never there", stop))
    cut = TorchEngine(base, ignore_stop_ids=True).generate([Request(request.prompt, sampling, n=4)])[0]
    for whole, ended in zip(free, cut, strict=True):
        assert ended.tokens == whole.tokens[: len(ended.tokens)]
        assert (stop in tokenizer.decode(ended.tokens)) == (ended.finish_reason == "stop")
        assert stop not in tokenizer.decode(ended.tokens[:-1])
    assert cut[2].finish_reason == "stop"


def test_adapters_load_from_files_and_are_never_merged(tmp_path: Path) -> None:
    base = tiny("qwen3")
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    noisy_adapter(base, "trained")
    save_adapter(base.adapters["trained"], tmp_path, base_model="tiny")
    engine = TorchEngine(base)
    engine.load_adapter("loaded", tmp_path)
    greedy = Sampling(12, temperature=0.0)
    [trained], [loaded], [bare] = engine.generate(
        [Request(prompts(6)[0], greedy, adapter=name) for name in ("trained", "loaded", None)]
    )
    assert trained == loaded
    assert trained.logprobs != bare.logprobs
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    assert base.adapters.active_name is None
    engine.unload_adapter("loaded")
    with pytest.raises(ModelError, match="loaded"):
        engine.generate([Request((1,), greedy, adapter="loaded")])


def after_a_broken_adapter(base: BaseModel, rows: int) -> TorchEngine:
    """An engine whose cache of so many rows is full of what is not a number."""
    noisy_adapter(base)
    engine = TorchEngine(base, max_rows=rows)
    long = [Request(prompt, Sampling(24), adapter="policy") for prompt in prompts(*range(70, 70 + rows))]
    engine.generate(long)
    with torch.no_grad():
        for pair in base.adapters["policy"].pairs.values():
            pair.B.fill_(torch.nan)
    engine.generate(long)
    return engine


def greedy(prompt: tuple[int, ...], max_tokens: int, n: int = 1) -> Request:
    return Request(prompt, Sampling(max_tokens, temperature=0.0), n=n)


def test_a_row_that_joins_with_a_longer_prompt_meets_nothing_of_a_broken_adapter() -> None:
    base = tiny("qwen3")
    engine = after_a_broken_adapter(base, rows=2)
    first, second, long = prompts(4, 3, 50)
    requests = [greedy(first, 24), greedy(second, 4), greedy(long, 6)]
    assert engine.generate(requests) == TorchEngine(base, max_rows=2).generate(requests)


def test_rows_that_join_where_this_batch_had_none_meet_nothing_of_a_broken_adapter() -> None:
    base = tiny("qwen3")
    engine = after_a_broken_adapter(base, rows=4)
    group, long, *short = prompts(20, 20, 2, 3, 2)
    # the group's samples agree, so they are one row of the decoder; when they end, three prompts join
    requests = [greedy(group, 4, n=3), greedy(long, 24), *(greedy(prompt, 6) for prompt in short)]
    assert engine.generate(requests) == TorchEngine(base, max_rows=4).generate(requests)


def test_an_adapter_in_training_is_sampled_live() -> None:
    base = tiny("qwen3")
    noisy_adapter(base)
    engine = TorchEngine(base)
    request = Request(prompts(6)[0], Sampling(8, temperature=0.0), adapter="policy")
    [before] = engine.generate([request])[0]
    with torch.no_grad():
        for pair in base.adapters["policy"].pairs.values():
            pair.B.mul_(-1.5)
    [after] = engine.generate([request])[0]
    assert after.logprobs != before.logprobs
    expected = own_logprobs(base, "policy", request.prompt, after.tokens)
    assert torch.allclose(torch.tensor(after.logprobs).double(), expected, atol=1e-5)


@pytest.mark.parametrize("layout", ["qwen3", "qwen3.5"])
def test_streaming_gives_the_same_completions_token_by_token(layout: str) -> None:
    base = tiny(layout)
    requests = [Request(p, Sampling(10, seed=i), n=2) for i, p in enumerate(prompts(4, 7))]
    whole = TorchEngine(base).generate(requests)
    grown: dict[tuple[int, int], list[Any]] = {}
    for delta in TorchEngine(base).stream(requests):
        grown.setdefault((delta.request, delta.sample), []).append(delta)
    for (i, k), deltas in grown.items():
        completion = Completion(
            tuple(d.token for d in deltas), tuple(d.logprob for d in deltas), deltas[-1].finish_reason
        )
        assert completion == whole[i][k]
        assert all(d.finish_reason is None for d in deltas[:-1])


def test_watch_cancels_and_closing_a_stream_leaves_the_engine_ready() -> None:
    base = tiny("qwen3", stop_ids=())
    engine = TorchEngine(base, max_rows=3)
    asked = [0]

    def third_time() -> bool:
        asked[0] += 1
        return asked[0] == 3

    requests = [Request(p, Sampling(10, seed=i), n=2) for i, p in enumerate(prompts(4, 7))]
    cancelled = engine.generate(requests, watch=third_time)
    assert [[len(c.tokens) for c in group] for group in cancelled] == [[3, 3], [3, 0]]
    assert {c.finish_reason for group in cancelled for c in group} == {"cancelled"}
    stream = engine.stream(requests)
    next(stream)
    stream.close()
    assert engine.generate(requests) == TorchEngine(base, max_rows=3).generate(requests)


def test_the_model_is_left_as_it_was() -> None:
    base = tiny("qwen3.5")
    noisy_adapter(base)
    base.model.train()
    with base.adapters.active("policy"):
        TorchEngine(base).generate([Request((1, 2), Sampling(3))])
        assert base.adapters.active_name == "policy"
    assert base.model.training
    base.model(torch.tensor([[1, 2, 3]])).logits.sum()  # no inference tensors stuck anywhere


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request((), Sampling(4)), "no tokens"),
        (Request((1,), Sampling(0)), "at least 1"),
        (Request((1,) * 250, Sampling(10)), "lower max_tokens to 6"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(request_: Request, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        TorchEngine(tiny("qwen3")).generate([request_])


def test_engines_do_not_disturb_a_copy_of_the_model() -> None:
    base = tiny("llama")
    twin = copy.deepcopy(base.model)
    TorchEngine(base).generate([Request(prompts(6)[0], Sampling(5, seed=1), n=2)])
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(base.model(tokens).logits, twin(tokens).logits)
