"""Makes `docs/images/demo.svg`: a recording of a real `flash train` in a terminal, as one animated SVG.

    .venv/bin/python docs/picture.py            the demo: examples/arithmetic by SFT, a minute or two
    .venv/bin/python docs/picture.py --set train.max_steps=100      other arguments go to `flash train`

The commands run in a pseudo-terminal under an empty FLASH_HOME. A terminal emulator turns what they print
into screens; each line of the SVG is shown while it was on the screen, on a shortened clock. Where nothing is
animated (a plain viewer, or a reader who asked for reduced motion) the last screen stands. The file needs no
script, no font and nothing from a network.
"""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import pyte

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "images" / "demo.svg"
COLUMNS, ROWS = 114, 26
PUSH = ["flash", "env", "push", "--name", "arithmetic", "examples/arithmetic"]
TRAIN = ["flash", "train", "examples/arithmetic/sft.toml"]

FRAMES = 40  # distinct screens kept, spread over the recording
SECONDS, HOLD = 9.0, 5.0  # the shortened clock, and how long the last screen stands
CHARACTER, LINE, MARGIN, BAR = 8.0, 18.0, 18.0, 34.0  # pixels
INK = {
    "default": "#d7dde5",
    "black": "#6b7684",
    "brightblack": "#7d8896",
    "red": "#ff7b72",
    "green": "#56d364",
    "brown": "#e3b341",
    "blue": "#79c0ff",
    "magenta": "#d2a8ff",
    "cyan": "#56d4dd",
    "white": "#d7dde5",
}
ACCENT = "#f0883e"  # of the progress bar, whose colour in Rich's palette is hard to read on a dark ground

Run = tuple[int, str, str, bool]  # column, text, colour, bold
Line = tuple[Run, ...]
Screen = tuple[Line, ...]


# --- recording ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    time: float
    text: str


def record(commands: list[list[str]], home: Path) -> list[Chunk]:
    """What a terminal receives while the commands run, one after the other, each after its prompt."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("FLASH_", "FREESOLO_"))}
    variables |= {"FLASH_HOME": str(home), "TERM": "xterm-256color", "COLORTERM": ""}
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables.get('PATH', '')}"
    chunks: list[Chunk] = []
    for command in commands:
        chunks.append(Chunk(time.monotonic(), f"\x1b[90m$\x1b[0m \x1b[1m{' '.join(command)}\x1b[0m\r\n"))
        chunks.extend(_record(command, variables))
        chunks.append(Chunk(time.monotonic(), "\r\n"))
    return chunks


def _record(command: list[str], variables: dict[str, str]) -> Iterator[Chunk]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    process = subprocess.Popen(command, cwd=ROOT, env=variables, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while True:
        try:
            data = os.read(ours, 1 << 16)
        except OSError:  # Linux: the other end is closed
            break
        if not data:
            break
        yield Chunk(time.monotonic(), decoder.decode(data))
    os.close(ours)
    if process.wait():
        raise SystemExit(f"error: {' '.join(command)} ended with exit code {process.returncode}")


# --- emulating ----------------------------------------------------------------------------------------


def screens(chunks: list[Chunk]) -> list[tuple[float, Screen]]:
    """The distinct screens, each with the time at which it appeared."""
    terminal = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.Stream(terminal)
    found: list[tuple[float, Screen]] = []
    for chunk in chunks:
        stream.feed(_SGR.sub(_without_faint, chunk.text))
        screen = tuple(_line(terminal, row) for row in range(ROWS))
        if not found or screen != found[-1][1]:
            found.append((chunk.time, screen))
    return found


_SGR = re.compile(r"\x1b\[([\d;]*)m")


def _without_faint(match: re.Match[str]) -> str:
    """The emulator knows no faint text (2): grey says the same."""
    codes = match[1].split(";")
    if "38" in codes or "48" in codes:
        return match[0]
    return f"\x1b[{';'.join('90' if code == '2' else code for code in codes)}m"


def _line(terminal: pyte.Screen, row: int) -> Line:
    runs: list[Run] = []
    for column in range(COLUMNS):
        cell = terminal.buffer[row][column]
        colour = _colour(cell.fg)
        if runs and runs[-1][0] + len(runs[-1][1]) == column and runs[-1][2:] == (colour, cell.bold):
            start, text, *_ = runs[-1]
            runs[-1] = (start, text + cell.data, colour, cell.bold)
        else:
            runs.append((column, cell.data, colour, cell.bold))
    return tuple(run for run in map(_trimmed, runs) if run[1])


def _trimmed(run: Run) -> Run:
    column, text, colour, bold = run
    return column + len(text) - len(text.lstrip()), text.strip(), colour, bold


def _colour(name: str) -> str:
    if name in INK:
        return INK[name]
    red, green, blue = (int(name[place : place + 2], 16) for place in (0, 2, 4))
    return "#30363d" if max(red, green, blue) < 96 else ACCENT


# --- drawing ------------------------------------------------------------------------------------------


def draw(found: list[tuple[float, Screen]]) -> str:
    """The SVG: a window, and every line with the stretch of the clock in which it is on the screen."""
    kept = _spread(found)
    began, took = kept[0][0], max(kept[-1][0] - kept[0][0], 1e-9)
    # Half real time, half one share a screen: neither a long wait nor a burst of lines takes the whole clock.
    starts = [
        SECONDS * (0.5 * (at - began) / took + 0.5 * place / max(len(kept) - 1, 1))
        for place, (at, _) in enumerate(kept)
    ]
    total = SECONDS + HOLD
    used = max(row for _, screen in kept for row, line in enumerate(screen) if line) + 1
    styles: dict[tuple[int, int], str] = {}
    texts: list[str] = []
    for row in range(used):
        for line, first, end in _stretches([screen[row] for _, screen in kept]):
            whole = (first, end) == (0, len(kept))
            name = "" if whole else styles.setdefault((first, end), f"s{len(styles)}")
            kind = f' class="{name}"' if name else ""
            texts.append(f"<g{kind}>{''.join(_text(row, run) for run in line)}</g>")
    rules = [_rule(name, first, end, starts, total) for (first, end), name in styles.items()]
    width = 2 * MARGIN + COLUMNS * CHARACTER
    height = BAR + used * LINE + MARGIN
    dots = "".join(
        f'<circle cx="{20 + 18 * place}" cy="18" r="5.5" fill="{colour}"/>'
        for place, colour in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xml:space="preserve" role="img" '
        f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        'aria-label="flash train, recorded in a terminal">\n'
        "<style>text{font:13.3px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;"
        "white-space:pre}.b{font-weight:700}\n"
        + "\n".join(rules)
        + "\n@media(prefers-reduced-motion:reduce){g{animation:none!important}}</style>\n"
        f'<rect width="{width:g}" height="{height:g}" rx="10" fill="#0d1117" stroke="#30363d"/>{dots}\n'
        + "\n".join(texts)
        + "\n</svg>\n"
    )


def _spread(found: list[tuple[float, Screen]]) -> list[tuple[float, Screen]]:
    if len(found) <= FRAMES:
        return found
    return [found[place * (len(found) - 1) // (FRAMES - 1)] for place in range(FRAMES)]


def _stretches(lines: list[Line]) -> Iterator[tuple[Line, int, int]]:
    """Each non-empty line of one row, with the first frame that has it and the first that no longer does."""
    first = 0
    for place in range(1, len(lines) + 1):
        if place == len(lines) or lines[place] != lines[first]:
            if lines[first]:
                yield lines[first], first, place
            first = place


def _rule(name: str, first: int, end: int, starts: list[float], total: float) -> str:
    """Opacity over the clock, which begins with the last screen, so that a first look shows the result."""
    stays = end == len(starts)
    play, at = 100 * HOLD / total, 100 * (HOLD + starts[first]) / total
    frames = f"0%{{opacity:{int(stays)}}}"
    frames += f"{play:.2f}%{{opacity:0}}" if first else ""
    frames += f"{at:.2f}%{{opacity:1}}"
    frames += "" if stays else f"{100 * (HOLD + starts[end]) / total:.2f}%,100%{{opacity:0}}"
    return (
        f"@keyframes {name}{{{frames}}}"
        f".{name}{{opacity:{int(stays)};animation:{name} {total:g}s step-end infinite}}"
    )


def _text(row: int, run: Run) -> str:
    column, text, colour, bold = run
    kind = ' class="b"' if bold else ""
    x, y = MARGIN + column * CHARACTER, BAR + (row + 0.75) * LINE
    length = len(text) * CHARACTER
    return f'<text{kind} x="{x:g}" y="{y:g}" fill="{colour}" textLength="{length:g}">{escape(text)}</text>'


def main() -> None:
    train = [*TRAIN, *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        try:
            chunks = record([PUSH, train], home)
        finally:
            subprocess.run(
                [sys.executable, "-m", "flash.cli.main", "server", "stop"],
                env={**os.environ, "FLASH_HOME": str(home)}, check=False, stdout=subprocess.DEVNULL,
            )  # fmt: skip
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(draw(screens(chunks)), encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)} ({TARGET.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
