"""Builds the tokenizer of `flash/nano`: byte-level BPE on the task corpus, ChatML, one digit a token.

Owns the vocabulary's layout. Merges are learned from questions and answers that the base split
generates; every byte is in the vocabulary, so any UTF-8 text survives a round trip.
"""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nano.tasks import Mixture, operand_pairs

CONTEXT_LENGTH = 4096
VOCABULARY_SIZE = 640
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Ordinary tokens, as in Qwen: decoding with special tokens skipped must keep them.
MARKUP_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def build_tokenizer(mixture: Mixture, *, corpus_size: int = 20_000) -> PreTrainedTokenizerFast:
    """Learn the merges and return the finished tokenizer. Deterministic: the corpus is seeded."""
    tokenizer = Tokenizer(models.BPE())
    # Digits and line breaks stand alone. Digits because place value is what arithmetic is about; line
    # breaks so that text after "<think>\n" never merges into the prompt and the prefix stays a prefix.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[0-9\n]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS) - len(MARKUP_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(mixture, corpus_size), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=CONTEXT_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE.read_text(encoding="utf-8")
    return fast


def _corpus(mixture: Mixture, size: int) -> list[str]:
    rng = random.Random(0)
    pairs = operand_pairs("base")
    texts = ["system\n", "user\n", "assistant\n"] * 1000
    texts += ["# Tools\nCall a tool like this:\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>"] * 50
    for _ in range(size):
        task = mixture.draw("base", rng, pairs)
        texts += [task.question, task.answer, task.trace]
    return texts
