"""The reward of both sides of `quality`: 1 where the answer is the row's, else 0. Knows nothing of either side."""


def reward(text: str, gold: str) -> float:
    """`text` is a whole completion: its answer is what follows a trace, if there is one."""
    return float(text.rpartition("</think>")[2].strip() == gold)
