"""Turns what goes wrong while a user's module runs or is captured into one clear error at the user's own line."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch

from mil_cli.errors import CaptureError
from mil_cli.graph.nodes import is_user_file, user_frame

_TENSOR_BRANCH = (
    "a Python `if`, `while`, `int()` or `.item()` depends on values of a tensor; compute with torch.where or masks, "
    "or with torch.cond"
)
_HINTS = (
    (r"data-dependent|GuardOnDataDependent|unbacked|\.item\(\)|bool\(\)|torch\.cond", _TENSOR_BRANCH),
    (r"numpy|\.numpy\(\)", "stay in torch inside forward: NumPy code cannot be captured"),
    (
        r"unsupported (input|output) type|Unsupported (input|output) type|pytree",
        "take and return tensors in tuples, lists, dicts or dataclasses",
    ),
    (r"missing .* argument|unexpected keyword|takes .* positional", "give the example inputs that forward takes"),
    (r"shape|size mismatch|mat1 and mat2|channels", "give example inputs of the shapes that the model is made for"),
    (r"mutat|assigned during export", "do not keep tensors on self inside forward; register buffers instead"),
)
_FALLBACK = "rewrite this line with torch operations that torch.export can follow"


def capture_error(error: BaseException, what: str, *, hint: str | None = None) -> CaptureError:
    """Return a `CaptureError` for an exception from the user's forward or from the exporter.

    Args:
        error: What was raised.
        what: What was being done, such as "the model cannot be captured".
        hint: The next step; guessed from the message where it is not given.
    """
    reason = summary(error)
    return CaptureError(f"{what}: {reason}", where=user_location(error), hint=hint or guess_hint(error))


def summary(error: BaseException) -> str:
    """Return an exception's kind and the first line of its message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    kind = type(error).__name__
    text = f"{kind}: {text}" if text else kind
    return text if len(text) <= 300 else text[:297] + "..."


def user_location(error: BaseException) -> str | None:
    """Return ``file:line`` of the user's innermost frame: from the traceback, else from the message."""
    current: BaseException | None = error
    while current is not None:
        frames = traceback.extract_tb(current.__traceback__)
        for frame in reversed(frames):
            if is_user_file(frame.filename):
                return f"{frame.filename}:{frame.lineno}"
        current = current.__cause__ or current.__context__
    if found := user_frame(str(error)):
        return found
    torchs = Path(torch.__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if {"site-packages", "dist-packages"} & set(path.parts) and not path.is_relative_to(torchs):
            return f"{frame.filename}:{frame.lineno}"
    return None


def guess_hint(error: BaseException) -> str:
    """Return the next step for an exception, by its kind and message."""
    text = f"{type(error).__name__} {error}"
    return next((hint for pattern, hint in _HINTS if re.search(pattern, text)), _FALLBACK)
