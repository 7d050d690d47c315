"""What ships, that the same files give the same bytes, and that no archive writes where it should not."""

import gzip
import io
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash.environments import package
from flash.environments.package import Collection, collect, inspect, pack, slug, unpack, unpack_repository
from flash.errors import PackageError

ENTRY = b"def load_environment(): ...\n"


def tar(*members: tuple[str | tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


# --- what ships -------------------------------------------------------------------------------------


def test_code_data_and_the_dataset_folder_ship_and_nothing_else(write: Callable[..., Path]) -> None:
    shipped = ["helpers.py", "dataset/train.jsonl", "dataset/deep/er/x.bin", "DATA.JSONL", "notes.md", "t.parquet"]
    stays = [
        "pyproject.toml", "requirements.txt", "uv.lock", "poetry.lock", "package-lock.json", ".env", ".git/config",
        "__pycache__/helpers.cpython-311.pyc", "venv/pyvenv.cfg", "prompts/a.txt", "image.png", "dataset/.hidden",
        "dataset/__pycache__/x.pyc", "my-env/pyvenv.cfg",
    ]  # fmt: skip
    folder = write(dict.fromkeys([*shipped, *stays], "x = 1"))
    (folder / "link.py").symlink_to(folder / "helpers.py")
    collection = collect(folder)
    assert sorted(collection.files) == sorted(["environment.py", *shipped])
    assert {"prompts/", "image.png", "link.py", "requirements.txt"} <= set(collection.left_out)
    assert not {".env", "__pycache__/", "venv/", "my-env/"} & set(collection.left_out)  # nobody expects these to ship


def test_a_lone_file_becomes_environment_py_and_its_siblings_travel(write: Callable[..., Path]) -> None:
    folder = write({"task.py": ENTRY, "helpers.py": "", "dataset/train.jsonl": "{}", "other/x.py": ""})
    files = collect(folder / "task.py").files
    assert sorted(files) == ["dataset/train.jsonl", "environment.py", "helpers.py"]
    assert files["environment.py"].name == "task.py"


@pytest.mark.parametrize(
    ("line", "noted"),
    [
        ('open("prompts/system.txt")', "prompts/system.txt"),
        ('PATH = HERE / "prompts" / "system.txt"', "prompts/"),
        ("import prompts", "prompts/"),
        ("from prompts.sub import x", "prompts/"),
        ('DATA = "../outside.jsonl"', "../outside.jsonl"),
        ('PICTURE = "logo.png"', "logo.png"),
    ],
)
def test_a_reference_to_what_stays_behind_is_noted(write: Callable[..., Path], line: str, noted: str) -> None:
    folder = write({"prompts/system.txt": "", "logo.png": ""}, code=f"import os\n{line}\ndef load_environment(): ...\n")
    (folder.parent / "outside.jsonl").write_text("")
    notes = collect(folder).notes
    assert any(f"environment.py line 2 refers to {noted}" in note for note in notes)


def test_references_to_what_ships_or_is_not_there_are_not_noted(write: Callable[..., Path]) -> None:
    code = (
        'import json, helpers\nopen("dataset/train.jsonl")\nopen("out/log.txt")\nA = "."\ndef load_environment(): ...\n'
    )
    assert collect(write({"helpers.py": "", "dataset/train.jsonl": ""}, code=code)).notes == ()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def load_environment(:\n", "environment.py line 1"),
        ("x = 1\n", "defines no load_environment"),
        ("x = '\0'", "environment.py"),
    ],
)
def test_code_that_can_not_work_is_refused_without_running_it(
    write: Callable[..., Path], code: str, message: str
) -> None:
    with pytest.raises(PackageError, match=message):
        pack(write({}, code=code))


def test_push_never_runs_the_code(write: Callable[..., Path], tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    pack(write({}, code=f"open({str(witness)!r}, 'w')\ndef load_environment(): ...\n"))
    assert not witness.exists()


def test_a_folder_without_environment_py_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"has no environment\.py"):
        pack(tmp_path)


def test_too_many_files_are_refused(write: Callable[..., Path]) -> None:
    entry = write() / "environment.py"
    with pytest.raises(PackageError, match="at most 5,000"):
        pack(Collection({f"{index}.py": entry for index in range(5_001)}))


# --- the same files, the same bytes -----------------------------------------------------------------


def test_the_digest_depends_on_names_and_contents_alone(write: Callable[..., Path]) -> None:
    files = {"dataset/train.jsonl": "{}\n", "ünïcode.md": "x", "b.py": "", f"{'long' * 40}.txt": "y"}
    first = pack(write(files, name="one"))
    other = write(dict(reversed(files.items())), name="two")
    for path in other.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o755)
    assert pack(other).data == first.data
    unpack(first.data, other.parent / "three")
    assert pack(other.parent / "three").sha256 == first.sha256
    (other / "b.py").write_text("changed = True")
    assert pack(other).sha256 != first.sha256


def test_unpacked_files_are_the_packed_ones(write: Callable[..., Path], tmp_path: Path) -> None:
    folder = write({"dataset/train.jsonl": b"\x00\xff" * 100_000, "helpers.py": "a = 1\n"})
    names = unpack(pack(folder).data, tmp_path / "out")
    assert names == ("dataset/train.jsonl", "environment.py", "helpers.py")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
        assert (tmp_path / "out" / name).stat().st_mode & 0o777 == 0o644


def test_an_archive_is_read_from_bytes_a_path_and_a_stream(write: Callable[..., Path], tmp_path: Path) -> None:
    made = pack(write())
    path = tmp_path / "a.tar.gz"
    path.write_bytes(made.data)
    assert inspect(made.data) == inspect(path) == inspect(io.BytesIO(made.data)) == ("environment.py",)


def test_only_overwrite_writes_into_an_occupied_folder(write: Callable[..., Path], tmp_path: Path) -> None:
    made, target = pack(write()), tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    (target / "environment.py").write_text("old")
    with pytest.raises(PackageError, match="not empty"):
        unpack(made.data, target)
    assert (target / "environment.py").read_text() == "old"
    unpack(made.data, target, overwrite=True)
    assert (target / "environment.py").read_text() != "old"
    assert (target / "mine.txt").read_text() == "mine"


def test_overwriting_never_follows_a_link_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "dataset").symlink_to(tmp_path / "outside")
    with pytest.raises(PackageError, match="in the way"):
        unpack(tar(("dataset/x", b"1")), tmp_path / "target", overwrite=True)
    assert list((tmp_path / "outside").iterdir()) == []


# --- archives of strangers --------------------------------------------------------------------------

HOSTILE = {
    "traversal": tar(("../evil", b"x")),
    "inner traversal": tar(("a/../../evil", b"x")),
    "absolute": tar(("/tmp/evil", b"x")),
    "drive": tar(("C:evil", b"x")),
    "backslash": tar(("..\\evil", b"x")),
    "control character": tar(("a\x1b[31m", b"x")),
    "newline": tar(("a\nb", b"x")),
    "symlink": tar((special("link", tarfile.SYMTYPE, "/etc/passwd"), b"")),
    "symlink, then through it": tar((special("d", tarfile.SYMTYPE, "/tmp"), b""), ("d/evil", b"x")),
    "hard link": tar(("a", b"x"), (special("b", tarfile.LNKTYPE, "a"), b"")),
    "fifo": tar((special("pipe", tarfile.FIFOTYPE), b"")),
    "device": tar((special("null", tarfile.CHRTYPE), b"")),
    "twice": tar(("a", b"1"), ("a", b"2")),
    "file, then folder": tar(("a", b"1"), ("a/b", b"2")),
    "folder, then file": tar(("a/b", b"1"), ("a", b"2")),
    "too deep": tar(("/".join("d" * 17), b"x")),
    "too long": tar(("n" * 300, b"x")),
    "not UTF-8": gzip.compress(gzip.decompress(tar(("a", b"x"))).replace(b"a\0", b"\xff\0", 1)),
    "cut short": tar(("a", os.urandom(5000)))[:2000],
    "empty": b"",
    "no gzip": b"PK\x03\x04" * 100,
    "no tar": gzip.compress(b"hello" * 1000),
    "bad checksum": gzip.compress(b"x" + gzip.decompress(tar(("abc", b"x")))[1:]),
    "no end": gzip.compress(gzip.decompress(tar(("a", b"x")))[:1024]),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_is_one_error_and_writes_nothing(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "in" / "target"
    with pytest.raises(PackageError) as caught:
        unpack(HOSTILE[kind], target)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["in"]
    with pytest.raises(PackageError):
        inspect(HOSTILE[kind])


def test_a_bomb_costs_neither_disk_nor_memory(tmp_path: Path) -> None:
    bomb = tar(("zeros", bytes(40 << 20)))
    tracemalloc.start()
    try:
        with pytest.raises(PackageError, match="times its size"):
            unpack(bomb, tmp_path / "target")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert list(tmp_path.iterdir()) == []


def test_a_claimed_size_beyond_the_cap_is_refused_before_it_is_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("huge")
    info.size = (256 << 20) + 1
    with pytest.raises(PackageError, match="beyond 256 MB"):
        unpack(gzip.compress(info.tobuf() + bytes(1024)), tmp_path / "target")


def test_more_members_than_the_cap_are_refused() -> None:
    headers = b"".join(tarfile.TarInfo(f"f{index}").tobuf() for index in range(5_001))
    with pytest.raises(PackageError, match="5,000 members"):
        inspect(gzip.compress(headers + bytes(1024)))


def test_a_header_that_would_fill_memory_is_refused(tmp_path: Path) -> None:
    info = special("x", tarfile.XHDTYPE)
    info.size = 100 << 20
    with pytest.raises(PackageError, match="header that is too long"):
        unpack(gzip.compress(info.tobuf() + bytes(4096)), tmp_path / "target")


VALID = tar(("environment.py", ENTRY), ("dataset/train.jsonl", b'{"input": "a"}\n'), ("ü" * 60, b"x"))


@settings(max_examples=300)
@given(data=st.data())
def test_damaged_archives_give_package_errors_only(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    inner = bytearray(gzip.decompress(VALID))
    for _ in range(data.draw(st.integers(1, 4))):
        inner[data.draw(st.integers(0, len(inner) - 1))] = data.draw(st.integers(0, 255))
    archive = gzip.compress(bytes(inner), 1)
    if data.draw(st.booleans()):
        archive = archive[: data.draw(st.integers(0, len(archive)))]
    root = tmp_path_factory.mktemp("damaged")
    try:
        names = unpack(archive, root / "target")
    except PackageError as error:
        assert "\n" not in str(error)
        assert list(root.iterdir()) == []
    else:
        assert [path.name for path in root.iterdir()] == ["target"]
        assert sorted(names) == sorted(
            str(path.relative_to(root / "target")) for path in (root / "target").rglob("*") if path.is_file()
        )


# --- a repository's archive -------------------------------------------------------------------------


def test_only_the_named_part_of_a_repository_is_written(tmp_path: Path) -> None:
    archive = tar(
        ("owner-repo-abc/README.md", b"r"),
        (special("owner-repo-abc/evil", tarfile.SYMTYPE, "/etc"), b""),
        ("owner-repo-abc/big.bin", bytes(100_000)),
        ("owner-repo-abc/envs/math/environment.py", ENTRY),
        (special("owner-repo-abc/envs/math/link", tarfile.SYMTYPE, "/etc"), b""),
        ("owner-repo-abc/envs/math/dataset/train.jsonl", b"{}"),
        ("owner-repo-abc/envs/mathematics/environment.py", ENTRY),
    )
    names = unpack_repository(archive, tmp_path / "part", only="envs/math")
    assert names == ("envs/math/environment.py", "envs/math/dataset/train.jsonl")
    assert pack(tmp_path / "part" / "envs" / "math").files == ("dataset/train.jsonl", "environment.py")
    assert len(unpack_repository(archive, tmp_path / "file", only="envs/math/environment.py")) == 2
    assert len(unpack_repository(archive, tmp_path / "all")) == 5


def test_a_repository_can_not_write_outside_either(tmp_path: Path) -> None:
    with pytest.raises(PackageError):
        unpack_repository(tar(("top/../../evil", b"x")), tmp_path / "out")
    assert not (tmp_path / "evil").exists()


# --- names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "slugged"),
    [("My Env", "my-env"), ("a.b_c-d", "a.b_c-d"), ("Ünder  score!", "nder-score"), ("x//y", "x-y")],
)
def test_slug(name: str, slugged: str) -> None:
    assert slug(name) == slugged


@pytest.mark.parametrize("name", ["", "..", ".", "!!!"])
def test_a_name_without_anything_left_is_refused(name: str) -> None:
    with pytest.raises(PackageError):
        slug(name)


def test_the_caps_are_the_documented_ones() -> None:
    assert (package.MAX_COMPRESSED_BYTES, package.MAX_EXPANDED_BYTES, package.MAX_MEMBERS) == (
        64 << 20,
        256 << 20,
        5_000,
    )
