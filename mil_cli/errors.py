"""Every error that a user can meet: what is wrong, where, the value, and the next step.

A `MilError` is the user's to mend: the command line prints it without a traceback and exits with 2.
Anything else that escapes is a bug of ours: the traceback goes to the run's log and the exit code is 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

_UNSET = object()


class MilError(Exception):
    """One problem that the user can mend.

    Args:
        what: What is wrong, in one sentence.
        where: The recipe key (dotted) or ``file:line`` that it comes from.
        value: The offending value, shown by `repr`.
        hint: The next step: what to type, install or change.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, value: object = _UNSET, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.value = value
        self.hint = hint

    @property
    def has_value(self) -> bool:
        """Whether an offending value was given (None is a value)."""
        return self.value is not _UNSET

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.has_value:
            shown = repr(self.value)
            text += f" (got {shown if len(shown) <= 200 else shown[:197] + '...'})"
        if self.hint:
            text += f"\n  -> {self.hint}"
        return text


class RecipeError(MilError):
    """A recipe that cannot be composed or does not validate."""


class RecipeErrors(RecipeError):
    """All problems of one recipe, reported together.

    Args:
        problems: The single problems, in the order in which they are shown.
        where: The recipe's file.
    """

    def __init__(self, problems: Sequence[MilError], *, where: str | None = None) -> None:
        count = len(problems)
        super().__init__(f"{count} problem{'s' if count != 1 else ''} in the recipe", where=where)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *(f"  {problem}" for problem in self.problems)])


class ModelError(MilError):
    """A model that cannot be built, captured, changed or run."""


class CaptureError(ModelError):
    """A model that `torch.export` cannot capture; `where` names the user's own line."""


class CheckpointError(ModelError):
    """Weights that cannot be read safely or do not fit the model."""


class ArchiveError(ModelError):
    """A `.pt2` archive or its sidecar that is missing, damaged or unsafe to load."""


class DataError(MilError):
    """Data that are missing, empty, damaged or of the wrong form."""


class TaskError(MilError):
    """A task that does not fit the model's outputs or the batches."""


class StageError(MilError):
    """A stage that cannot do what its settings ask."""


class GoalError(MilError):
    """A goal that is impossible or cannot be measured here."""


class ExportError(MilError):
    """A model that cannot be written as ONNX, or whose file does not behave as the model."""


class MeasureError(MilError):
    """A measurement that cannot be made here."""


class DeviceError(MilError):
    """A device profile that is unknown or that this machine does not meet."""


class CacheError(MilError):
    """A stage cache that cannot be used."""


class OutputError(MilError):
    """An output folder that cannot be written: read-only, full, or in the way."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"did you mean 'x'?"`` for the closest known word, else a list of what there is."""
    names = sorted(known)
    close = get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(names)}" if names else "nothing is known here"
