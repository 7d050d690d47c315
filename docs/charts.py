"""Charts for the pages, as small SVG files: bars with spread, lengths of time stacked in a row, and curves.

Owns how a chart looks. Pure text in and out: no script, no font and nothing from a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.sax.saxutils import escape

INK, FAINT, GROUND = "#24292f", "#8c959f", "#ffffff"
COLOURS = (
    "#e8590c", "#1971c2", "#2f9e44", "#9c36b5", "#e0a800", "#0c8599", "#c2255c", "#5c940d", "#495057", "#a61e4d",
)  # fmt: skip
WIDTH, LINE, LEFT, RIGHT = 760, 30, 250, 150  # pixels


@dataclass(frozen=True)
class Bar:
    """A median with the lowest and the highest value."""

    label: str
    value: float
    low: float
    high: float


def bars(title: str, unit: str, rows: Sequence[Bar]) -> str:
    """Horizontal bars from zero, with a line from the lowest to the highest value."""
    longest = max((row.high for row in rows), default=0.0) or 1.0
    scale = (WIDTH - LEFT - RIGHT) / longest
    shapes = [_text(16, 24, title, weight="bold")]
    for place, row in enumerate(rows):
        top = 42 + place * LINE
        colour = COLOURS[place % len(COLOURS)]
        middle = top + LINE / 2 - 4
        shapes += [
            _text(LEFT - 10, middle + 4, row.label, anchor="end"),
            _box(LEFT, top, row.value * scale, LINE - 8, colour),
            _line(LEFT + row.low * scale, middle, LEFT + row.high * scale, middle),
            _text(LEFT + row.high * scale + 10, middle + 4, f"{number(row.value)} {unit}".strip()),
        ]
    return _svg(title, 42 + len(rows) * LINE + 10, shapes)


def stacks(title: str, rows: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> str:
    """Rows of (label, (part, seconds) in order); each row fills the width, its parts by their share."""
    shapes = [_text(16, 24, title, weight="bold")]
    top = 44.0
    for label, parts in rows:
        total = sum(seconds for _, seconds in parts) or 1.0
        shapes.append(_text(16, top + 12, f"{label}: {number(total)} s", fill=INK))
        left = 16.0
        for place, (part, seconds) in enumerate(parts):
            width = seconds / total * (WIDTH - 32)
            colour = COLOURS[place % len(COLOURS)]
            shapes.append(_box(left, top + 20, width, 24, colour, tip=f"{part}: {seconds:.3g} s"))
            left += width
        top += 52
        for place, (part, seconds) in enumerate(parts):
            column, line = place % 3, place // 3
            x, y = 16 + column * (WIDTH - 32) / 3, top + line * 20
            shapes.append(_box(x, y, 11, 11, COLOURS[place % len(COLOURS)]))
            shapes.append(_text(x + 17, y + 10, f"{part}  {seconds / total:.0%}", size=12))
        top += (len(parts) + 2) // 3 * 20 + 18
    return _svg(title, top, shapes)


def panels(title: str, unit: str, curves: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """Two curves a row, each over its own values (a bar's label) at even distances and with its own scale from zero."""
    width, height = (WIDTH - 32) / 2, 190
    shapes = [_text(16, 24, title, weight="bold")]
    for place, (name, points) in enumerate(curves):
        left, top = 16 + place % 2 * width, 40 + place // 2 * height
        colour = COLOURS[place % len(COLOURS)]
        scale = (height - 84) / (max((point.high for point in points), default=0.0) or 1.0)
        ground, apart = top + height - 44, (width - 60) / max(1, len(points) - 1)
        at = [(left + 26 + place * apart, ground - point.value * scale) for place, point in enumerate(points)]
        shapes += [_text(left, top + 14, f"{name}, {unit}"), _line(left + 10, ground, left + width - 16, ground)]
        shapes += [_line(*before, *after, colour=colour) for before, after in pairwise(at)]
        for point, (x, y) in zip(points, at, strict=True):
            shapes += [
                _line(x, ground - point.low * scale, x, ground - point.high * scale),
                _box(x - 3, y - 3, 6, 6, colour),
                _text(x, ground - point.high * scale - 6, f"{number(point.value)}", anchor="middle", size=11),
                _text(x, ground + 16, point.label, anchor="middle", fill=FAINT, size=11),
            ]
    return _svg(title, 40 + (len(curves) + 1) // 2 * height, shapes)


def number(value: float) -> str:
    """Three digits that count, thousands set apart."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _svg(title: str, height: float, shapes: Sequence[str]) -> str:
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="sans-serif">'
    ground = f'<rect width="100%" height="100%" fill="{GROUND}"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", ground, *shapes, "</svg>"]) + "\n"


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal", size: int = 13, fill: str = INK
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size}" font-weight="{weight}" fill="{fill}">{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, fill: str, *, tip: str = "") -> str:
    shape = f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.0):.1f}" height="{height:.1f}" fill="{fill}"'
    return f"{shape}><title>{escape(tip)}</title></rect>" if tip else f"{shape}/>"


def _line(x1: float, y1: float, x2: float, y2: float, *, colour: str = INK) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="1.5"/>'
