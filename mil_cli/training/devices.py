"""Where a training runs: the device and precision, and the processes that torchrun started."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from lightning_fabric import Fabric
from torch import nn

from mil_cli.errors import RecipeError
from mil_cli.training.config import TrainerConfig


class Network(nn.Module):
    """A model's graph as the module that lightning-fabric and DDP want."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's graph."""
        return self.graph(*args, **kwargs)


def build_fabric(settings: TrainerConfig) -> Fabric:
    """Set the devices up: one, or those of the processes that torchrun started.

    Raises:
        RecipeError: The device cannot be used, or several need as many processes.
    """
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    world = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if world == 1 and isinstance(settings.devices, int) and settings.devices > 1:
        raise RecipeError(
            "several devices need as many processes",
            where="trainer.devices",
            value=settings.devices,
            hint=f"start it by: torchrun --nproc-per-node={settings.devices} -m mil_cli compress RECIPE",
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world > 1 else 1
    try:
        fabric = Fabric(
            accelerator=settings.accelerator,
            devices=local,
            num_nodes=world // local,
            strategy="ddp" if world > 1 else "auto",
            precision=settings.precision,
        )
        fabric.launch()
    except (ValueError, RuntimeError, ImportError) as problem:
        raise RecipeError(
            f"the device cannot be used: {problem}",
            where="trainer.accelerator",
            value=settings.accelerator,
            hint="set trainer.accelerator: cpu, or auto",
        ) from problem
    return fabric


def run_in_precision(fabric: Fabric, graph: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a graph as the network that `fabric` set up is run: its inputs, outputs and operators in that precision."""
    precision = fabric.strategy.precision
    args, kwargs = precision.convert_input((args, kwargs))
    with precision.forward_context():
        outputs = graph(*args, **kwargs)
    return precision.convert_output(outputs)
