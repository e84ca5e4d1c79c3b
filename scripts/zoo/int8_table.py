"""The results of quantization as a page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]


def page(rows: Iterable[Row], versions: str, *, total: int) -> str:
    """Return the results as Markdown."""
    return "".join(f"{row['name']} {row.get('difference')}\n" for row in rows)
