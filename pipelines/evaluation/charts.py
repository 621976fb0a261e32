"""Small line charts as SVG text, styled by the page's CSS variables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup, escape

WIDTH: Final = 340
HEIGHT: Final = 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 40


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
) -> Markup:
    """Draw curves with axes; the i-th line has the CSS class s<i>.

    A range without length (all values alike) is shown one unit long.
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
    for step in range(5):
        x = x_range[0] + (x_range[1] - x_range[0]) * step / 4
        y = y_range[0] + (y_range[1] - y_range[0]) * step / 4
        (px, bottom), (left, py) = place(x, y_range[0]), place(x_range[0], y)
        parts.append(f'<path class="grid" d="M{left:.1f} {py:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{py + 4:.1f}" class="end">{_tick(y)}</text>')
        parts.append(f'<text x="{px:.1f}" y="{bottom + 15:.1f}" class="mid">{_tick(x)}</text>')
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


def _tick(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"
