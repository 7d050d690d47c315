"""Where rows come from, what they are reduced to, and what is refused with its place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flash.environments.loading import LocalEnvironment
from flash.environments.rows import example_from_row, read_file, write_rows
from flash.errors import InvalidInput, UserCodeError

Load = Callable[..., LocalEnvironment]

IN_CODE = """
    from freesolo.datasets import TaskExample, load_dataset
    from freesolo.environments import EnvironmentSingleTurn, RewardResult

    class Env(EnvironmentSingleTurn):
        def build_prompt_messages(self, example, prompt_text):
            return [{"role": "user", "content": f"{example.id}: {example.input} {type(example.output).__name__}"}]

        def score_response(self, example, response_text):
            return RewardResult(score=1.0)

    def load_environment(split="train", dataset_path=None):
        env = Env()
        env.dataset = DATASET
        return env
"""


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def written(environment: LocalEnvironment, split: str | None = None, limit: int = 0) -> list[dict[str, Any]]:
    rows = environment.rows(split, limit=limit)
    parsed = [json.loads(line) for line in Path(rows.path).read_text().splitlines()]
    assert len(parsed) == rows.count
    return parsed


# --- sources ----------------------------------------------------------------------------------------


def test_the_packaged_split_is_train_by_default(load: Load) -> None:
    environment = load({"dataset/train.jsonl": lines({"input": "a"}), "dataset/eval.json": '[{"input": "b"}]'})
    assert environment.info().splits == ("train", "eval")
    assert written(environment) == [{"input": "a"}]
    assert written(environment, "eval") == [{"input": "b"}]


def test_params_split_chooses_the_file(load: Load) -> None:
    files = {"dataset/train.jsonl": lines({"input": "a"}), "dataset/hard.jsonl": lines({"input": "b"})}
    environment = load(files, split="hard")
    assert environment.rows().split == "hard"
    assert written(environment) == [{"input": "b"}]


@pytest.mark.parametrize("code", ["", "in code"])
def test_a_requested_split_that_is_missing_is_an_error_never_train(load: Load, code: str) -> None:
    files = {"dataset/train.jsonl": lines({"input": "a"})}
    options = {"code": IN_CODE.replace("DATASET", '[{"input": "x"}]')} if code else {}
    with pytest.raises(InvalidInput, match=r"split 'test' is missing.*it has: train"):
        load(files, split="test", **options).rows()
    with pytest.raises(InvalidInput, match="split 'eval' is missing"):
        load(files, **options).rows("eval")


@pytest.mark.parametrize("split", ["../secret", "a/b", "..", ""])
def test_a_split_is_no_path(load: Load, split: str) -> None:
    with pytest.raises(InvalidInput, match="without folders"):
        load({"dataset/train.jsonl": lines({"input": "a"}), "secret.jsonl": lines({"input": "b"})}).rows(split)


def test_a_split_goes_to_the_factory_where_nothing_is_packaged(load: Load) -> None:
    environment = load(code=IN_CODE.replace("DATASET", '[{"input": split}]'), split="hard")
    assert written(environment) == [{"input": "hard"}]


@pytest.mark.parametrize(
    ("name", "content", "first"),
    [
        ("rows.jsonl", '{"input": "a"}\n\n"b"\n', {"input": "a"}),
        ("data/rows.json", '{"data": [{"input": "a"}]}', {"input": "a"}),
        ("rows.csv", 'input,output,extra\r\n"a\nb",c,d\r\n', {"input": "a\nb", "output": "c"}),
        ("rows.txt", "\n a \n\nb\n", {"input": "a"}),
        ("bom.jsonl", '\ufeff{"input": "a"}', {"input": "a"}),
    ],
)
def test_dataset_path_is_read_in_every_form(load: Load, name: str, content: str, first: dict[str, str]) -> None:
    environment = load({name: content, "dataset/train.jsonl": lines({"input": "not this"})}, dataset_path=name)
    assert written(environment)[0] == first


@pytest.mark.parametrize("path", ["missing.jsonl", "../outside.jsonl", "/etc/hostname"])
def test_dataset_path_stays_inside_the_package(load: Load, tmp_path: Path, path: str) -> None:
    (tmp_path / "outside.jsonl").write_text(lines({"input": "a"}))
    with pytest.raises(InvalidInput, match=r"dataset_path = .*no such file"):
        load({}, dataset_path=path).rows()


def test_a_dataset_path_that_only_the_factory_understands_is_left_to_it(load: Load) -> None:
    environment = load(code=IN_CODE.replace("DATASET", '[{"input": dataset_path}]'), dataset_path="hub:squad")
    assert written(environment) == [{"input": "hub:squad"}]


@pytest.mark.parametrize(
    "dataset",
    [
        '[TaskExample(record={}, input="a", output="b"), TaskExample(record={}, input="c")]',
        '[{"input": "a", "output": "b"}, {"input": "c"}]',
        'load_dataset([{"input": "a", "output": "b"}, {"input": "c"}])',
        '(record for record in [{"input": "a", "output": "b"}, "c"])',
    ],
)
def test_rows_built_in_code_take_the_sdk_s_forms(load: Load, dataset: str) -> None:
    assert written(load(code=IN_CODE.replace("DATASET", dataset))) == [{"input": "a", "output": "b"}, {"input": "c"}]


def test_a_dataset_that_is_a_path_is_read(load: Load) -> None:
    environment = load({"more.jsonl": lines({"input": "a"})}, code=IN_CODE.replace("DATASET", '"more.jsonl"'))
    assert written(environment) == [{"input": "a"}]


def test_examples_built_in_code_keep_their_objects(load: Load) -> None:
    environment = load(code=IN_CODE.replace("DATASET", '[TaskExample(record={}, input=" a", output={1, 2})]'))
    [start] = environment.start("train", [0], seed=0)
    assert start.messages[0]["content"] == "example_000000:  a set"
    assert written(environment) == [{"input": " a", "output": [1, 2]}]


def test_packaged_rows_win_over_code_with_a_warning_of_both_counts(load: Load) -> None:
    code = IN_CODE.replace("DATASET", '[{"input": "x"}] * 3')
    environment = load({"dataset/train.jsonl": lines({"input": "a"}, {"input": "b"})}, code=code)
    rows = environment.rows()
    assert rows.count == 2
    [warning] = rows.warnings
    assert "2 rows" in warning
    assert "3 rows" in warning


def test_code_that_has_read_the_same_file_is_no_conflict(load: Load) -> None:
    code = IN_CODE.replace("DATASET", 'load_dataset(__file__.replace("environment.py", "dataset/train.jsonl"))')
    environment = load({"dataset/train.jsonl": lines({"input": {"q": 1}, "output": "a"}, {"input": "b"})}, code=code)
    assert environment.rows().warnings == ()
    assert environment.rows(limit=1).warnings == ()


@pytest.mark.parametrize(
    ("dataset", "error"),
    [
        ("None", "no rows"),
        ("[]", "no rows"),
        ("7", "env.dataset is int"),
        ("[7]", r"env.dataset\[0\]: holds a number"),
        ('[{"output": "x"}]', r"env.dataset\[0\]: no `input`"),
    ],
)
def test_rows_that_code_gets_wrong(load: Load, dataset: str, error: str) -> None:
    with pytest.raises(InvalidInput, match=error):
        load(code=IN_CODE.replace("DATASET", dataset)).rows()


def test_a_generator_that_raises_is_the_user_s(load: Load) -> None:
    with pytest.raises(UserCodeError, match="ZeroDivisionError"):
        load(code=IN_CODE.replace("DATASET", "(1 / 0 for _ in [0])")).rows()


# --- reduction --------------------------------------------------------------------------------------


def test_rows_keep_input_output_and_metadata_and_one_warning_names_the_rest(load: Load) -> None:
    rows = [
        {"id": 1, "input": "a", "output": "b", "metadata": {"k": 1}, "answer": "x"},
        {"id": 2, "input": "c", "metadata": "text"},
    ]
    environment = load({"dataset/train.jsonl": lines(*rows)})
    assert written(environment) == [{"input": "a", "output": "b", "metadata": {"k": 1}}, {"input": "c"}]
    [warning] = environment.rows().warnings
    assert warning.startswith("dataset/train.jsonl: only input, output and metadata are kept")
    assert "answer (1 rows), id (2 rows), metadata (not an object) (1 rows)" in warning


def test_max_examples_keeps_the_head_and_reads_no_further(load: Load) -> None:
    environment = load({"dataset/train.jsonl": lines({"input": "a"}, {"input": "b"}) + "broken"})
    assert written(environment, limit=2) == [{"input": "a"}, {"input": "b"}]
    with pytest.raises(InvalidInput, match="line 3"):
        environment.rows(limit=3)


def test_object_inputs_become_text_as_in_the_sdk(load: Load) -> None:
    environment = load({"dataset/train.jsonl": lines({"input": {"b": 1, "a": [2]}})})
    [start] = environment.start("train", [0], seed=0)
    assert json.loads(start.messages[0]["content"]) == {"a": [2], "b": 1}


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("train.jsonl", '{"input": "a"}\n\n{"output": "b"}\n', "dataset/train.jsonl line 3: no `input`"),
        ("train.jsonl", '{"input": null}\n', "dataset/train.jsonl line 1: no `input`"),
        ("train.jsonl", '{"input": "a"}\n{"input": \n', "dataset/train.jsonl line 2: not JSON"),
        ("train.jsonl", "[1]\n", "dataset/train.jsonl line 1: holds an array"),
        ("train.jsonl", "[" * 100_000, "dataset/train.jsonl line 1: not JSON"),
        ("train.jsonl", b'{"input": "\xff"}\n', "dataset/train.jsonl line 1: not UTF-8"),
        ("train.jsonl", "\n\n", "dataset/train.jsonl: has no rows"),
        ("train.json", '[{"input": "a"}, {}]', "dataset/train.json item 2: no `input`"),
        ("train.json", '{"rows": []}', "dataset/train.json: holds an object"),
        ("train.json", "[\n1,\n", "dataset/train.json line 3: not JSON"),
        ("train.jsonl", '{"input": "a", "image": "data:image/png;base64,xx"}', "line 1: has an image"),
        ("train.jsonl", '{"input": "a", "images": [{"url": "x"}]}', "line 1: has an image"),
        ("train.jsonl", '{"input": [{"type": "image_url", "image_url": {"url": "x"}}]}', "line 1: has an image"),
    ],
)
def test_a_bad_row_is_refused_with_its_place(load: Load, file: str, content: str | bytes, error: str) -> None:
    with pytest.raises(InvalidInput, match=error) as caught:
        load({f"dataset/{file}": content}).rows()
    assert "\n" not in str(caught.value)


def test_a_key_called_image_that_names_a_container_is_only_dropped(load: Load) -> None:
    environment = load({"dataset/train.jsonl": lines({"input": "a", "image": "python:3.11"})})
    assert written(environment) == [{"input": "a"}]


def test_a_file_that_fails_leaves_no_half_written_rows(load: Load) -> None:
    environment = load({"dataset/train.jsonl": lines({"input": "a"}) + "broken"})
    with pytest.raises(InvalidInput):
        environment.rows()
    assert list(environment.work_dir.iterdir()) == []


def test_rows_are_read_back_by_index(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(lines(*({"input": f"ü{index}"} for index in range(50))))
    file = write_rows(read_file(source, "rows.jsonl"), tmp_path / "out.jsonl")
    assert [row["input"] for row in file.read([49, 0, 7, 7])] == ["ü49", "ü0", "ü7", "ü7"]
    assert example_from_row({"input": "a"}, 3).id == "example_000003"


def test_an_index_outside_the_split_is_an_error(load: Load) -> None:
    environment = load({"dataset/train.jsonl": lines({"input": "a"})})
    for index in (1, -1):
        with pytest.raises(InvalidInput, match="it has 1 rows"):
            environment.start("train", [index], seed=0)
