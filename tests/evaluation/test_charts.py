"""Charts of odd numbers."""

from __future__ import annotations

from pipelines.evaluation.charts import Line, line_chart


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
