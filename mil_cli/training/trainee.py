"""What the training loop asks of what it trains: a captured model, or a module that holds many of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, Self

from typing_extensions import TypeVar

from mil_cli.graph.model import Model

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mil_cli.graph.spec import ModelSpec


class Trainee(Protocol):
    """Weights with a forward pass; `mil_cli.graph.model.Model` says what each member is."""

    @property
    def graph(self) -> nn.Module:
        """The module that runs, on the user's own args and kwargs; it holds the weights."""
        ...

    @property
    def spec(self) -> ModelSpec:
        """What it takes and gives."""
        ...

    @property
    def samples(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Example ``(args, kwargs)`` of a small batch."""
        ...

    @property
    def training(self) -> bool:
        """Whether it is in training mode."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run in the present mode."""
        ...

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode (or back), in place."""
        ...

    def eval(self) -> Self:
        """Switch to evaluation mode, in place."""
        ...

    def clone(self) -> Self:
        """Return a deep copy."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters, each once."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters with their names, each once."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """The live weights and buffers by name."""
        ...


T = TypeVar("T", bound=Trainee, default=Model)
"""What is trained; a captured model where nothing else is said."""
