"""Checks of the sizes that the built-in models are asked for."""

from __future__ import annotations

from collections.abc import Sequence

from mil_cli.errors import ModelError


def check_positive(values: dict[str, int]) -> None:
    """Refuse sizes below 1.

    Raises:
        ModelError: One is; the message names its key.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError("must be a whole number of at least 1", where=f"model.{name}", value=value)


def check_stages(widths: Sequence[int], blocks: Sequence[int]) -> None:
    """Refuse stages whose widths and numbers of blocks do not pair up.

    Raises:
        ModelError: They do not, or there are none.
    """
    if not widths:
        raise ModelError("at least one stage is needed", where="model.widths", value=list(widths))
    if len(blocks) != len(widths):
        raise ModelError(
            f"{len(widths)} stages need {len(widths)} numbers of blocks", where="model.blocks", value=list(blocks)
        )


def check_dropout(dropout: float) -> None:
    """Refuse a dropout rate outside [0, 1).

    Raises:
        ModelError: It is.
    """
    if not 0 <= dropout < 1:
        raise ModelError("must be at least 0 and below 1", where="model.dropout", value=dropout)
