"""`environment.pip`: an overlay in front of the training stack, shared by content, failing in one line."""

import socket
import subprocess
import sys
import threading
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from flash.errors import InvalidInput, Unavailable
from flash.worker.environment_host import EnvironmentHost, HostSpec
from flash.worker.packages import prepare

ENVIRONMENT = """
import flash_test_dependency, safetensors
from freesolo.environments import EnvironmentSingleTurn, RewardResult

class Env(EnvironmentSingleTurn):
    def build_prompt_messages(self, example, prompt_text):
        return [{"role": "user", "content": f"{flash_test_dependency.NAME} {safetensors.NAME}"}]

    def score_response(self, example, text):
        return RewardResult(score=1.0)

def load_environment():
    return Env()
"""


@pytest.fixture(autouse=True)
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may depend on what some index has."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


def wheel(folder: Path, name: str, version: str, code: str) -> str:
    """A wheel of one module; the requirement that installs it."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", code)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return f"{name} @ file://{path}"


def output_of(python: str, code: str) -> str:
    return subprocess.run([python, "-P", "-s", "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_without_requirements_there_is_no_overlay(tmp_path: Path) -> None:
    assert prepare([], cache_dir=tmp_path / "cache") == sys.executable
    assert not (tmp_path / "cache").exists()


def test_packages_stand_in_front_of_the_training_stack_for_the_host_alone(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wanted = [
        wheel(wheels, "flash_test_dependency", "1.0", "NAME = 'mine'"),
        wheel(wheels, "safetensors", "99.0", "NAME = 'clashing'"),  # the trainer's own would be another one
    ]
    before = metadata.version("safetensors")
    lines: list[str] = []
    python = prepare(wanted, cache_dir=tmp_path / "cache", on_output=lines.append)
    assert any("Successfully installed" in line for line in lines)

    folder = tmp_path / "package"
    (folder / "dataset").mkdir(parents=True)
    (folder / "environment.py").write_text(ENVIRONMENT)
    (folder / "dataset" / "train.jsonl").write_text('{"input": "a"}\n')
    host = EnvironmentHost(HostSpec(folder, tmp_path / "work", {}, {}, python=python))
    try:
        [start] = host.call("start", {"split": "train", "indices": [0], "seed": 0})
        assert start["messages"][0]["content"] == "mine clashing"
    finally:
        host.close()

    # The trainer's own packages are untouched, and the rest of them shows through.
    assert output_of(sys.executable, "import safetensors; print(safetensors.__version__)") == before
    assert output_of(python, "import pydantic, flash; print(pydantic.VERSION)") == metadata.version("pydantic")

    # The same requirements, in any order, are the same overlay, and no second installation.
    lines.clear()
    assert prepare(wanted[::-1], cache_dir=tmp_path / "cache", on_output=lines.append) == python
    assert lines == []


@pytest.mark.slow
def test_concurrent_runs_build_one_overlay(tmp_path: Path) -> None:
    wanted = [wheel(tmp_path / "wheels", "flash_test_dependency", "1.0", "NAME = 'mine'")]
    installs: list[str] = []
    pythons: list[str] = []

    def build() -> None:
        pythons.append(prepare(wanted, cache_dir=tmp_path / "cache", on_output=installs.append))

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(pythons)) == 1
    assert sum("Successfully installed" in line for line in installs) == 1


@pytest.mark.slow
def test_an_overlay_that_was_never_finished_is_built_again(tmp_path: Path) -> None:
    wanted = [wheel(tmp_path / "wheels", "flash_test_dependency", "1.0", "NAME = 'mine'")]
    python = Path(prepare(wanted, cache_dir=tmp_path / "cache"))
    folder = python.parent.parent
    (folder / ".complete").unlink()
    [module] = folder.glob("lib/*/site-packages/flash_test_dependency.py")
    module.write_text("half written")
    prepare(wanted, cache_dir=tmp_path / "cache")
    assert output_of(str(python), "import flash_test_dependency; print(flash_test_dependency.NAME)") == "mine"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["no-such-package-of-anyone==1.0"], r"environment\.pip no-such-package-of-anyone==1\.0: no such package"),
        pytest.param(
            ["not a requirement!"],
            r"environment\.pip: invalid requirement 'not a requirement!'",
            marks=pytest.mark.slow,
        ),
        (["--index-url=http://127.0.0.1/"], "options are not taken"),
        (["-r other.txt"], "options are not taken"),
        (["a\n--pre"], "must be one requirement"),
        ([""], "must be one requirement"),
        pytest.param(
            ["missing @ file:///nowhere/missing-1.0-py3-none-any.whl"],
            "can't be installed: .*No such file",
            marks=pytest.mark.slow,
        ),
        pytest.param(["torch==1.0.0"], r"torch==1\.0\.0 asks for another torch", marks=pytest.mark.slow),
    ],
)
def test_a_requirement_that_can_not_be_met_is_one_line_that_names_it(
    tmp_path: Path, wanted: list[str], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        prepare(wanted, cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    left = [path.name for path in (tmp_path / "cache").glob("*") if path.suffix != ".lock" and path.name != "pip"]
    assert left == []  # nothing half-built stays behind


def test_an_index_that_can_not_be_reached_is_said_to_be_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{unused.getsockname()[1]}/simple")
        with pytest.raises(Unavailable, match=r"environment\.pip some-package: the package index can't be reached"):
            prepare(["some-package"], cache_dir=tmp_path / "cache")


@pytest.mark.slow
def test_an_installation_is_ended_at_its_limit(tmp_path: Path) -> None:
    source = tmp_path / "slow"
    source.mkdir()
    # a build backend of its own: the limit is what is tried here, whatever the index answers and how fast
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (source / "backend.py").write_text("import time; time.sleep(60)")
    with pytest.raises(InvalidInput, match="took longer than 2 s"):
        prepare([f"slow @ file://{source}"], cache_dir=tmp_path / "cache", timeout_s=2)


@pytest.mark.slow
def test_building_a_package_sees_nothing_of_the_plane_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREESOLO_API_KEY", "canary-value")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip's spelling of "yes"
    source, witness = tmp_path / "curious", tmp_path / "seen.txt"
    source.mkdir()
    (source / "setup.py").write_text(
        f"import os; open({str(witness)!r}, 'w').write(repr(dict(os.environ))); raise SystemExit(1)"
    )
    with pytest.raises(InvalidInput, match="can't be installed"):
        prepare([f"curious @ file://{source}"], cache_dir=tmp_path / "cache")
    assert "PATH" in witness.read_text()
    assert "canary-value" not in witness.read_text()
