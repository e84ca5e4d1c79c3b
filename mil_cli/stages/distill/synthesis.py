"""Inputs made from a teacher alone, while a student trains on them: a split that reads no data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from mil_cli.data.augment import Augment
from mil_cli.data.base import Batch, batch_count, mix_seed
from mil_cli.graph.taps import Tapped
from mil_cli.stages.distill.generator import Bank, Generator
from mil_cli.stages.distill.inversion import (
    NormStatistics,
    activation_loss,
    agreement,
    balance_loss,
    certainty_loss,
    last_features,
    variation,
)
from mil_cli.training.layout import images_channels_last, use_channels_last

if TYPE_CHECKING:
    from mil_cli.events import Bar
    from mil_cli.graph.model import Model
    from mil_cli.stages.distill.data_free import DataFreeConfig
    from mil_cli.training.checkpoint import CheckpointSlot
    from mil_cli.training.objective import Running

_FEATURES = "features"
_BETAS = (0.5, 0.999)


@dataclass(frozen=True)
class _AtWork:
    """What a synthesis uses of a training."""

    statistics: NormStatistics
    watched: GraphModule
    student: GraphModule
    running: Running


class Synthesis(nn.Module):
    """Generators with their optimizer, and the bank of what they made: all that a checkpoint of the synthesis holds.

    Args:
        config: How inputs are made.
        generators: Make them, in turn.
        bank: Keeps them.
        teacher: The teacher; not changed.
        scores: A model's outputs -> class scores of shape (batch, classes).
        call: Inputs -> the (args, kwargs) of a model.
        seed: Of noise and classes.
    """

    steps: Tensor

    def __init__(
        self,
        config: DataFreeConfig,
        generators: Sequence[Generator],
        bank: Bank,
        *,
        teacher: Model,
        scores: Callable[[Any], Tensor],
        call: Callable[[Tensor], tuple[tuple[Any, ...], Mapping[str, Any]]],
        seed: int,
    ) -> None:
        super().__init__()
        self.generators, self.bank = nn.ModuleList(generators), bank
        self.generators.requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._optimizer = torch.optim.Adam(
            self.generators.parameters(), lr=config.generator_learning_rate, betas=_BETAS
        )
        self._config, self._scores, self._call, self._seed = config, scores, call, seed
        self._teacher = teacher
        self._at_work: _AtWork | None = None

    def begin(self, running: Running) -> None:
        """Take over the device and the student of a training."""
        teacher = self._teacher.clone().eval()
        use_channels_last(teacher, wanted=running.channels_last)
        teacher.graph.to(running.device).requires_grad_(False)
        statistics = NormStatistics(teacher, first_weight=self._config.first_norm_weight)
        taps = statistics.taps
        if self._config.generator_only:
            features = last_features(teacher)
            taps = {} if features is None else {_FEATURES: features}
        # A graph of its own: it stays in evaluation mode while the student trains, on the same weights.
        student = running.model
        student.eval()
        evaluated = Tapped(student, {}).graph()
        student.train()
        self._at_work = _AtWork(
            statistics=statistics, watched=Tapped(teacher, taps).graph(), student=evaluated, running=running
        )

    def warm_up(self, steps: int, samples: int, slot: CheckpointSlot, bar: Bar) -> None:
        """Train the generators before the student looks at anything, or take what was reached from a checkpoint.

        Args:
            steps: Of each generator.
            samples: Of a batch.
            slot: Keeps the generators that this ends with.
            bar: Counts the steps.
        """
        state = slot.load()
        if state is not None:
            self.load_state_dict(state, strict=False)
            return
        for generator in self._each():
            for _ in range(steps):
                loss = self._step(generator, samples, adversarial=0.0)
                bar.advance(note=f"loss {loss:.4g}")
        # The bank is empty yet, and large.
        slot.save({name: value for name, value in self.state_dict().items() if not name.startswith("bank.")})

    def get_extra_state(self) -> Any:
        """Return the state of the optimizer, which checkpoints keep with the rest."""
        return self._optimizer.state_dict()

    def set_extra_state(self, state: Any) -> None:
        """Take the state of the optimizer from a checkpoint."""
        self._optimizer.load_state_dict(state)

    def make(self, samples: int) -> None:
        """Train the next generator for some steps, and keep the batch that it then makes."""
        config = self._config
        generators = list(self._each())
        generator = generators[int(self.bank.made) // samples % len(generators)]
        for _ in range(config.generator_steps):
            self._step(generator, samples, adversarial=config.adversarial_weight)
        with torch.no_grad():
            self.bank.add(generator(*self._draw(generator, samples)))

    def _each(self) -> Iterator[Generator]:
        yield from cast("Iterable[Generator]", self.generators)

    def _draw(self, generator: Generator, samples: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(mix_seed(self._seed, int(self.steps)))
        noise = torch.randn(samples, generator.noise, generator=random)
        labels = torch.randint(max(generator.classes, 1), (samples,), generator=random)
        device = self._present.running.device
        return noise.to(device), labels.to(device)

    def _step(self, generator: Generator, samples: int, *, adversarial: float) -> float:
        """Take one step of a generator; return its loss."""
        noise, labels = self._draw(generator, samples)
        # Only now, so that the student's training does not take the generator's parameters for its own.
        generator.requires_grad_(True)
        loss = self.loss(generator(noise, labels), labels, adversarial=adversarial)
        parameters = list(generator.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        generator.requires_grad_(False)
        self.steps += 1
        return float(loss.detach())

    @property
    def _present(self) -> _AtWork:
        if self._at_work is None:
            raise RuntimeError("no training has begun")
        return self._at_work

    def loss(self, inputs: Tensor, labels: Tensor, *, adversarial: float) -> Tensor:
        """Return what the generator minimises, a scalar.

        Args:
            inputs: What it made, of shape (batch, channels, ...).
            labels: The classes that it was asked for, of shape (batch,).
            adversarial: Weight of the student's agreement with the teacher.
        """
        config, present = self._config, self._present
        args, kwargs = self._call(images_channels_last(inputs) if present.running.channels_last else inputs)
        outputs, values = present.watched(*args, **kwargs)
        scores = self._scores(outputs)
        if config.generator_only:
            loss = config.class_weight * certainty_loss(scores) + config.balance_weight * balance_loss(scores)
            if _FEATURES in values:
                loss = loss + config.activation_weight * activation_loss(values[_FEATURES])
        else:
            loss = config.class_weight * functional.cross_entropy(scores, labels)
            loss = loss + config.statistics_weight * present.statistics.distance(values)
        if adversarial:
            answers, _ = present.student(*args, **kwargs)
            loss = loss + adversarial * agreement(self._scores(answers), scores)
        if config.variation_weight:
            loss = loss + config.variation_weight * variation(inputs)
        if config.magnitude_weight:
            loss = loss + config.magnitude_weight * inputs.square().mean()
        return loss


class MadeSplit:
    """A split of inputs that are made while it is read; a training reads it once, in order.

    Args:
        synthesis: Makes them.
        samples: How many an epoch gives.
        every: Batches between two that are made; the others are drawn from the bank.
        augment: Applied to what is drawn where augmentation is asked for.
        form: Inputs -> a batch as the task reads it.
        fingerprint: Of all that the inputs depend on.
    """

    def __init__(
        self,
        synthesis: Synthesis,
        *,
        samples: int,
        every: int,
        augment: Augment | None,
        form: Callable[[Tensor], Batch],
        fingerprint: str,
    ) -> None:
        self._synthesis, self._samples, self._every = synthesis, samples, every
        self._augment, self._form, self._fingerprint = augment, form, fingerprint

    def __len__(self) -> int:
        return self._samples

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
        """Give the batches of one pass; see `Split.batches`. Each `every`-th makes a batch for the bank first."""
        rank, count = shard
        for number in range(skip, batch_count(self._samples, batch_size, drop_last=drop_last)):
            if number % self._every == 0:
                self._synthesis.make(batch_size)
            random = torch.Generator().manual_seed(mix_seed(seed, epoch, number, rank))
            size = min(batch_size, self._samples - number * batch_size)
            inputs = self._synthesis.bank.draw(len(range(rank, size, count)), random)
            if augment and self._augment is not None:
                inputs = self._augment(inputs, random)
            yield self._form(inputs)

    def fingerprint(self) -> str:
        """Return the SHA-256 of what the inputs are made from."""
        return self._fingerprint
