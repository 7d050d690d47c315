"""Other people's clients, as they come from their registries, against a host: OpenAI's for TypeScript, and lm-eval.

Each has an environment of its own beside the repository's (`.venv-node`, `.venv-lmeval`), made once; what they pin
would not go together with what Flash pins.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import torch
from tests.serving.sites import TOKEN

ROOT = Path(__file__).parents[2]
NODE_PACKAGES = ("openai@7.55.0", "typescript@5.9.3", "@types/node@20.19.43")
LM_EVAL = ("lm-eval[api]==0.4.13", "transformers==5.23.0")

pytestmark = pytest.mark.slow


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


# --- TypeScript -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def node() -> Path:
    for program in ("node", "npm"):
        assert shutil.which(program), f"{program} is needed: apt-get install nodejs npm"

    def make(folder: Path) -> None:
        run("npm", "install", "--no-fund", "--no-audit", "--prefix", folder, *NODE_PACKAGES)

    return own_environment("node", NODE_PACKAGES, make)


def test_openais_typescript_client(host, adapters, node, tmp_path):
    _, stored = adapters
    shutil.copy(Path(__file__).with_name("client.mts"), node / "client.mts")
    compiler = node / "node_modules" / ".bin" / "tsc"
    run(compiler, "--strict", "--skipLibCheck", "--target", "es2022", "--module", "nodenext", "client.mts", cwd=node)
    headers = json.dumps(stored[2].headers)
    seen = json.loads(run("node", "client.mjs", f"{host.url}/v1", TOKEN, "run/step-2", headers, cwd=node))
    own = host.openai(stored[2].headers).chat.completions.create(
        model="m", messages=[{"role": "user", "content": "What is 12 + 30?"}], temperature=0, max_tokens=24
    )
    assert seen["text"] == seen["streamed"] == seen["accumulated"] == own.choices[0].message.content
    assert seen["finish"] == own.choices[0].finish_reason
    assert seen["tokens"] == seen["usage"]["completion_tokens"] == own.usage.completion_tokens
    assert seen["scored"] in (seen["tokens"], seen["tokens"] - 1)
    assert list(seen["structured"]) == ["sum"]
    assert seen["echoed"] == 4
    assert seen["refused"] == {"status": 400, "code": "context_length_exceeded", "param": "messages"}


# --- lm-eval ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm_eval() -> Path:
    def make(folder: Path) -> None:
        run(sys.executable, "-m", "venv", folder)
        run(folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", *LM_EVAL)

    return own_environment("lmeval", LM_EVAL, make) / "bin" / "lm_eval"


@contextmanager
def with_headers(url: str, headers: dict[str, str]) -> Iterator[str]:
    """A plane of the least kind: it adds the headers that name an adapter, which lm-eval can't send."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            sent = {"Authorization": self.headers["Authorization"], "Content-Type": "application/json", **headers}
            answer = httpx.post(url + self.path, content=body, headers=sent, timeout=120)
            self.send_response(answer.status_code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


TASK = """
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


def test_lm_evals_likelihoods(host, adapters, base, lm_eval, tmp_path):
    _, stored = adapters
    rows = [
        {"question": f"{a} + {b} =", "choices": [f"{a + b}", f"{a - b}", "none"], "answer": 0}
        for a, b in [(12, 30), (7, 8), (90, 9), (41, 1)]
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    (tmp_path / "writing.yaml").write_text(WRITING.replace("FOLDER", str(tmp_path)))
    tokenizer = str(base.tokenizer.name_or_path)
    with with_headers(host.url, stored[4].headers) as url:
        arguments = {
            "model": "run/step-4",
            "base_url": f"{url}/v1/completions",
            "tokenizer": tokenizer,
            "num_concurrent": 2,
            "max_retries": 1,
        }
        run(
            lm_eval, "--model", "local-completions",
            "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()),
            "--tasks", "sums,writing", "--include_path", tmp_path, "--log_samples", "--output_path", tmp_path / "out",
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
                "OPENAI_API_KEY": TOKEN, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "0", "HF_HOME": str(tmp_path),
            },
        )  # fmt: skip
    samples = {
        name: [json.loads(line) for path in tmp_path.glob(f"out/**/samples_{name}_*.jsonl") for line in path.open()]
        for name in ("sums", "writing")
    }
    assert len(samples["sums"]) == len(samples["writing"]) == len(rows)
    for sample in samples["sums"]:
        question, choices = sample["doc"]["question"], sample["doc"]["choices"]
        for choice, [[likelihood, greedy]] in zip(choices, sample["resps"], strict=True):
            wanted, likeliest = score(base, question, f" {choice}")
            assert float(likelihood) == pytest.approx(wanted, abs=1e-3)
            assert (str(greedy) == "True") == likeliest


def score(base, question: str, choice: str) -> tuple[float, bool]:
    """The choice's log-likelihood after the question, and whether it is what greedy decoding says."""
    before = base.tokenizer(question, add_special_tokens=False)["input_ids"]
    tokens = base.tokenizer(question + choice, add_special_tokens=False)["input_ids"]
    with torch.inference_mode(), base.adapters.active("a4"):
        logprobs = base.model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)[len(before) - 1 : -1]
    wanted = torch.tensor(tokens[len(before) :])
    own = logprobs.gather(1, wanted[:, None]).sum().item()
    return own, bool((logprobs.argmax(dim=-1) == wanted).all())
