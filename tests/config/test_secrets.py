"""Secret names and values: what is refused where, and where values come from."""

from __future__ import annotations

import random
import string
import time

import pytest

from flash.config.load import parse_config
from flash.config.secret_rules import secret_value_fault, worker_value_fault
from flash.config.secrets import read_env_file, resolve_secrets, wandb_warnings

BASE = {"model": "flash/nano"}


def config(secrets=(), worker_env=None, params=None, **rest):
    environment = {"id": "a/b", "secrets": list(secrets), "params": params or {}}
    return parse_config({**BASE, "environment": environment, "worker_env": worker_env or {}, **rest})[0]


RESERVED = ["FREESOLO_API_KEY", "HF_TOKEN", "GITHUB_TOKEN", "RUN_ID", "HF_REPO", "HUGGING_FACE_HUB_TOKEN",
            "RUNPOD_API_KEY", "FREESOLO_INTERNAL_KEY", "FLASH_ANYTHING", "hf_token"]  # fmt: skip


@pytest.mark.parametrize("name", RESERVED)
def test_reserved_names_are_no_secrets(name, problems):
    [line] = problems(lambda: config([name]))
    assert line.startswith(f"environment.secrets: {name} is reserved")


@pytest.mark.parametrize("name", ["", "1A", "A-B", "A B", "A=B", "A\nB", "LD_PRELOAD", "PATH", "PYTHONPATH"])
def test_names_that_can_not_be_secrets(name, problems):
    [line] = problems(lambda: config([name]))
    assert line.startswith("environment.secrets: ")


def test_every_faulty_name_is_told(problems):
    assert len(problems(lambda: config(["HF_TOKEN", "FINE", "RUN_ID"]))) == 2


def test_fine_names_and_duplicates():
    assert config(["SERVICE_API_KEY", "WANDB_API_KEY", "SERVICE_API_KEY", "_x1"]).environment.secrets == (
        "SERVICE_API_KEY", "WANDB_API_KEY", "_x1",
    )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["API_KEY", "MY_TOKEN", "TOKEN", "DB_PASSWORD", "PASSWD", "SSH_PASSPHRASE", "AWS_CREDENTIALS", "CREDENTIAL",
     "MYAPP_APIKEY", "PRIVATEKEY", "GH_PAT", "CLIENT_SECRET", "SECRET_KEY", "PRIVATE_KEY", "AWS_ACCESS_KEY_ID",
     "AUTH_KEY", "SIGNING_KEY", "ENCRYPTION_KEY", "SSH_KEY", "DEPLOY_KEY", "api_key", "WANDB_API_KEY",
     "PATH", "PYTHONPATH", "PYTHONHASHSEED", "LD_PRELOAD", "DYLD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES",
     "FLASH_HOME", "RUN_ID", "HF_REPO", "A-B", "", "A=B"],
)  # fmt: skip
def test_refused_worker_env_names(name, problems):
    [line] = problems(lambda: config(worker_env={name: "x"}))
    assert line.startswith("worker_env.")


@pytest.mark.parametrize(
    "name",
    ["SORT_KEY", "MAX_TOKENS", "NUM_TOKENS", "KEYBOARD", "PATTERN", "FEATURE_FLAG", "MONKEY", "TOKENIZER", "KEY",
     "MY_PATH", "SPATIAL", "lower_case"],
)  # fmt: skip
def test_harmless_worker_env_names(name):
    assert config(worker_env={name: "x"}).worker_env == {name: "x"}


def letters(count, alphabet=string.ascii_letters + string.digits, seed=1):
    return "".join(random.Random(seed).choices(alphabet, k=count))


KNOWN = {
    "openai": "sk-proj-" + letters(40),
    "anthropic": "sk-ant-api03-" + letters(40),
    "stripe": "sk_live_" + letters(24),
    "github": "ghp_" + letters(36),
    "github fine": "github_pat_" + letters(40),
    "gitlab": "glpat-" + letters(20),
    "hugging face": "hf_" + letters(34),
    "slack": "xoxb-" + letters(30, string.digits),
    "aws": "AKIA" + letters(16, string.ascii_uppercase + string.digits),
    "google": "AIza" + letters(35),
    "bearer": "Bearer sk-" + letters(40),
    "pem": "-----BEGIN RSA PRIVATE KEY-----\nMIIE",
    "short": "sk-abc123def456",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
    "address": "postgres://me:hunter2@db.example/x",
}


@pytest.mark.parametrize("what", KNOWN)
def test_known_secrets_are_refused_and_never_shown(what, problems):
    secret = KNOWN[what]
    lines = problems(
        lambda: config(worker_env={"LABEL": secret}, params={"deep": [{"x": secret}]}, wandb={"extra": secret})
    )
    assert [line.split(":")[0].split(" = ")[0] for line in lines] == [
        "environment.params.deep.0.x", "worker_env.LABEL", "wandb.extra",
    ]  # fmt: skip
    assert secret[:12] not in "".join(lines).replace("postgres://", "")


@pytest.mark.parametrize(
    "tables",
    [
        {"worker_env": {"DB_PASSWORD": "hunter2"}},
        {"api_key": "hunter2"},
        {"wandb": {"api_key": "hunter2"}},
        {"train": {"hub_token": "hunter2"}},
    ],
)
def test_values_of_secret_keys_are_hidden_even_when_short(tables, problems):
    [line] = problems(lambda: config(**tables))
    assert "hunter2" not in line


@pytest.mark.parametrize("seed", range(20))
def test_random_keys_are_refused_in_worker_env_only(seed, problems):
    hexadecimal = letters(32, "0123456789abcdef", seed)
    mixed = letters(43, string.ascii_letters + string.digits + "+/", seed)
    for value in (hexadecimal, mixed):
        assert problems(lambda value=value: config(worker_env={"LABEL": value}))[0].startswith("worker_env.LABEL")
        assert config(params={"x": value}).environment.params == {"x": value}


@pytest.mark.parametrize(
    "value",
    ["", "enabled", "sk-learn", "sk-learn-classifier-baseline", "hf_transformers", "sk_first_run_of_many",
     "experiment-2026-01-31-with-a-rather-long-descriptive-name", "a" * 200,
     "/home/someone/projects/very/long/path/to/a/dataset/train_v2_2024.jsonl", "https://example.com/path?x=1",
     "https://example.com:8080/a@b", "550e8400-e29b-41d4-a716-446655440000", "The quick brown fox jumps over it",
     "0.1,0.2,0.3", "1234567890123456789012345678901234567890", "task_name_number_twelve_hundred_and_one"],
)  # fmt: skip
def test_harmless_values(value):
    assert worker_value_fault(value) is None
    assert secret_value_fault(value) is None


def test_params_must_be_json(problems):
    import datetime

    params = {"when": datetime.date(2024, 1, 1), "nan": float("nan"), "big": 2**70, "ok": [1, 2.5, None, True, "x"]}
    lines = problems(lambda: config(params=params))
    assert [line.split(":")[0] for line in lines] == [f"environment.params.{key}" for key in ("when", "nan", "big")]


def test_deep_params_are_refused(problems):
    deep = {}
    for _ in range(500):
        deep = {"x": deep}
    assert "32 levels" in problems(lambda: config(params=deep))[0]


def test_pip_lines(problems):
    lines = problems(lambda: parse_config({**BASE, "environment": {"id": "a/b", "pip": ["-r x", "", "a\nb", "ok>=1"]}}))
    assert len(lines) == 3 and all(line.startswith("environment.pip: ") for line in lines)


def test_a_name_can_not_be_secret_and_public(problems):
    [line] = problems(lambda: config(["LABEL"], worker_env={"LABEL": "x"}))
    assert line.startswith("worker_env.LABEL: is also named under environment.secrets")


# --- resolution ---------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    cwd, beside = tmp_path / "cwd", tmp_path / "beside"
    cwd.mkdir()
    beside.mkdir()
    return cwd, beside


def test_shell_then_env_local_then_env_here_then_beside_the_config(folders):
    cwd, beside = folders
    names = ["A", "B", "C", "D", "E"]
    for path, from_name, value in [
        (beside / ".env", "A", "beside .env"),
        (beside / ".env.local", "B", "beside .env.local"),
        (cwd / ".env", "C", "cwd .env"),
        (cwd / ".env.local", "D", "cwd .env.local"),
    ]:
        # each later (stronger) place leaves out the names that a weaker one is to provide
        path.write_text("".join(f"{n}={value}\n" for n in names[names.index(from_name) :]), encoding="utf-8")
    found = resolve_secrets(config(names), beside, {"E": "shell", "OTHER": "no"}, cwd)
    assert found == {"A": "beside .env", "B": "beside .env.local", "C": "cwd .env", "D": "cwd .env.local", "E": "shell"}


def test_missing_ones_are_named_together(folders, problems):
    cwd, beside = folders
    lines = problems(lambda: resolve_secrets(config(["ONE", "TWO", "SET"]), beside, {"SET": "x", "ONE": ""}, cwd))
    assert [line[:27] for line in lines] == ["environment.secrets: ONE is", "environment.secrets: TWO is"]
    assert str(cwd) in lines[0] and str(beside) in lines[0]


def test_wandb_key_is_forwarded_whenever_set(folders):
    cwd, beside = folders
    assert resolve_secrets(config(), beside, {"WANDB_API_KEY": "k"}, cwd) == {"WANDB_API_KEY": "k"}
    assert resolve_secrets(config(), beside, {}, cwd) == {}
    (beside / ".env").write_text("WANDB_API_KEY=file", encoding="utf-8")
    assert resolve_secrets(config(), beside, {}, cwd) == {"WANDB_API_KEY": "file"}


def test_a_wandb_table_without_the_key_warns():
    asked = config(wandb={"project": "p"})
    assert "WANDB_API_KEY is not set" in wandb_warnings(asked, {})[0]
    assert wandb_warnings(asked, {"WANDB_API_KEY": "k"}) == []
    assert wandb_warnings(config(), {}) == []


def test_env_files(tmp_path):
    path = tmp_path / ".env"
    path.write_bytes(
        b"\xef\xbb\xbf# comment\r\nPLAIN=a b # tail\r\nexport EXPORTED = x\nHASH=a#b\nEMPTY=\nQUOTED='a # $b\\n'\n"
        b'DOUBLE="a\\n\\"b\\"" # tail\nPEM="-----BEGIN X-----\nabc\n-----END X-----"\n  INDENTED=1\n'
        b"URL=https://x/?a=b&c=d\nPLAIN2='it''s'\nnot a line\n=x\nOPEN=\"abc\nLATER=1\nLATER=2\n#OFF=1\n"
    )
    assert read_env_file(path) == {
        "PLAIN": "a b", "EXPORTED": "x", "HASH": "a#b", "EMPTY": "", "QUOTED": "a # $b\\n", "DOUBLE": 'a\n"b"',
        "PEM": "-----BEGIN X-----\nabc\n-----END X-----", "INDENTED": "1", "URL": "https://x/?a=b&c=d",
        "PLAIN2": "it", "OPEN": '"abc', "LATER": "2",
    }  # fmt: skip
    assert read_env_file(tmp_path / "none") == {}


def test_an_unreadable_env_file_is_one_line(folders, problems):
    cwd, beside = folders
    (cwd / ".env").write_bytes(b"A=\xff\xfe")
    [line] = problems(lambda: resolve_secrets(config(["A"]), beside, {}, cwd))
    assert "not UTF-8" in line and str(cwd / ".env") in line


@pytest.mark.parametrize("piece", ["a", "sk-a-", "sk-1a-", "-----BEGIN A", "a://b", "eyJaaaaaaaa.", "xoxb-1-", "aA1"])
def test_long_values_are_judged_in_linear_time(piece):
    start = time.process_time()
    worker_value_fault(piece * 50_000)
    assert time.process_time() - start < 2, "a server reads values of strangers"
