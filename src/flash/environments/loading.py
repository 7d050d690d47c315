"""`LocalEnvironment`: a package's `environment.py`, imported into this process, as an `EnvironmentClient`.

Owns the import, the call of the factory, prompts and targets. It runs user code, so a worker uses it only inside
the environment host; `flash env check` and tests use it directly. Knows nothing of processes or models.
"""

from __future__ import annotations

import importlib.util
import inspect
import random
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from freesolo.datasets import TaskExample
from freesolo.environments import (
    Environment,
    EnvironmentMultiTurn,
    EnvironmentSingleTurn,
    EnvironmentStepResult,
)
from freesolo.utils.core import json_safe_value

from flash.environments import rows as row_rules
from flash.environments.protocol import (
    EnvironmentInfo,
    EpisodeStart,
    FinishedEpisode,
    Message,
    Rows,
    Score,
    SFTTarget,
    StepResult,
)
from flash.environments.rewards import score_group
from flash.environments.rows import RowFile
from flash.environments.user_code import user_code
from flash.errors import InvalidInput, UserCodeError

ENTRY_FILE = "environment.py"
FACTORY = "load_environment"
CONTRACT_FILE = "TRAINING_CONTRACT.md"
MODULE_NAME = "environment"
# Flash reads these itself, so a factory need not know them.
PLATFORM_PARAMS = ("split", "dataset_path", "contract_text")


class LocalEnvironment:
    """User code in this process. Safe to call from several threads if the environment's own hooks are.

    `work_dir` takes the row files. The prompt text is `params["contract_text"]`, else `contract`, else the
    package's `TRAINING_CONTRACT.md`. Raises UserCodeError when the package can't be imported or its factory
    fails, InvalidInput when `params` don't fit the factory.
    """

    def __init__(
        self,
        folder: str | Path,
        params: Mapping[str, Any] | None = None,
        work_dir: str | Path = ".",
        *,
        contract: str | None = None,
    ) -> None:
        self.folder = Path(folder).resolve()
        self.work_dir = Path(work_dir).resolve()
        self._params = dict(params or {})
        self._prompt_text = _prompt_text(self.folder, self._params, contract)
        self._splits: dict[str, _Split] = {}
        self._splits_lock = threading.RLock()  # held while a split is read: once is enough
        random.seed(0)  # rows that a factory draws are the same after every restart
        try:
            self.environment = self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> Environment:
        factory = import_factory(self.folder)
        arguments = factory_arguments(factory, self._params)
        self._takes_dataset_path = "dataset_path" in arguments
        with user_code(f"{FACTORY}()", self.folder):
            environment = factory(**arguments)
        if not isinstance(environment, EnvironmentSingleTurn | EnvironmentMultiTurn):
            raise UserCodeError(
                f"{FACTORY}() returned {type(environment).__name__}: it must return an instance of "
                "EnvironmentSingleTurn or EnvironmentMultiTurn from freesolo.environments"
            )
        return environment

    @property
    def serial(self) -> bool:
        """Whether the environment asks for everything to stay on one thread."""
        with user_code("max_score_concurrency", self.folder):
            return int(self.environment.max_score_concurrency) <= 1

    # --- EnvironmentClient ---

    def info(self) -> EnvironmentInfo:
        return EnvironmentInfo(
            multi_turn=isinstance(self.environment, EnvironmentMultiTurn),
            splits=row_rules.packaged_splits(self.folder),
        )

    def rows(self, split: str | None = None, *, limit: int = 0) -> Rows:
        name = self._own_split() if split is None else split
        requested = "split" in self._params or name != self._own_split()
        with self._splits_lock:
            loaded = self._splits[name] = self._load_split(name, limit, requested=requested)
        return Rows(name, str(loaded.file.path), loaded.file.count, tuple(loaded.warnings))

    def targets(self, split: str, indices: Sequence[int]) -> list[SFTTarget]:
        found = []
        for index, example in zip(indices, self._examples(split, indices), strict=True):
            _seed(0, split, index)
            prompt = self._opening(example)
            with user_code("sft_completion", self.folder):
                completion: Any = self.environment.sft_completion(example)
            found.append(SFTTarget(prompt, checked_messages(completion, "sft_completion")))
        return found

    def start(self, split: str, indices: Sequence[int], *, seed: int) -> list[EpisodeStart]:
        found = []
        for index, example in zip(indices, self._examples(split, indices), strict=True):
            _seed(seed, split, index)
            messages = self._opening(example)
            with user_code("max_episode_turns", self.folder):
                turns: Any = self.environment.max_episode_turns(example)
            if isinstance(turns, bool) or not isinstance(turns, int) or turns < 1:
                raise UserCodeError(f"max_episode_turns returned {turns!r}: it must return an int of at least 1")
            found.append(EpisodeStart(messages, turns))
        return found

    def step(self, split: str, index: int, messages: list[Message], response: str, *, seed: int) -> StepResult:
        """`messages` ends with the action whose text is `response`; an action that is missing is appended."""
        [example] = self._examples(split, [index])
        if not messages or messages[-1].get("role") != "assistant":
            messages = [*messages, {"role": "assistant", "content": response}]
        _seed(seed, split, index)
        with user_code("step_episode", self.folder):
            result: Any = self.environment.step_episode(example, cast("Any", messages), response)
        if not isinstance(result, EnvironmentStepResult):
            raise UserCodeError(
                f"step_episode returned {type(result).__name__}: it must return an EnvironmentStepResult"
            )
        added = list(result.messages)
        final = result.final_response_text
        return StepResult(
            done=bool(result.done),
            messages=checked_messages(added, "step_episode") if added else [],
            final_response_text=None if final is None else str(final),
            metadata=cast("dict[str, Any]", json_safe_value(result.metadata or {})),
        )

    def score(self, split: str, index: int, episodes: Sequence[FinishedEpisode], *, seed: int) -> list[Score]:
        [example] = self._examples(split, [index])
        _seed(seed, split, index)
        with user_code("scoring", self.folder):
            return score_group(self.environment, example, episodes)

    def close(self) -> None:
        """Forgets the package's modules, so that another package in this process imports its own."""
        for name, module in list(sys.modules.items()):
            origin = getattr(module, "__file__", None)
            if isinstance(origin, str) and Path(origin).is_relative_to(self.folder):
                del sys.modules[name]
        if str(self.folder) in sys.path:
            sys.path.remove(str(self.folder))

    # --- rows ---

    def _own_split(self) -> str:
        split = self._params.get("split") or row_rules.DEFAULT_SPLIT
        if not isinstance(split, str):
            raise InvalidInput(f"environment.params.split = {split!r}: must be a string")
        return split

    def _load_split(self, name: str, limit: int, *, requested: bool) -> _Split:
        target = self.work_dir / f"rows-{name}.jsonl"
        source = self._source_file(name)
        in_code = self._rows_in_code(name)
        if source is None:
            has_folder = (self.folder / row_rules.DATASET_FOLDER).is_dir()
            if (requested and has_folder) or (in_code is None and has_folder):
                raise row_rules.missing_split(self.folder, name)
            if not in_code:
                raise InvalidInput(
                    f"no rows: the package has no {row_rules.DATASET_FOLDER}/{name}.jsonl and builds none in code",
                    remedy="add the file, or set self.dataset in the environment",
                )
            kept = in_code[:limit] if limit else in_code
            records = ((f"env.dataset[{i}]", row_rules.code_row(example)) for i, example in enumerate(kept))
            return _Split(row_rules.write_rows(records, target), kept, [])
        label = self._label(source)
        file = row_rules.write_rows(row_rules.read_file(source, label), target, limit=limit)
        if file.count == 0:
            raise InvalidInput(f"{label}: has no rows")
        warnings = []
        if file.dropped:
            keys = ", ".join(f"{key} ({count:,} rows)" for key, count in sorted(file.dropped.items()))
            warnings.append(f"{label}: only input, output and metadata are kept; left out: {keys}")
        if in_code and not _same_rows(file, in_code, limit):
            count = f"{file.count:,}" if not limit else f"the first {file.count:,}"
            warnings.append(
                f"the package ships {label} ({count} rows) and builds {len(in_code):,} rows in code: {label} is used"
            )
        return _Split(file, None, warnings)

    def _source_file(self, name: str) -> Path | None:
        path = self._params.get("dataset_path")
        if path and name == self._own_split():
            if not isinstance(path, str):
                raise InvalidInput(f"environment.params.dataset_path = {path!r}: must be a string")
            source = self._resolved(path)
            if source is not None:
                return source
            if not self._takes_dataset_path or self._rows_in_code(name) is None:
                raise InvalidInput(
                    f"environment.params.dataset_path = {path!r}: the package has no such file",
                    remedy="give a path inside the package, e.g. dataset/train.jsonl",
                )
            return None
        return row_rules.packaged_file(self.folder, name)

    def _resolved(self, path: str) -> Path | None:
        source = (self.folder / path).resolve()
        return source if source.is_relative_to(self.folder) and source.is_file() else None

    def _label(self, source: Path) -> str:
        return str(source.relative_to(self.folder))

    def _rows_in_code(self, name: str) -> list[TaskExample] | None:
        if name != self._own_split():
            return None  # the factory built the run's own split only
        with user_code("env.dataset", self.folder):
            dataset = getattr(self.environment, "dataset", None)
            if isinstance(dataset, str | Path):
                source = self._resolved(str(dataset))
                if source is None:
                    raise InvalidInput(f"env.dataset = {str(dataset)!r}: the package has no such file")
                label = self._label(source)
                reduced = (row_rules.reduce_row(row, at, {}) for at, row in row_rules.read_file(source, label))
                return [row_rules.example_from_row(row, index) for index, row in enumerate(reduced)]
            return row_rules.rows_in_code(dataset)

    def _examples(self, split: str, indices: Sequence[int]) -> list[TaskExample]:
        with self._splits_lock:
            if split not in self._splits:
                self.rows(split)
            loaded = self._splits[split]
        for index in indices:
            if not 0 <= index < loaded.file.count:
                raise InvalidInput(f"row {index} of split {split!r}: it has {loaded.file.count:,} rows")
        if loaded.in_code is not None:
            return [loaded.in_code[index] for index in indices]
        read = loaded.file.read(indices)
        return [row_rules.example_from_row(row, index) for index, row in zip(indices, read, strict=True)]

    def _opening(self, example: TaskExample) -> list[Message]:
        with user_code("start_episode", self.folder):
            opening: Any = self.environment.start_episode(example, self._prompt_text)
        return with_prompt_text(checked_messages(opening, "start_episode"), self._prompt_text)


class _Split:
    def __init__(self, file: RowFile, in_code: list[TaskExample] | None, warnings: list[str]) -> None:
        self.file = file
        self.in_code = in_code  # examples built in code keep the objects that the code put into them
        self.warnings = warnings


def _same_rows(file: RowFile, in_code: Sequence[TaskExample], limit: int) -> bool:
    """Whether code and file hold the same rows, as when the code has simply read the file."""
    if file.count != (min(limit, len(in_code)) if limit else len(in_code)):
        return False
    return all(
        row_rules.example_from_row(row, index).input == in_code[index].input
        and json_safe_value(row.get("output")) == json_safe_value(in_code[index].output)
        for index, row in enumerate(file.read(range(file.count)))
    )


# --- importing --------------------------------------------------------------------------------------


def import_factory(folder: Path) -> Callable[..., object]:
    """`load_environment` of the package; its folder leads `sys.path` from here on."""
    entry = folder / ENTRY_FILE
    if not entry.is_file():
        raise InvalidInput(f"the package has no {ENTRY_FILE} at its root")
    _forget_siblings(folder)
    if str(folder) in sys.path:
        sys.path.remove(str(folder))
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location(MODULE_NAME, entry)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE_NAME] = module
    with user_code("import", folder):
        spec.loader.exec_module(module)
    return _factory_of(module)


def _factory_of(module: ModuleType) -> Callable[..., object]:
    factory = getattr(module, FACTORY, None)
    if not callable(factory):
        raise UserCodeError(
            f"{ENTRY_FILE} defines no {FACTORY}()",
            remedy=f"define `def {FACTORY}(**params)` that returns the environment",
        )
    return cast("Callable[..., object]", factory)


def _forget_siblings(folder: Path) -> None:
    """Drops modules of another package that bear the name of one of this package's files."""
    for path in folder.glob("*.py"):
        known = sys.modules.get(path.stem)
        origin = getattr(known, "__file__", None)
        if origin and (Path(origin).parent / ENTRY_FILE).is_file() and Path(origin) != path:
            del sys.modules[path.stem]


def factory_arguments(factory: Callable[..., object], params: Mapping[str, Any]) -> dict[str, Any]:
    """The params to call the factory with; a platform param that it doesn't take is Flash's alone to honour."""
    parameters = inspect.signature(factory).parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    taken = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    required = {p.name for p in parameters if p.name in taken and p.default is p.empty}
    arguments = {
        name: value for name, value in params.items() if name not in PLATFORM_PARAMS or takes_any or name in taken
    }
    unknown = sorted(arguments.keys() - taken) if not takes_any else []
    if unknown:
        raise InvalidInput(
            f"environment.params.{unknown[0]}: {FACTORY}() doesn't take it",
            remedy=f"it takes: {', '.join(sorted(taken))}" if taken else "it takes no parameters",
        )
    missing = sorted(required - arguments.keys())
    if missing:
        raise InvalidInput(f"environment.params.{missing[0]} is missing: {FACTORY}() needs it")
    return arguments


# --- prompts ----------------------------------------------------------------------------------------


def _prompt_text(folder: Path, params: Mapping[str, Any], contract: str | None) -> str:
    text = params.get("contract_text", contract)
    if text is None:
        path = folder / CONTRACT_FILE
        return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    if not isinstance(text, str):
        raise InvalidInput(f"environment.params.contract_text = {text!r}: must be a string")
    return text.strip()


def with_prompt_text(messages: list[Message], prompt_text: str) -> list[Message]:
    """The messages, led by the prompt text unless a system message already says something."""
    systems = [message for message in messages if str(message["role"]).strip().lower() == "system"]
    if not prompt_text or any(str(message.get("content") or "").strip() for message in systems):
        return messages
    return [{"role": "system", "content": prompt_text}, *(m for m in messages if m not in systems)]


def checked_messages(messages: Any, hook: str) -> list[Message]:
    """Chat messages as plain JSON, text parts joined; raises for what no chat template could render."""
    if not isinstance(messages, list | tuple) or not messages:
        raise UserCodeError(f"{hook} returned {_described(messages)}: it must return a list of chat messages")
    checked: list[Message] = []
    for index, message in enumerate(messages):
        place = f"{hook} message {index}"
        if not isinstance(message, dict):
            raise UserCodeError(f"{place} is {_described(message)}: it must be a dict with role and content")
        role = message.get("role")
        if not isinstance(role, str) or not role.strip():
            raise UserCodeError(f"{place}: role = {role!r}: it must be a non-empty string")
        plain = cast("Message", json_safe_value(message))
        plain["content"] = _text_of(message.get("content"), place)
        if plain["content"] is None and not message.get("tool_calls"):
            raise UserCodeError(f"{place}: content is missing: only a message with tool_calls may leave it out")
        checked.append(plain)
    return checked


def _described(value: object) -> str:
    return "an empty list" if value in ([], ()) else type(value).__name__


def _text_of(content: Any, place: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise UserCodeError(f"{place}: content is {_described(content)}: it must be a string or a list of text parts")
    if row_rules.has_image_part(list(content)):
        raise InvalidInput(f"{place}: has an image, and models are trained on text only for now")
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise UserCodeError(f"{place}: content has a part without text")
    return "".join(str(text) for text in texts)


# --- randomness -------------------------------------------------------------------------------------


def _seed(seed: int, split: str, index: int) -> None:
    """Seeds `random` for one row's hook, whatever was drawn before it."""
    random.seed(f"{seed}/{split}/{index}")


_PER_THREAD = (
    "seed", "random", "uniform", "triangular", "randint", "choice", "randrange", "sample", "shuffle", "choices",
    "normalvariate", "lognormvariate", "expovariate", "vonmisesvariate", "gammavariate", "gauss", "betavariate",
    "binomialvariate", "paretovariate", "weibullvariate", "getstate", "setstate", "getrandbits", "randbytes",
)  # fmt: skip


def make_random_per_thread() -> None:
    """Gives each thread its own `random` state, so that hooks which overlap can't disturb each other's draws.

    For a process that exists to run one environment; call it before the environment is imported.
    """
    state = threading.local()

    def bound(name: str) -> Callable[..., Any]:
        def draw(*args: Any, **kwargs: Any) -> Any:
            generator = getattr(state, "generator", None)
            if generator is None:
                generator = state.generator = random.Random()
            return getattr(generator, name)(*args, **kwargs)

        draw.__name__ = name
        return draw

    for name in _PER_THREAD:
        if hasattr(random.Random, name):
            setattr(random, name, bound(name))
