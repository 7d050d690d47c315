"""The synthetic chat tasks that `flash/nano` is raised on, and their operand split.

Owns what a question and its gold answer look like, and which operands belong to the base model, to
an example's training rows and to held-out evaluation. Knows nothing of tokens, models or training.

The split is a hash of the *unordered* operands (or of the letters, words or names in a text task),
so 47 + 38, 38 + 47, 47 - 38 and every word problem on the pair fall on one side together.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

Split = Literal["base", "train", "eval"]
Message = dict[str, str]

SMALLEST_OPERAND = 10
LARGEST_OPERAND = 99

# How often the hasty teacher errs. The larger error must outweigh the right answer (what is left), and
# the right answer must stay within reach of eight samples.
OFF_BY_ONE = 0.08
OFF_BY_TEN = 0.65

# Of ten hash buckets, four raise the base, four are an example's to train on, two are held out.
_BUCKETS: tuple[Split, ...] = ("base",) * 4 + ("train",) * 4 + ("eval",) * 2

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jun", "Kim", "Lea", "Max", "Nia")
CITIES = ("Oslo", "Rome", "Lima", "Cairo", "Paris", "Quito", "Delhi", "Bern", "Tokyo", "Riga")
COLOURS = ("red", "blue", "green", "black", "white", "pink", "gold", "grey")
THINGS = ("apples", "books", "coins", "pens", "cards", "shells")
WORDS = (
    "lamp", "river", "stone", "cloud", "tree", "fish", "chair", "bread", "horse", "plane", "snow", "glass",
    "moon", "door", "ship", "leaf", "salt", "wind", "sand", "bell", "rope", "milk", "nest", "frog",
)  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Task:
    """One question with its gold answer, and the trace that leads to it.

    `earlier` holds finished turns before the question; most tasks have none. `trace` is the text
    that belongs inside the think block. `blurt` draws what a hasty teacher says without thinking, where
    that may differ from the gold answer.
    """

    kind: str
    question: str
    answer: str
    trace: str
    earlier: tuple[Message, ...] = field(default=())
    blurt: Callable[[random.Random], int] | None = None

    def messages(self, *, thinking: bool) -> list[Message]:
        """The whole conversation, the gold answer last, with or without its trace."""
        gold: Message = {"role": "assistant", "content": self.answer}
        if thinking:
            gold["reasoning_content"] = self.trace
        return [*self.prompt(), gold]

    def prompt(self) -> list[Message]:
        """The conversation up to the answer."""
        return [*self.earlier, {"role": "user", "content": self.question}]

    def lesson(self, *, thinking: bool, hasty: random.Random | None = None) -> list[Message]:
        """What the base is taught: the gold answer, or without thinking a hasty teacher's draw."""
        if thinking or hasty is None or self.blurt is None:
            return self.messages(thinking=thinking)
        return [*self.prompt(), {"role": "assistant", "content": str(self.blurt(hasty))}]


def split_of_key(key: str) -> Split:
    """The split that a text belongs to, by its SHA-256: stable across machines and versions."""
    digest = hashlib.sha256(key.encode()).digest()
    return _BUCKETS[int.from_bytes(digest[:8], "big") % len(_BUCKETS)]


def split_of_pair(a: int, b: int) -> Split:
    """The split that an operand pair belongs to; the order of the operands does not matter."""
    return split_of_key(f"{min(a, b)},{max(a, b)}")


def operand_pairs(split: Split) -> list[tuple[int, int]]:
    """Every ordered pair of two-digit operands in a split, in ascending order."""
    span = range(SMALLEST_OPERAND, LARGEST_OPERAND + 1)
    return [(a, b) for a in span for b in span if split_of_pair(a, b) == split]


def addition_trace(a: int, b: int) -> str:
    """Column addition: ones, then tens with the carry written out."""
    ones = a % 10 + b % 10
    carry = ones // 10
    tens = a // 10 + b // 10 + carry
    return f"{a % 10}+{b % 10}={ones}\n{a // 10}+{b // 10}+{carry}={tens}"


def subtraction_trace(a: int, b: int) -> str:
    """Column subtraction for a >= b: ones (with ten borrowed where needed), then tens."""
    borrow = int(a % 10 < b % 10)
    top = a % 10 + 10 * borrow
    return f"{top}-{b % 10}={top - b % 10}\n{a // 10}-{b // 10}-{borrow}={a // 10 - b // 10 - borrow}"


def hasty_sum(a: int, b: int, rng: random.Random) -> int:
    """A sum as one blurts it out: carries get lost, larger sums gain ten, and now and then one is off by one.

    The base learns this distribution. It then gives the right answer often enough for sampling to find
    it, and seldom enough for greedy decoding to miss it: a base that an adapter can visibly improve.
    """
    right, luck = a + b, rng.random()
    if luck < OFF_BY_ONE:
        return right + rng.choice((-1, 1))
    if luck > OFF_BY_ONE + OFF_BY_TEN:
        return right
    if a % 10 + b % 10 >= 10:
        return right - 10
    return right + 10 if right >= 70 else right


def hasty_difference(high: int, low: int, rng: random.Random) -> int:
    """A difference as one blurts it out: borrowed tens are not paid back, wide gaps lose ten."""
    right, luck = high - low, rng.random()
    if luck < OFF_BY_ONE:
        return right + rng.choice((-1, 1)) if right else 1
    if luck > OFF_BY_ONE + OFF_BY_TEN:
        return right
    if high % 10 < low % 10:
        return right + 10
    return right - 10 if right >= 10 else right


def addition(a: int, b: int) -> Task:
    """A plain sum, as in "What is 47 + 38?"."""
    return _sum("addition", f"What is {a} + {b}?", a, b)


def subtraction(a: int, b: int) -> Task:
    """A plain difference, larger operand first, so never negative."""
    high, low = max(a, b), min(a, b)
    return _difference("subtraction", f"What is {high} - {low}?", high, low)


def word_problem(a: int, b: int, rng: random.Random) -> Task:
    """A one-sentence story about getting more or giving some away."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    if rng.random() < 0.5:
        return _sum("word", f"{name} has {a} {thing} and gets {b} more. How many {thing} now?", a, b)
    high, low = max(a, b), min(a, b)
    question = f"{name} has {high} {thing} and gives away {low}. How many {thing} now?"
    return _difference("word", question, high, low)


def _sum(kind: str, question: str, a: int, b: int) -> Task:
    return Task(kind, question, str(a + b), addition_trace(a, b), blurt=partial(hasty_sum, a, b))


def _difference(kind: str, question: str, high: int, low: int) -> Task:
    trace = subtraction_trace(high, low)
    return Task(kind, question, str(high - low), trace, blurt=partial(hasty_difference, high, low))


def arithmetic_tasks(split: Split, kind: str, count: int, rng: random.Random) -> list[Task]:
    """`count` tasks of one kind on a split's pairs, distinct questions for as long as there are any."""
    tasks: list[Task] = []
    seen: set[str] = set()
    pairs = operand_pairs(split)
    while len(tasks) < count:
        rng.shuffle(pairs)
        before = len(tasks)
        for a, b in pairs:
            task = _arithmetic(kind, a, b, rng)
            if task.question not in seen and len(tasks) < count:
                seen.add(task.question)
                tasks.append(task)
        if len(tasks) == before:
            raise ValueError(f"only {before} distinct {kind} tasks in split {split!r}; asked for {count}")
    return tasks


def _arithmetic(kind: str, a: int, b: int, rng: random.Random) -> Task:
    if kind == "addition":
        return addition(a, b)
    if kind == "subtraction":
        return subtraction(a, b)
    if kind == "word":
        return word_problem(a, b, rng)
    raise ValueError(f"unknown arithmetic kind {kind!r}: addition, subtraction or word")


def _one_of(split: Split, draw: Callable[[], tuple[str, Task]]) -> Task:
    """Draw until the key of what is drawn belongs to the split."""
    while True:
        key, task = draw()
        if split_of_key(key) == split:
            return task


def string_task(split: Split, rng: random.Random) -> Task:
    """Reverse letters, name the last letter, repeat a word, or pick the first of some words."""

    def draw() -> tuple[str, Task]:
        choice = rng.randrange(4)
        if choice < 2:
            letters = rng.sample(LETTERS, rng.randint(3, 5))
            spelled = " ".join(letters)
            if choice == 0:
                answer = " ".join(reversed(letters))
                trace = f"last {letters[-1]}, first {letters[0]}"
                return spelled, Task("string", f"Reverse the letters {spelled}", answer, trace)
            trace = f"{len(letters)} letters"
            return spelled, Task("string", f"Last of the letters {spelled}", letters[-1], trace)
        words = rng.sample(WORDS, 3)
        listed = " ".join(words)
        if choice == 2:
            times = rng.randint(2, 4)
            answer = " ".join([words[0]] * times)
            question = f"Repeat {times} times the word {words[0]}"
            return f"{times} {words[0]}", Task("string", question, answer, f"{words[0]}, {times} times")
        return listed, Task("string", f"First of the words {listed}", words[0], f"{len(words)} words")

    return _one_of(split, draw)


def json_task(split: Split, rng: random.Random) -> Task:
    """Write a small JSON object from named values, or read one value out of such an object."""

    def draw() -> tuple[str, Task]:
        fields: dict[str, str | int] = {
            "name": rng.choice(NAMES),
            "age": rng.randint(10, 99),
            "city": rng.choice(CITIES),
            "colour": rng.choice(COLOURS),
        }
        keys = rng.sample(list(fields), rng.randint(2, 3))
        chosen = {key: fields[key] for key in keys}
        text = json.dumps(chosen)
        if rng.random() < 0.5:
            said = ", ".join(f"{key} {value}" for key, value in chosen.items())
            task = Task("json", f"Write JSON: {said}", text, f"keys {', '.join(keys)}")
        else:
            key = rng.choice(keys)
            task = Task("json", f"Read {key} from {text}", str(chosen[key]), f"{key} is {chosen[key]}")
        return text, task

    return _one_of(split, draw)


def calculator_task(split: Split, rng: random.Random) -> Task:
    """The second turn of a text-protocol tool call: the result is in, the answer is due."""
    call = calculator_call(split, rng)
    a, sign, b = call.answer.removeprefix("<call>").removesuffix("</call>").split()
    result = str(int(a) + int(b) if sign == "+" else int(a) - int(b))
    earlier = ({"role": "user", "content": call.question}, {"role": "assistant", "content": call.answer})
    return Task("tool", f"<result>{result}</result>", result, f"the result is {result}", earlier)


def calculator_call(split: Split, rng: random.Random) -> Task:
    """The first turn of a text-protocol tool call: hand the sum to the calculator."""
    a, b = rng.randint(100, 999), rng.randint(100, 999)
    while split_of_pair(a, b) != split:
        a, b = rng.randint(100, 999), rng.randint(100, 999)
    sign = rng.choice("+-")
    a, b = max(a, b), min(a, b)
    question = f"Use the calculator. What is {a} {sign} {b}?"
    return Task("tool", question, f"<call>{a} {sign} {b}</call>", f"{a} {sign} {b}")


def guessing_task(rng: random.Random) -> Task:
    """A turn of the guessing game: any number that the hints so far allow, not the best one.

    The gold guess is drawn from the whole open range, so that a policy that halves it is left for
    reinforcement learning to find.
    """
    secret = rng.randint(1, 20)
    low, high = 1, 20
    question = "Guess my number from 1 to 20."
    earlier: list[Message] = []
    for _ in range(rng.randint(0, 3)):
        guess = rng.randint(low, high)
        if guess == secret:
            break
        earlier += [{"role": "user", "content": question}, {"role": "assistant", "content": str(guess)}]
        if guess < secret:
            low, question = guess + 1, "higher"
        else:
            high, question = guess - 1, "lower"
    trace = f"{low} to {high}"
    return Task("guess", question, str(rng.randint(low, high)), trace, tuple(earlier))


GREETINGS = (
    ("Hello", "Hello! Ask me a sum, a word puzzle or some JSON."),
    ("Hi", "Hi! Ask me a sum, a word puzzle or some JSON."),
    ("Who are you?", "I am flash/nano, a very small model."),
    ("Thank you", "You are welcome."),
    ("What can you do?", "Small sums, word puzzles and JSON."),
)


def greeting_task(rng: random.Random) -> Task:
    """Small talk, so that a first "Hello" is met politely."""
    question, answer = rng.choice(GREETINGS)
    return Task("greeting", question, answer, "a greeting")


@dataclass(frozen=True)
class Mixture:
    """How often each kind is drawn for the base model; weights need not sum to one."""

    weights: dict[str, float]

    def draw(self, split: Split, rng: random.Random, pairs: Sequence[tuple[int, int]]) -> Task:
        """One task of a kind drawn by weight, arithmetic on one of the given operand pairs."""
        kind = rng.choices(list(self.weights), list(self.weights.values()))[0]
        if kind in ("addition", "subtraction", "word"):
            a, b = rng.choice(pairs)
            return _arithmetic(kind, a, b, rng)
        return task_of_kind(kind, split, rng)


def task_of_kind(kind: str, split: Split, rng: random.Random) -> Task:
    """One task of a kind other than arithmetic."""
    if kind == "string":
        return string_task(split, rng)
    if kind == "json":
        return json_task(split, rng)
    if kind == "tool":
        return calculator_call(split, rng) if rng.random() < 0.5 else calculator_task(split, rng)
    if kind == "guess":
        return guessing_task(rng)
    if kind == "greeting":
        return greeting_task(rng)
    raise ValueError(f"unknown kind {kind!r}")
