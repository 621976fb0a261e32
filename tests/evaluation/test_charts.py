"""Charts of odd numbers."""

from __future__ import annotations

import re

import pytest

from pipelines.evaluation.charts import Line, find_ticks, line_chart


def test_values_all_alike_are_drawn() -> None:
    """As where nobody of a test cut did it: every lift is zero."""
    drawn = line_chart(
        [Line(name="gpt", points=[(0.0, 0.0), (1.0, 0.0)])],
        x_label="share",
        y_label="<lift>",
        x_range=(0.0, 1.0),
        y_range=(0.0, 0.0),
    )
    assert "nan" not in drawn
    assert "&lt;lift&gt;" in drawn


@pytest.mark.parametrize(
    ("low", "high", "most", "texts"),
    [
        (0.0, 1.0, 5, "0.0 0.2 0.4 0.6 0.8 1.0"),
        (1, 10, 9, "1 2 3 4 5 6 7 8 9 10"),
        (0.0, 0.327, 5, "0.0 0.1 0.2 0.3"),
        (0.0, 0.1, 5, "0.00 0.02 0.04 0.06 0.08 0.10"),
        (0.0, 28.0, 5, "0 10 20"),
        (0, 4016.3, 5, "0 1,000 2,000 3,000 4,000"),
        (0.0, 3e-7, 5, "0.0000000 0.0000001 0.0000002 0.0000003"),
    ],
)
def test_axes_are_labelled_at_round_numbers(low: float, high: float, most: int, texts: str) -> None:
    ticks = find_ticks(low, high, most)
    assert [text for _, text in ticks] == texts.split()
    assert all(float(text.replace(",", "")) == pytest.approx(value) for value, text in ticks)
    assert all(low <= value <= high * (1 + 1e-9) for value, _ in ticks)


def test_labels_stand_where_their_values_lie() -> None:
    drawn = line_chart(
        [Line(name="gpt", points=[(1, 0.0), (3, 0.82)])],
        x_label="decile",
        y_label="spend",
        x_range=(1, 3),
        y_range=(0.0, 0.82),
    )
    points = re.findall(r'<text x="([\d.]+)" y="235.0" class="mid">([\d.]+)</text>', drawn)
    assert points == [
        ("46.0", "1.0"),
        ("116.5", "1.5"),
        ("187.0", "2.0"),
        ("257.5", "2.5"),
        ("328.0", "3.0"),
    ]
