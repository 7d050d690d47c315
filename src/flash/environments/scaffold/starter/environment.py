"""Support tickets to departments: a starter environment. Replace the task, keep the shape."""

from freesolo.datasets import TaskExample
from freesolo.environments import EnvironmentSingleTurn, RewardMetric, RewardResult

LABELS = ("billing", "bug", "account")
INSTRUCTION = "Which department? Answer billing, bug or account."


class TicketRouting(EnvironmentSingleTurn):
    """One ticket in, one label out. Rows are in dataset/train.jsonl; `output` is the gold label."""

    def build_prompt_messages(self, example: TaskExample, prompt_text: str) -> list[dict]:
        """What the model reads. (`prompt_text`, where a run has one, becomes the system message by itself.)"""
        return [{"role": "user", "content": f"{INSTRUCTION}\n{example.input}"}]

    def score_response(self, example: TaskExample, response_text: str) -> RewardResult:
        """1 for the gold label and nothing else; a little for naming it among other words; else 0."""
        answer = response_text.strip().lower().rstrip(".")
        named = [label for label in LABELS if label in answer]
        if answer == example.output:
            score = 1.0
        elif named == [example.output]:
            score = 0.2
        else:
            score = 0.0
        return RewardResult(
            score=score,
            success=score == 1.0,
            metrics=(RewardMetric(name="is_a_label", score=float(answer in LABELS)),),
        )


def load_environment() -> TicketRouting:
    """Called once by Flash, with `[environment.params]` as keyword arguments."""
    return TicketRouting()
