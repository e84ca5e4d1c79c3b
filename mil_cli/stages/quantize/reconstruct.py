"""Learns how weights are rounded, unit by unit, so that each unit of the quantized model gives what the float one gave.

A unit, a layer or a residual block, is trained on the values that the quantized units before it give it, against those
that the float model has at its end. Those of one unit at a time are kept, for all samples: the memory of a stage is the
model twice, the samples, and the values at both ends of its largest unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from mil_cli.data.base import Batch, batch_count, mix_seed
from mil_cli.events import Bar
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import get_attribute
from mil_cli.graph.segment import segment
from mil_cli.stages.context import Context
from mil_cli.stages.quantize.ends import Ends, read_ends
from mil_cli.stages.quantize.post_training import PostTrainingConfig, Prepared
from mil_cli.stages.quantize.rounding import exponent_at
from mil_cli.stages.quantize.soft_segment import SoftSegment, kept_or_dropped
from mil_cli.stages.quantize.units import Unit
from mil_cli.stages.quantize.weights import settle_biases
from mil_cli.stages.surroundings import fingerprint_of
from mil_cli.training.evaluate import fixed_batch

Exponent = Annotated[float, Field(gt=1, allow_inf_nan=False)]


class ReconstructionConfig(PostTrainingConfig):
    """Settings of a method that learns roundings, beside those that all methods after training share.

    Attributes:
        samples: Training samples on which units are compared, without augmentation; the values at both ends of a unit
            are kept for all of them.
        batch_size: How many of them at once.
        iterations: Steps of the optimizer for each unit. The papers take 10,000 and more, at a rate of 0.001.
        learning_rate: Adam's, of the roundings: fewer iterations need a higher one.
        penalty: Weight of what pushes roundings to a decision, beside the squared error of a position, summed over
            channels.
        exponents: The penalty's exponent when it sets in, and at the end.
        warmup: Share of the iterations without a penalty.
    """

    samples: int = Field(1024, ge=1)
    batch_size: int = Field(32, ge=1)
    iterations: int = Field(200, ge=1)
    learning_rate: float = Field(0.1, gt=0, allow_inf_nan=False)
    penalty: float = Field(0.01, ge=0, allow_inf_nan=False)
    exponents: tuple[Exponent, Exponent] = (20.0, 2.0)
    warmup: float = Field(0.2, ge=0, lt=1)


@dataclass(frozen=True, kw_only=True)
class Beyond:
    """What is done beyond learning roundings.

    Attributes:
        step_rate: Adam's learning rate of activation steps, as a share of each; it falls to 0 along a cosine. 0: they
            stay.
        drop: Share of the values that go unquantized while a unit learns, drawn anew each time.
        fisher: Whether errors count by the squared gradient of the task's loss.
    """

    step_rate: float = 0.0
    drop: float = 0.0
    fisher: bool = False


@dataclass(frozen=True)
class _Draws:
    """A split of numbers of batches, drawn at random: in this form a dry run takes as little of it as of any.

    Attributes:
        draws: How many there are.
        size: Samples of one batch.
        among: Batches to draw from.
    """

    draws: int
    size: int
    among: int

    def __len__(self) -> int:
        return self.draws * self.size

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: bool = False,
        seed: int = 0,
        epoch: int = 0,
        drop_last: bool = False,
        skip: int = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> Iterator[Batch]:
        """Give the numbers; see `Split.batches`."""
        random = torch.Generator().manual_seed(mix_seed(seed, epoch))
        count = batch_count(len(self), batch_size, drop_last=drop_last)
        for number in torch.randint(self.among, (count,), generator=random)[skip:].tolist():
            yield (number,)

    def fingerprint(self) -> str:
        return fingerprint_of(asdict(self))


def reconstruct(
    prepared: Prepared,
    units: Sequence[Unit],
    config: ReconstructionConfig,
    context: Context,
    *,
    beyond: Beyond,
) -> Model:
    """Quantize a model with learned roundings.

    Where what was learned is further from the float model than nearest rounding, on the samples that it was learned
    on, a unit keeps nearest rounding.

    Args:
        prepared: The model, and how it is to be quantized; quantizers are put into its graph.
        units: What is learned together, in order of execution.
        config: The settings.
        context: Gives training samples, seeds and checkpoints.
        beyond: What is done beyond learning roundings.

    Returns:
        The quantized model, its learned weights on their codes.
    """
    work = _Reconstruction(prepared, config, context, beyond)
    slot = context.slot("units")
    state = slot.load() or {"units": {}}
    done: dict[str, Any] = state["units"]
    total = config.iterations * len(units)
    learning = context.progress.work(f"{context.name}: rounding", total, done=config.iterations * len(done))
    with learning as bar:
        for unit in units:
            soft = work.soft(unit)
            if unit.end not in done:
                done[unit.end] = work.learn(unit, soft, bar)
                slot.save(state)
            elif done[unit.end]["kept"]:
                work.write(done[unit.end]["values"])
    if beyond.step_rate:
        settle_biases(work.model.graph)
    prepared.correct()
    _note(context, config, units, done)
    return work.model


class _Reconstruction:
    """The float model, the quantized one as far as it is learned, and the samples."""

    def __init__(self, prepared: Prepared, config: ReconstructionConfig, context: Context, beyond: Beyond) -> None:
        self._config, self._context, self._beyond = config, context, beyond
        self._float = prepared.model.clone()
        for parameter in self._float.parameters():
            parameter.requires_grad_(beyond.fisher)
        self.model = prepared.insert(correct=False)  # of what the roundings leave
        self._size = fixed_batch(self.model) or config.batch_size
        self._batches = list(
            context.calibration_batches(samples=config.samples, batch_size=config.batch_size, model=self.model)
        )
        self._taken: set[str] = set()

    def soft(self, unit: Unit) -> SoftSegment:
        """Return the part of the quantized model that a unit is, to be learned; what others have learned stays."""
        graph = self.model.graph
        nodes = {node.name: node for node in graph.graph.nodes}
        part = segment(graph, nodes[unit.entry], nodes[unit.end])
        random = self._context.generator(unit.end)
        steps = self._beyond.step_rate > 0
        soft = SoftSegment(graph, part, self._taken, steps=steps, drop=self._beyond.drop, random=random)
        self._taken |= {*soft.roundings, *soft.steps}
        return soft

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Put values of weights and steps into the quantized model."""
        with torch.no_grad():
            for name, value in values.items():
                get_attribute(self.model.graph, name).copy_(value)

    def learn(self, unit: Unit, soft: SoftSegment, bar: Bar) -> dict[str, Any]:
        """Learn a unit, and put what was learned into the quantized model unless nearest rounding was closer.

        Returns:
            The learned values by name, whether they were kept, both errors, and how many weights were undecided; of a
            unit in which nothing can be learned no more than that nothing was kept.
        """
        if not soft.names:
            bar.advance(self._config.iterations)
            return {"values": {}, "kept": False}
        ends = read_ends(
            soft.part,
            self.model,
            self._float,
            self._batches,
            self._context.task,
            channels=unit.channels,
            smooth=self._beyond.drop > 0,
            fisher=self._beyond.fisher,
        )
        module = soft.part.module(self.model.graph)
        nearest = ends.whole_error(module)
        before = {name: get_attribute(self.model.graph, name).detach().clone() for name in soft.names}
        self._optimize(soft, ends, bar)
        values = soft.values()
        self.write(values)
        error = ends.whole_error(module)
        kept = error <= nearest
        if not kept:
            self.write(before)
        facts = {"nearest": nearest, "learned": error, "undecided": soft.undecided()}
        return {"values": values if kept else {}, "kept": kept, **facts}

    def _optimize(self, soft: SoftSegment, ends: Ends, bar: Bar) -> None:
        config = self._config
        optimizers: list[torch.optim.Optimizer] = []
        if soft.roundings:
            logits = [rounding.logits for rounding in soft.roundings.values()]
            optimizers.append(torch.optim.Adam(logits, lr=config.learning_rate))
        schedule = None
        if soft.steps:
            rates = [{"params": [step], "lr": self._beyond.step_rate * step.item()} for step in soft.steps.values()]
            optimizers.append(torch.optim.Adam(rates))
            schedule = CosineAnnealingLR(optimizers[-1], config.iterations)
        draws = _Draws(config.iterations, self._size, len(ends.targets))
        split = self._context.with_train(draws, made=True).train
        for done, (batch,) in enumerate(split.batches(self._size, seed=soft.random.initial_seed())):
            loss = self._loss(soft, ends, int(batch), done / config.iterations)
            torch.autograd.backward(loss)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if schedule is not None:
                schedule.step()
                soft.keep_positive()
            bar.advance()

    def _loss(self, soft: SoftSegment, ends: Ends, batch: int, done: float) -> Tensor:
        """Return the error on a batch, with the penalty, after a share `done` of the iterations."""
        config, drop = self._config, self._beyond.drop
        inputs = ends.inputs[batch]
        if drop:
            pairs = zip(inputs, ends.smooth[batch], strict=True)
            inputs = [kept_or_dropped(given, wanted, drop, soft.random) for given, wanted in pairs]
        loss = ends.error(soft.module(*inputs), batch)
        start, end = config.exponents
        exponent = exponent_at(done, warmup=config.warmup, start=start, end=end)
        if exponent is not None:
            loss = loss + config.penalty * sum(rounding.penalty(exponent) for rounding in soft.roundings.values())
        return loss


def _note(context: Context, config: ReconstructionConfig, units: Sequence[Unit], done: Mapping[str, Any]) -> None:
    facts = [
        {"layers": unit.layers, **{key: value for key, value in done[unit.end].items() if key != "values"}}
        for unit in units
    ]
    samples = min(config.samples, len(context.data.train))
    context.note(units=facts, samples=samples, iterations=config.iterations)
