"""Small line charts as SVG text, styled by the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup, escape

WIDTH: Final = 340
HEIGHT: Final = 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 40
# An axis has at most so many steps between its labels.
_STEPS: Final = 6


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve.

    Attributes:
        name: shown in the legend.
        points: (x, y) pairs.
        dots: mark the points.
    """

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    diagonal: bool = False,
    x_steps: int = _STEPS,
) -> Markup:
    """Draw curves with axes; the i-th line has the CSS class s<i>.

    Axes are labelled at round numbers, in at most ``x_steps`` steps across. A range without length
    (all values alike) is shown one unit long.
    """
    x_range, y_range = _stretch(x_range), _stretch(y_range)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_range[0]) / (x_range[1] - x_range[0])
        up = (y - y_range[0]) / (y_range[1] - y_range[0])
        return (
            _LEFT + across * (WIDTH - _LEFT - _RIGHT),
            HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM),
        )

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(y_label)} against {escape(x_label)}">'
    ]
    for y, text in find_ticks(*y_range, _STEPS):
        left, py = place(x_range[0], y)
        parts.append(f'<path class="grid" d="M{left:.1f} {py:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{py + 4:.1f}" class="end">{text}</text>')
    for x, text in find_ticks(*x_range, x_steps):
        px, bottom = place(x, y_range[0])
        parts.append(f'<text x="{px:.1f}" y="{bottom + 15:.1f}" class="mid">{text}</text>')
    if diagonal:
        (x0, y0), (x1, y1) = place(x_range[0], x_range[0]), place(x_range[1], x_range[1])
        parts.append(f'<path class="diagonal" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/>')
    for number, line in enumerate(lines):
        spots = [place(x, min(max(y, y_range[0]), y_range[1])) for x, y in line.points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        parts.append(f'<path class="curve s{number}" d="M{path}"/>')
        if line.dots:
            parts += [
                f'<circle class="s{number}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in spots
            ]
    middle = (WIDTH + _LEFT) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{HEIGHT - 6}" class="mid label">{escape(x_label)}</text>'
    )
    parts.append(
        f'<text transform="translate(11 {HEIGHT / 2 - 10:.0f}) rotate(-90)" '
        f'class="mid label">{escape(y_label)}</text></svg>'
    )
    return Markup("".join(parts))  # noqa: S704 - numbers, and labels escaped above


def _stretch(bounds: tuple[float, float]) -> tuple[float, float]:
    return bounds if bounds[1] > bounds[0] else (bounds[0], bounds[0] + 1.0)


def find_ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """Return round numbers in a range, and how they are written.

    Args:
        low: start of the range.
        high: its end, above the start.
        most: steps between them; steps are 1, 2 or 5 times a power of ten.
    """
    rough = (high - low) / most
    power = math.floor(math.log10(rough))
    # A hair's breadth is allowed: .1 is no sum of powers of two.
    step = next(s for s in (1, 2, 5, 10) if s * 10.0**power >= rough * (1 - 1e-9)) * 10.0**power
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(n * step, f"{n * step:,.{places}f}") for n in range(first, last + 1)]
