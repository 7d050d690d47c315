"""The few completions of a run that are kept for people to read: which ones, and what is said of each.

Owns the choice and the shape of a `sample` report. Knows nothing of where samples are stored or shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flash.errors import FlashError
from flash.training.advantages import group_advantages
from flash.training.rollouts import Episode, Group

EVERY = 10  # steps between them; the first and last step's are always kept
GROUPS = 3  # of a step
MOST_PIECES = 4096  # tokens of an episode that are told one by one
_BEFORE = 4  # tokens that a tokenizer is shown before a piece, so that it joins to what stands there
_LONGEST = 8  # tokens that may make up one character

Decode = Callable[[Sequence[int]], str]


def due(step: int, steps: int | None) -> bool:
    return step % EVERY == 0 or step in (1, steps)


def rollouts(groups: Sequence[Group], decode: Decode) -> Iterator[dict[str, Any]]:
    """Of each of the first groups: its first episode, its best and its worst; of a dropped one, the first and why."""
    for group in groups[:GROUPS]:
        if group.error is not None:
            yield _dropped(group, group.error, decode)
            continue
        advantages = group_advantages(group.rewards)
        for index in _worth_reading(group.rewards):
            yield _rollout(group, index, advantages[index], decode)


def _worth_reading(rewards: Sequence[float]) -> list[int]:
    best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
    return list(dict.fromkeys([0, best, worst])) if best != worst else [0]


def _rollout(group: Group, index: int, advantage: float, decode: Decode) -> dict[str, Any]:
    episode, score = group.episodes[index], group.scores[index]
    return {
        **_shared(group, episode, decode),
        "sample": index,
        "reward": score.reward,
        "rewards": group.rewards,
        "advantage": advantage,
        "success": score.success,
    }


def _dropped(group: Group, error: FlashError, decode: Decode) -> dict[str, Any]:
    return {**_shared(group, group.episodes[0], decode), "sample": 0, "reward": None, "error": str(error)}


def _shared(group: Group, episode: Episode, decode: Decode) -> dict[str, Any]:
    found = pieces(episode, decode)
    return {
        "kind": "rollout",
        "row": group.prompt.row,
        "messages": [*group.prompt.start.messages, *episode.messages[len(group.prompt.start.messages) :]],
        "text": decode(episode.tokens[episode.prompt_length :]),
        "truncated": episode.truncated,
        "tokens": episode.sampled_tokens,
        "turns": episode.turns,
        **({"pieces": found} if found else {}),
    }


def pieces(episode: Episode, decode: Decode) -> list[list[Any]] | None:
    """The episode after its prompt, piece by piece: `[text, log-probability]` where the policy drew it, `[text]`
    where the environment wrote it. None for one that is too long to be told like this.

    A piece is a token, or the few that make up one character; their log-probabilities add up.
    """
    begin, end = episode.prompt_length, len(episode.tokens)
    if end - begin > MOST_PIECES:
        return None
    found: list[list[Any]] = []
    while begin < end:
        shown = max(episode.prompt_length, begin - _BEFORE)
        before = decode(episode.tokens[shown:begin])
        stop = begin + 1
        while True:
            text = decode(episode.tokens[shown:stop])[len(before) :]
            whole = not text.endswith("\ufffd") or stop - begin >= _LONGEST
            if whole or stop == end or episode.sampled[stop] != episode.sampled[begin]:
                break
            stop += 1
        own = episode.sampled[begin]
        found.append([text, round(sum(episode.logprobs[begin:stop]), 3)] if own else [text])
        begin = stop
    return found
