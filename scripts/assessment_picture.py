"""The picture of what ways to judge architectures are worth beside what they cost, as an SVG file."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mil_cli.report.charts import Sample, scatter
from mil_cli.report.html import environment
from scripts.assessment_figures import Figures

_STYLE = (
    "<style>text{font:11px sans-serif;fill:#555}.label{font-weight:600;fill:#222}.grid{stroke:#ddd}.axis{stroke:#888}"
    "polyline{fill:none;stroke:#0a6;stroke-width:2;stroke-dasharray:5 4}.front{fill:#0a6}"
    "circle.point{fill:#fff;stroke:#999;stroke-width:1.5}</style>"
)


def picture(figures: Sequence[Figures]) -> str:
    """Return the SVG of tau over processor seconds; those that no other beats in both are named and joined.

    Args:
        figures: Of each way; those that cost nothing are not drawn, as there is no place for them on a logarithm.
    """
    shown = [one for one in figures if one.seconds > 0]
    front = {
        one.name
        for one in shown
        if not any(
            other.tau.value >= one.tau.value and other.seconds <= one.seconds and other is not one for other in shown
        )
    }
    samples = [
        Sample(one.seconds, one.tau.value, one.name if one.name in front else "", one.name, one.name in front)
        for one in shown
    ]
    chart = scatter(
        "Tau over seconds of one processor",
        samples,
        x_label="seconds of one processor (logarithmic)",
        y_label="tau",
        write_x=lambda value: f"{value:,.0f}",
        higher_is_better=True,
        logarithmic=True,
    )
    drawn = str(environment().get_template("charts.html.j2").module.draw(chart))  # type: ignore[attr-defined]
    (svg,) = re.findall(r"<svg.*</svg>", drawn, re.DOTALL)
    return f"{svg}\n".replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f">{_STYLE}", 1)
