"""Charts as inline SVG: no script, no external resource, colours from the page's style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

LABEL, PLOT, VALUE, ROW = 205, 205, 80, 28
"""Widths of the three columns and height of a row, in units of the drawing."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A row with a value and, where there is one, its interval."""

    label: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None
    strong: bool = False


def bars(rows: Sequence[Bar], title: str) -> str:
    """Horizontal bars from zero, the value beside each."""
    most = max([row.high if row.high is not None else row.value for row in rows], default=0.0)
    scale = PLOT / most if most > 0 else 0.0
    parts = []
    for at, row in enumerate(rows):
        y = at * ROW
        name = "bar strong" if row.strong else "bar"
        parts.append(_label(row.label, y))
        parts.append(
            f'<rect class="{name}" x="{LABEL}" y="{y + 5}" width="{max(row.value, 0) * scale:.1f}" '
            f'height="{ROW - 10}"/>'
        )
        if row.low is not None and row.high is not None:
            parts.append(_whisker(LABEL + row.low * scale, LABEL + row.high * scale, y))
        parts.append(_text(row.text, y))
    return _drawing(parts, len(rows), title)


def intervals(rows: Sequence[Bar], title: str) -> str:
    """Differences as dots with their intervals, and a line at zero."""
    ends = [end for row in rows for end in (row.low, row.high, row.value) if end is not None]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    scale = PLOT / (high - low) if high > low else 0.0
    zero = LABEL + (0.0 - low) * scale
    parts = [f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="{len(rows) * ROW}"/>']
    for at, row in enumerate(rows):
        y = at * ROW
        parts.append(_label(row.label, y))
        if row.low is not None and row.high is not None:
            parts.append(_whisker(LABEL + (row.low - low) * scale, LABEL + (row.high - low) * scale, y))
        name = "dot strong" if row.strong else "dot"
        x = LABEL + (row.value - low) * scale
        parts.append(f'<circle class="{name}" cx="{x:.1f}" cy="{y + ROW / 2:.1f}" r="5"/>')
        parts.append(_text(row.text, y))
    return _drawing(parts, len(rows), title)


def curve(points: Sequence[tuple[float, float]], title: str, x_label: str, y_label: str) -> str:
    """Points against the diagonal, both axes from 0 to the largest value."""
    most = max([max(point) for point in points], default=0.0) or 1.0
    size, left, bottom = 220, 60, 40
    place = [(left + x / most * size, 10 + size - y / most * size) for x, y in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in place)
    dots = "".join(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in place)
    return (
        f'<svg role="img" viewBox="0 0 {left + size + 20} {size + bottom + 10}" class="curve">'
        f"<title>{escape(title)}</title>"
        f'<line class="zero" x1="{left}" y1="{10 + size}" x2="{left + size}" y2="10"/>'
        f'<polyline class="line" points="{line}"/>{dots}'
        f'<text x="{left + size / 2}" y="{size + 45}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text x="14" y="{10 + size / 2}" transform="rotate(-90 14 {10 + size / 2})" text-anchor="middle">'
        f"{escape(y_label)}</text>"
        f'<text x="{left - 6}" y="20" text-anchor="end">{most:.2g}</text>'
        f'<text x="{left - 6}" y="{12 + size}" text-anchor="end">0</text>'
        f'<text x="{left + size}" y="{size + 26}" text-anchor="end">{most:.2g}</text></svg>'
    )


def _drawing(parts: Sequence[str], rows: int, title: str) -> str:
    return (
        f'<svg role="img" viewBox="0 0 {LABEL + PLOT + VALUE} {max(rows, 1) * ROW}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _label(label: str, y: float) -> str:
    return f'<text x="{LABEL - 8}" y="{y + 18}" text-anchor="end">{escape(label)}</text>'


def _text(text: str, y: float) -> str:
    return f'<text x="{LABEL + PLOT + 8}" y="{y + 18}">{escape(text)}</text>'


def _whisker(low: float, high: float, y: float) -> str:
    middle = y + ROW / 2
    return f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>'
