"""Where the shipped configs and recipes lie: in the checkout, or inside an installed wheel."""

from __future__ import annotations

from pathlib import Path

import mil_cli

_PACKAGE = Path(mil_cli.__file__).resolve().parent


def _shipped(name: str) -> Path:
    installed = _PACKAGE / f"_{name}"
    return installed if installed.is_dir() else _PACKAGE.parent / name


def configs_folder() -> Path:
    """Return the folder that holds the Hydra groups which come with the tool."""
    return _shipped("configs")


def recipes_folder() -> Path:
    """Return the folder that holds the recipes which come with the tool."""
    return _shipped("recipes")
