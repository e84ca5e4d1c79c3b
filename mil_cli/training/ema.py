"""The exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class MovingAverage:
    """Keeps an average of named tensors (Polyak and Juditsky 1992); early steps count more, so that it starts well.

    The weight of the old average at step t is min(decay, (1 + t) / (10 + t)). Tensors that are not floating-point are
    copied.

    Args:
        tensors: The tensors to follow, by name.
        decay: Weight of the old average, below 1.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], decay: float) -> None:
        self._live = {name: tensor.detach() for name, tensor in tensors.items()}
        self._average = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._decay = decay
        self._steps = 0
        averaged = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
        self._averaged_live = [self._live[name] for name in averaged]
        self._averaged = [self._average[name] for name in averaged]
        self._copied = [name for name in tensors if name not in set(averaged)]

    @torch.no_grad()
    def update(self) -> None:
        """Take the tensors' present values in."""
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        self._steps += 1
        torch._foreach_lerp_(self._averaged, self._averaged_live, 1 - decay)
        for name in self._copied:
            self._average[name].copy_(self._live[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the averages by name; they change with the next update."""
        return dict(self._average)

    def state_dict(self) -> dict[str, object]:
        """Return what `load_state_dict` takes."""
        return {"steps": self._steps, "average": dict(self._average)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from a saved state."""
        average = state["average"]
        steps = state["steps"]
        if not isinstance(average, Mapping) or not isinstance(steps, int):
            raise ValueError("not the state of a moving average")
        self._steps = steps
        for name, tensor in self._average.items():
            tensor.copy_(average[name])
