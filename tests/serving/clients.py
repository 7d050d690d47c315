"""Other people's clients, each in an environment of its own beside the repository's, made once.

What they pin would not go together with what Flash pins.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NODE_PACKAGES = ("openai@7.55.0", "typescript@5.9.3", "@types/node@20.19.43")
LM_EVAL = ("lm-eval[api]==0.4.13", "transformers==5.23.0")


def own_environment(name: str, wanted: tuple[str, ...], make: Callable[[Path], None]) -> Path:
    """`.venv-NAME`, made anew unless it holds exactly what is wanted."""
    folder = ROOT / f".venv-{name}"
    ready = folder / ".ready"
    if not ready.is_file() or ready.read_text() != "\n".join(wanted):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        make(folder)
        ready.write_text("\n".join(wanted))
    return folder


def run(*command: str | Path, **options) -> str:
    """What the command prints; what went wrong, where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=800, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def typescript(base_url: str, token: str, model: str, headers: dict[str, str]) -> dict[str, Any]:
    """What `client.mts` saw through OpenAI's client for TypeScript."""
    for program in ("node", "npm"):
        assert shutil.which(program), f"{program} is needed: apt-get install nodejs npm"

    def make(folder: Path) -> None:
        run("npm", "install", "--no-fund", "--no-audit", "--prefix", folder, *NODE_PACKAGES)

    node = own_environment("node", NODE_PACKAGES, make)
    shutil.copy(Path(__file__).with_name("client.mts"), node / "client.mts")
    compiler = node / "node_modules" / ".bin" / "tsc"
    run(compiler, "--strict", "--skipLibCheck", "--target", "es2022", "--module", "nodenext", "client.mts", cwd=node)
    seen: dict[str, Any] = json.loads(run("node", "client.mjs", base_url, token, model, json.dumps(headers), cwd=node))
    return seen


LIKELIHOODS = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: "FOLDER/sums.jsonl"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITING = """
task: writing
dataset_path: json
dataset_kwargs: {data_files: {test: "FOLDER/sums.jsonl"}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""
SUMS = [(12, 30), (7, 8), (90, 9), (41, 1)]


def lm_eval(base_url: str, token: str, model: str, tokenizer: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's log of the tasks `sums` (log-likelihoods of three choices) and `writing` (greedy text)."""

    def make(place: Path) -> None:
        run(sys.executable, "-m", "venv", place)
        run(place / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", *LM_EVAL)

    program = own_environment("lmeval", LM_EVAL, make) / "bin" / "lm_eval"
    rows = [
        {"question": f"{a} + {b} =", "choices": [f"{a + b}", f"{a - b}", "none"], "answer": 0} for a, b in SUMS
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(LIKELIHOODS.replace("FOLDER", str(folder)))
    (folder / "writing.yaml").write_text(WRITING.replace("FOLDER", str(folder)))
    arguments = {
        "model": model,
        "base_url": f"{base_url}/completions",
        "tokenizer": tokenizer,
        "num_concurrent": 2,
        "max_retries": 1,
    }
    run(
        program, "--model", "local-completions",
        "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()),
        "--tasks", "sums,writing", "--include_path", folder, "--log_samples", "--output_path", folder / "out",
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
            "OPENAI_API_KEY": token, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"),
        },
    )  # fmt: skip
    samples = {
        name: [json.loads(line) for path in folder.glob(f"out/**/samples_{name}_*.jsonl") for line in path.open()]
        for name in ("sums", "writing")
    }
    assert [len(each) for each in samples.values()] == [len(rows), len(rows)]
    return samples
