"""What a predictor is: settings that can be fitted to trained architectures, and what comes of it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict

from mil_cli.assess.ranking import Floats


class Prediction(NamedTuple):
    """What is thought of architectures, each of shape (architectures,).

    Attributes:
        mean: The value that is expected; larger is better.
        deviation: The standard deviation that the value of one training has around it.
    """

    mean: Floats
    deviation: Floats


class Fitted(Protocol):
    """A predictor that has seen trained architectures."""

    def predict(self, features: Floats) -> Prediction:
        """Return what is thought of architectures, of shape (architectures, features)."""
        ...


class Predictor(Protocol):
    """A predictor that has seen nothing; a fit leaves it so, and no fit knows of another."""

    def fit(self, features: Floats, values: Floats, seed: int) -> Fitted:
        """Learn from trained architectures.

        Args:
            features: Shape (architectures, features); what is no number is imputed.
            values: What training reached, larger is better, shape (architectures,); all finite.
            seed: Of whatever is drawn.
        """
        ...


def sklearn_seed(seed: int) -> int:
    """Return a seed that scikit-learn takes, which has no more than 32 bits."""
    return seed % 2**32


class PredictorConfig(BaseModel):
    """The settings of a predictor; subclasses add theirs, their `method` and their fit."""

    model_config = ConfigDict(frozen=True, extra="forbid")
