"""What all searches of a space that the user designed have in common as stages."""

from __future__ import annotations

from typing import ClassVar

from mil_cli.stages.registry import StageConfig


class DesignedConfig(StageConfig):
    """Settings of a stage that starts from the choices of the recipe's own model; it comes first in a chain."""

    family: ClassVar[str] = "nas"
    never_after: ClassVar[dict[str, str]] = dict.fromkeys(
        ("train", "nas", "prune", "distill", "quantize"),
        "it starts from the choices of the recipe's own model, and what came before would be lost",
    )
