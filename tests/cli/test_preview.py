"""What `flash env check` shows of a row as it would be trained, and the faults it finds that way."""

from pathlib import Path

from typer.testing import CliRunner

from flash.cli.main import app

ENVIRONMENT = """
from freesolo.environments import EnvironmentSingleTurn, RewardResult

class Echo(EnvironmentSingleTurn):
    dataset = [{{"input": "say hi", "output": {output!r}}}]

    def build_prompt_messages(self, example, prompt_text):
        return [{{"role": "user", "content": example.input}}]

    def score_response(self, example, response_text):
        return RewardResult(score=float(response_text == str(example.output)))

def load_environment():
    return Echo()
"""


def check(tmp_path: Path, output: str, config: str = "") -> tuple[int, str]:
    folder = tmp_path / "echo"
    folder.mkdir()
    (folder / "environment.py").write_text(ENVIRONMENT.format(output=output))
    arguments = ["env", "check", str(folder)]
    if config:
        (tmp_path / "config.toml").write_text(f'model = "flash/nano"\n{config}')
        arguments += ["--config", str(tmp_path / "config.toml")]
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, done.output


def test_the_trained_part_is_marked(tmp_path: Path) -> None:
    status, shown = check(tmp_path, "hi")
    assert status == 0, shown
    assert "say hi<|im_end|>" in shown and "⟦hi<|im_end|>" in shown


def test_a_row_cut_before_its_answer_is_a_problem(tmp_path: Path) -> None:
    status, shown = check(tmp_path, "hi", '[environment]\nid = "local/echo"\n[train]\nmax_length = 12\n')
    assert status == 1
    assert "leaves nothing to train on" in shown and "raise train.max_length" in shown


def test_a_cut_answer_is_a_warning(tmp_path: Path) -> None:
    status, shown = check(tmp_path, "h" * 200, '[environment]\nid = "local/echo"\n[train]\nmax_length = 128\n')
    assert status == 0, shown
    assert "longer than 128 tokens" in shown
