"""The Model: a captured graph of ATen ops with named weights, and what can be done to it."""

from __future__ import annotations

import mil_cli.ops  # noqa: F401  archives hold operators of ours, which have to be registered before one is read
