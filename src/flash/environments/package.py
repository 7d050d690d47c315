"""Packages: which files of a folder ship, as one normalised archive, and how an archive is opened safely.

The same files always give the same bytes, so that an archive's SHA-256 is its version. Archives are opened by an
extractor of our own: regular files and folders only, inside the target, under fixed caps, in bounded memory.
Reads code as text and never runs it. Knows nothing of servers.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from flash.errors import PackageError

ENTRY_FILE = "environment.py"
FACTORY = "load_environment"
DATASET_FOLDER = "dataset"
SHIPPED_SUFFIXES = frozenset(
    (".py", ".jsonl", ".json", ".csv", ".tsv", ".txt", ".md", ".parquet", ".yaml", ".yml", ".bson")
)
LEFT_OUT_FILES = frozenset(
    ("pyproject.toml", "requirements.txt", "package-lock.json", "pnpm-lock.yaml", "pipfile.lock", "poetry.lock",
     "uv.lock", "npm-shrinkwrap.json", "conda-lock.yml")
)  # fmt: skip
CACHE_FOLDERS = frozenset(("__pycache__", "node_modules", "venv", "env", "build", "dist"))

MAX_COMPRESSED_BYTES = 64 << 20
MAX_EXPANDED_BYTES = 256 << 20
MAX_REPOSITORY_BYTES = 1 << 30  # what a repository's archive may expand to while a package is looked for
MAX_MEMBERS = 5_000
MAX_HEADERS = 200_000  # in a repository's archive, most of which is passed over
MAX_DEPTH = 16
MAX_NAME_BYTES = 512
MAX_RATIO = 250  # expanded to compressed, once RATIO_FREE_BYTES are exceeded
RATIO_FREE_BYTES = 16 << 20


@dataclass(frozen=True)
class Collection:
    """The files of a package, by their path in the archive, and what its author should know about the rest."""

    files: dict[str, Path]
    left_out: tuple[str, ...] = ()  # entries beside environment.py that don't ship; folders end in "/"
    notes: tuple[str, ...] = ()  # references in the code to what doesn't ship


@dataclass(frozen=True)
class Package:
    """A package as the bytes of its archive; `sha256` is over them. The rest as in `Collection`."""

    data: bytes = field(repr=False)
    sha256: str
    files: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return len(self.data)


def slug(name: str) -> str:
    """A name as it appears in ids: lower-case, runs outside [a-z0-9._-] become one dash."""
    slugged = re.sub(r"[^a-z0-9._-]+", "-", name.strip().lower()).strip("-")
    if slugged in ("", ".", ".."):
        raise PackageError(f"name = {name!r}: must have a letter or a digit")
    return slugged


# --- collecting -------------------------------------------------------------------------------------


def collect(path: str | Path) -> Collection:
    """The files that ship for a folder with environment.py, or for one lone .py (which becomes environment.py)."""
    path = Path(path)
    if path.is_dir():
        root, entry = path, path / ENTRY_FILE
        if not entry.is_file():
            raise PackageError(f"{path}: has no {ENTRY_FILE}", remedy="`flash env setup` writes one to start from")
    elif path.is_file() and path.suffix == ".py":
        root, entry = path.parent, path
    else:
        raise PackageError(f"{path}: must be a folder with {ENTRY_FILE}, or one .py file")
    if entry.is_symlink():
        raise PackageError(f"{entry}: is a link; ship the file itself")
    files, left_out = {ENTRY_FILE: entry}, []
    for item in sorted(root.iterdir()):
        name = item.name
        if item == entry or name.startswith("."):
            continue
        if item.is_symlink():
            left_out.append(name)
        elif item.is_dir():
            if name == DATASET_FOLDER:
                files.update(_dataset_files(root, item, left_out))
            elif not _is_cache(item):
                left_out.append(f"{name}/")
        elif name == ENTRY_FILE or not _ships(item):
            left_out.append(name)  # another environment.py gives way to the file that was named
        else:
            files[name] = item
    _check_sources(files)
    return Collection(files, tuple(left_out), tuple(_references(files, root)))


def _ships(item: Path) -> bool:
    return item.is_file() and item.suffix.lower() in SHIPPED_SUFFIXES and item.name.lower() not in LEFT_OUT_FILES


def _is_cache(folder: Path) -> bool:
    return folder.name.lower() in CACHE_FOLDERS or (folder / "pyvenv.cfg").is_file()


def _dataset_files(root: Path, folder: Path, left_out: list[str]) -> Iterator[tuple[str, Path]]:
    for item in sorted(folder.iterdir()):
        name = item.relative_to(root).as_posix()
        if item.name.startswith(".") or item.name == "__pycache__":
            continue
        if item.is_symlink():
            left_out.append(name)
        elif item.is_dir():
            yield from _dataset_files(root, item, left_out)
        elif item.is_file():
            yield name, item


def _check_caps(files: dict[str, Path]) -> None:
    if len(files) > MAX_MEMBERS:
        raise PackageError(f"{len(files):,} files: at most {MAX_MEMBERS:,} ship")
    total = 0
    for name, path in files.items():
        _check_name(name)
        total += path.stat().st_size
        if total > MAX_EXPANDED_BYTES:
            raise PackageError(
                f"more than {MAX_EXPANDED_BYTES >> 20} MB at {name}: that is the most a package may hold",
                remedy="ship fewer rows",
            )


# --- reading the code without running it ------------------------------------------------------------


def _check_sources(files: dict[str, Path]) -> None:
    tree = _parse(ENTRY_FILE, files[ENTRY_FILE])
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
    if FACTORY not in names and "*" not in names:
        raise PackageError(
            f"{ENTRY_FILE} defines no {FACTORY}()",
            remedy=f"define `def {FACTORY}(**params)` that returns the environment",
        )


def _parse(name: str, path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=name)
    except SyntaxError as error:
        raise PackageError(f"{name} line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise PackageError(f"{name}: can't be read as Python: {error}") from None


def _references(files: dict[str, Path], root: Path) -> Iterator[str]:
    """Notes on imports and path-like strings in shipped code that lead to what stays behind."""
    for name, path in files.items():
        if not name.endswith(".py") or "/" in name:
            continue
        try:
            tree = _parse(name, path)
        except PackageError:
            continue  # a helper that nobody may import; environment.py itself was checked
        seen: set[str] = set()
        for node in ast.walk(tree):
            for target in _targets(node):
                left = _left_behind(target, files, root)
                if left is not None and left not in seen:
                    seen.add(left)
                    yield f"{name} line {getattr(node, 'lineno', 1)} refers to {left}, which does not ship"


def _targets(node: ast.AST) -> list[str]:
    """Paths, relative to the package, that a node may mean."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
        return [node.module.split(".")[0]]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value.strip()
        if text and len(text) <= 512 and text.isprintable():
            return [text]
    return []


def _left_behind(target: str, files: dict[str, Path], root: Path) -> str | None:
    """How people know the existing file or folder that `target` names, if it doesn't ship."""
    if target.strip("./\\") == "":
        return None
    try:
        path = (root / target).resolve()
        if not path.exists() or path == root.resolve():
            return None
        inside = path.is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError):
        return None
    if not inside:
        looks_meant = target.startswith("..") or "/" in target.strip("/") or Path(target).suffix in SHIPPED_SUFFIXES
        return f"{target} outside its folder" if looks_meant else None
    name = path.relative_to(root.resolve()).as_posix()
    shipped = {shipped.resolve() for shipped in files.values()}
    if path in shipped or any(file.is_relative_to(path) for file in shipped):
        return None
    return f"{name}/" if path.is_dir() else name


# --- packing ----------------------------------------------------------------------------------------


class _CappedBuffer(io.BytesIO):
    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        if self.tell() + len(data) > MAX_COMPRESSED_BYTES:
            raise PackageError(
                f"the archive exceeds {MAX_COMPRESSED_BYTES >> 20} MB compressed", remedy="ship fewer rows"
            )
        return super().write(data)


def pack(source: str | Path | Collection) -> Package:
    """The archive of a folder, a lone .py or a collection: names sorted, times, owners and modes fixed.

    Held to the caps of `unpack`. Raises PackageError as `collect` does.
    """
    collection = source if isinstance(source, Collection) else collect(source)
    _check_caps(collection.files)
    buffer = _CappedBuffer()
    names = tuple(sorted(collection.files))
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=buffer, compresslevel=6, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as archive,
    ):
        for name in names:
            with collection.files[name].open("rb") as file:
                member = tarfile.TarInfo(name)
                member.size = os.fstat(file.fileno()).st_size
                member.mode = 0o644
                archive.addfile(member, file)
    data = buffer.getvalue()
    inspect(data)  # what can't be opened is not shipped
    return Package(data, hashlib.sha256(data).hexdigest(), names, collection.left_out, collection.notes)


# --- opening ----------------------------------------------------------------------------------------

Source = bytes | str | Path | IO[bytes]


@dataclass(frozen=True)
class Member:
    name: str
    size: int
    folder: bool


def inspect(source: Source) -> tuple[str, ...]:
    """Reads an archive to its end by every rule of `unpack` without writing; the names of its files."""
    with _Reader(source) as reader:
        names = []
        for member in reader.members():
            for _ in reader.content(member):
                pass
            if not member.folder:
                names.append(member.name)
        return tuple(names)


def unpack(source: Source, folder: str | Path, *, overwrite: bool = False) -> tuple[str, ...]:
    """Writes an archive's files into `folder` and returns their names; on any error `folder` is as it was.

    `folder` must be absent or empty, unless `overwrite`: then files of the same name are replaced and others kept.
    Raises PackageError for everything that is wrong with the archive.
    """
    folder = Path(folder)
    occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if occupied and not overwrite:
        raise PackageError(f"{folder}: is not empty", remedy="choose another folder, or overwrite with -f")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        names = _write_members(source, staging)
        if occupied:
            _move_over(staging, folder, names)
        else:
            if folder.exists():
                folder.rmdir()
            staging.chmod(0o755)
            staging.rename(folder)
        return names
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_members(source: Source, root: Path, place: Callable[[str], str | None] | None = None) -> tuple[str, ...]:
    names = []
    with _Reader(source, place) as reader:
        for member in reader.members():
            target = root / member.name
            try:
                if member.folder:
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
                with open(os.open(target, flags, 0o644), "wb") as file:  # noqa: PTH123 - a descriptor
                    for chunk in reader.content(member):
                        file.write(chunk)
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                # two names that the rules tell apart and this file system doesn't
                raise PackageError(f"the archive holds {member.name!r} twice") from None
            names.append(member.name)
    return tuple(names)


def unpack_repository(source: Source, folder: str | Path, *, only: str | None = None) -> tuple[str, ...]:
    """Writes what a package at `only` may consist of out of a whole repository's archive (GitHub's form).

    The archive's single top folder is taken off. `only` is the package's folder or .py file inside the repository;
    what lies elsewhere, and every link, is passed over and never written. Files keep their place in the repository.
    """
    folder = Path(folder)
    keep = (only or "").strip("/")
    if keep.endswith(".py"):
        keep = str(PurePosixPath(keep).parent)  # a lone file's siblings and dataset/ go with it
        keep = "" if keep == "." else keep

    def place(name: str) -> str | None:
        _, _, rest = name.partition("/")
        return rest if rest and (not keep or rest.startswith(f"{keep}/")) else None

    folder.mkdir(parents=True, exist_ok=True)
    return _write_members(source, folder, place)


def _move_over(staging: Path, folder: Path, names: Sequence[str]) -> None:
    for name in names:
        target = folder
        for part in PurePosixPath(name).parts[:-1]:
            target /= part
            if target.is_symlink() or (target.exists() and not target.is_dir()):
                raise PackageError(f"{target}: is in the way of {name}", remedy="remove it first")
        if (folder / name).is_dir():
            raise PackageError(f"{folder / name}: is a folder in the way of a file", remedy="remove it first")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).replace(folder / name)


_BLOCK = 512
_CHUNK = 1 << 18
_MAX_EXTENSION_BYTES = 1 << 16  # a PAX or GNU header that carries a long name


class _Reader:
    """A tar stream inside gzip, read once from start to end.

    Every byte that comes out of the decompressor is counted against the caps before it is used, so an archive that
    lies about its sizes, or expands without end, costs at most one chunk beyond them. With `place`, which maps a
    name to where it goes or to None, members that go nowhere are passed over, whatever they are.
    """

    def __init__(self, source: Source, place: Callable[[str], str | None] | None = None) -> None:
        self._owned = isinstance(source, str | Path)
        self._place = place
        self._raw: IO[bytes]
        if isinstance(source, bytes):
            self._raw = io.BytesIO(source)
        elif isinstance(source, str | Path):
            self._raw = Path(source).open("rb")  # noqa: SIM115 - closed with this reader
        else:
            self._raw = source
        self._inflater = zlib.decompressobj(wbits=31)
        self._compressed = 0
        self._expanded = 0  # bytes out of the decompressor
        self._admitted = 0  # bytes of content that members claim
        self._buffer = b""
        self._count = 0
        self._seen: dict[str, bool] = {}  # name -> is it a folder; folders that names imply too
        self._left = 0  # content bytes of the current member, padding included

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._owned:
            self._raw.close()

    def members(self) -> Iterator[Member]:
        """Each member in turn; its content must be read, or is skipped, before the next."""
        count, extended = 0, {}
        while True:
            self._skip(self._left)
            self._left = 0
            header = self._exactly(_BLOCK)
            if header == bytes(_BLOCK):
                return
            kind, name, size = _parse_header(header)
            count += 1
            if count > (2 * MAX_MEMBERS if self._place is None else MAX_HEADERS):
                raise PackageError("the archive has too many members")
            if kind in (b"x", b"g", b"L"):
                if size > _MAX_EXTENSION_BYTES:
                    raise PackageError("the archive has a header that is too long")
                data = self._exactly(size)
                self._skip(-size % _BLOCK)
                if kind != b"g":  # a global header carries no names
                    extended = _parse_pax(data) if kind == b"x" else {"path": _text(data.rstrip(b"\0"))}
                continue
            name, size = extended.get("path", name), _size(extended.get("size"), size)
            extended = {}
            if self._place is not None:
                placed = self._place(name)
                if placed is None or kind in (b"1", b"2"):
                    self._skip(size + -size % _BLOCK if kind not in (b"1", b"2") else 0)
                    continue
                name = placed
            if kind not in (b"0", b"\0", b"5"):
                raise PackageError(f"the archive holds {name[:80]!r}, which is neither a regular file nor a folder")
            member = self._admit(name, size, folder=kind == b"5")
            if member is not None:
                yield member

    def content(self, member: Member) -> Iterator[bytes]:
        """The content of the member that `members` yielded last, in chunks."""
        remaining = member.size
        while remaining:
            chunk = self._exactly(min(_CHUNK, remaining))
            remaining -= len(chunk)
            self._left -= len(chunk)
            yield chunk

    def _admit(self, name: str, size: int, *, folder: bool) -> Member | None:
        if folder and size:
            raise PackageError(f"the archive holds a folder {name[:80]!r} with content")
        name = name.removeprefix("./").rstrip("/") if folder else name.removeprefix("./")
        if folder and name in ("", "."):
            return None
        _check_name(name)
        above = [str(parent) for parent in PurePosixPath(name).parents][:-1]
        if self._seen.get(name) is False or (name in self._seen and not folder):
            raise PackageError(f"the archive holds {name!r} twice")
        if any(self._seen.get(parent) is False for parent in above):
            raise PackageError(f"the archive holds {name!r} below a file")
        self._seen.update(dict.fromkeys(above, True))
        self._seen[name] = folder
        self._count += 1
        if self._count > MAX_MEMBERS:
            raise PackageError(f"the archive has more than {MAX_MEMBERS:,} members")
        self._admitted += size
        if self._admitted > MAX_EXPANDED_BYTES:
            raise PackageError(f"the archive expands beyond {MAX_EXPANDED_BYTES >> 20} MB at {name!r}")
        self._left = size + -size % _BLOCK
        return Member(name, size, folder)

    # --- bytes ---

    def _skip(self, count: int) -> None:
        while count:
            count -= len(self._exactly(min(_CHUNK, count)))

    def _exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._buffer += self._inflate()
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    def _inflate(self) -> bytes:
        """The next bytes, at most a chunk; raises at the end of the stream and at the caps."""
        while True:
            pending = self._inflater.unconsumed_tail
            if not pending:
                if self._inflater.eof:
                    raise PackageError("the archive is cut short")
                pending = self._raw.read(1 << 16)
                self._compressed += len(pending)
                if self._compressed > MAX_COMPRESSED_BYTES:
                    raise PackageError(f"the archive exceeds {MAX_COMPRESSED_BYTES >> 20} MB compressed")
                if not pending:
                    raise PackageError("the archive is cut short")
            try:
                data = self._inflater.decompress(pending, _CHUNK)
            except zlib.error:
                raise PackageError("the archive is not a .tar.gz, or damaged") from None
            self._expanded += len(data)
            allowed = MAX_EXPANDED_BYTES if self._place is None else MAX_REPOSITORY_BYTES
            if self._expanded > allowed + 4 * _BLOCK * (MAX_MEMBERS + 20):
                raise PackageError(f"the archive expands beyond {allowed >> 20} MB")
            if self._expanded > max(RATIO_FREE_BYTES, MAX_RATIO * self._compressed):
                raise PackageError(f"the archive expands to more than {MAX_RATIO} times its size")
            if data:
                return data


def _check_name(name: str) -> None:
    """A member's name: a plain relative path that means the same on every system."""
    shown = repr(name if len(name) <= 80 else f"{name[:77]}...")
    parts = name.split("/")
    if not name or name.startswith("/") or any(part in ("", ".", "..") for part in parts):
        raise PackageError(f"the path {shown} is not a plain relative path")
    if "\\" in name or ":" in parts[0] or not name.isprintable():
        raise PackageError(f"the path {shown} has a character that paths in a package may not have")
    if len(parts) > MAX_DEPTH:
        raise PackageError(f"the path {shown} lies more than {MAX_DEPTH} folders deep")
    lengths = [len(part.encode("utf-8", "replace")) for part in parts]
    if sum(lengths) + len(lengths) > MAX_NAME_BYTES or max(lengths) > 255:
        raise PackageError(f"the path {shown} is too long")


def _parse_header(header: bytes) -> tuple[bytes, str, int]:
    """Kind, name and content size of one tar header block."""
    expected = _octal(header[148:156])
    if sum(header[:148]) + sum(header[156:]) + 8 * ord(" ") != expected:
        raise PackageError("the archive is not a .tar.gz, or damaged")
    name = _text(header[:100].split(b"\0", 1)[0])
    if header[257:263] == b"ustar\0":
        prefix = _text(header[345:500].split(b"\0", 1)[0])
        name = f"{prefix}/{name}" if prefix else name
    return header[156:157], name, _octal(header[124:136])


def _octal(field_: bytes) -> int:
    text = field_.strip(b"\0 ")
    if not re.fullmatch(rb"[0-7]{0,12}", text):
        raise PackageError("the archive is not a .tar.gz, or damaged")
    return int(text or b"0", 8)


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise PackageError("the archive has a name that is not UTF-8") from None


def _parse_pax(data: bytes) -> dict[str, str]:
    """The records of a PAX header: "<length> <key>=<value>\\n" each."""
    records: dict[str, str] = {}
    while data:
        match = re.match(rb"(\d{1,6}) ", data)
        length = int(match[1]) if match else 0
        record = data[match.end() : length] if match else b""
        if not match or length > len(data) or not record.endswith(b"\n") or b"=" not in record:
            raise PackageError("the archive has a malformed header")
        key, value = record[:-1].split(b"=", 1)
        records[_text(key)] = _text(value)
        data = data[length:]
    if any(key.startswith("GNU.sparse") for key in records):
        raise PackageError("the archive holds a sparse file")
    return records


def _size(text: str | None, size: int) -> int:
    if text is None:
        return size
    if not re.fullmatch(r"\d{1,12}", text):
        raise PackageError("the archive has a malformed header")
    return int(text)
