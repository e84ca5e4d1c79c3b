"""What a search may choose between: operators and depths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mil_cli.errors import ModelError
from mil_cli.spaces.plain import Searchable
from mil_cli.spaces.sizes import Channels


class OneOf(Searchable):
    """Which one of some operators; every `Choice` that is given the same object takes the same one.

    As an attribute of a built module it is the name of the operator.

    Args:
        names: The names of the operators.

    Attributes:
        choices: The names.
        chosen: Which of them is active, as an index; the first unless an architecture says otherwise.
        mix: A weight for each operator: the output of a `Choice` is then their weighted sum. None: only the active
            one runs.
        share: Of a mixture, one of how many channels passes through the operators.

    Raises:
        ModelError: There is no name, or one stands twice.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.choices = tuple(names)
        if not self.choices or isinstance(names, str) or len(set(self.choices)) < len(self.choices):
            raise ModelError("needs a list of different names", where="OneOf", value=names)
        self.chosen = 0
        self.mix: tuple[Tensor, ...] | None = None
        self.share = 1

    def plain(self, memo: dict[int, Any]) -> str:
        """Return the name of the active operator."""
        return self.choices[self.chosen]

    def __repr__(self) -> str:
        return f"OneOf({list(self.choices)})"


class Choice(Searchable, nn.Module):
    """One of several operators, such as ``Choice({"conv3": ..., "conv5": ..., "skip": nn.Identity()})``.

    Args:
        operators: The operators by name; all take the same inputs and give outputs of the same shape.
        decision: What is chosen, if other choices are to choose the same; its names are those of the operators, in
            their order. None: a decision of its own.
        width: The channels of (batch, channels, ...) that all operators take and give, and that their layers are made
            of, so that a search can mix them on a part of the channels. None: it cannot.

    Attributes:
        decision: What is chosen.
        width: As given.

    Raises:
        ModelError: There is no operator, one is no module or has a name that cannot be part of a weight's name, or the
            decision is one between other names.
    """

    def __init__(
        self, operators: Mapping[str, nn.Module], decision: OneOf | None = None, width: Channels | None = None
    ) -> None:
        super().__init__()
        if not isinstance(operators, Mapping) or not operators:
            raise ModelError("needs a mapping of names to modules", where="Choice", value=operators)
        self.decision = OneOf(tuple(operators)) if decision is None else decision
        self.width = width
        if self.decision.choices != tuple(operators):
            raise ModelError(
                f"the operators must be those of its decision: {', '.join(self.decision.choices)}",
                where="Choice",
                value=list(operators),
            )
        for name, module in operators.items():
            if not isinstance(module, nn.Module):
                raise ModelError(f"the operator {name!r} must be a module", where="Choice", value=module)
            if not isinstance(name, str) or not name or "." in name or hasattr(self, name):
                hint = "use a short word that is no attribute of torch.nn.Module, without a dot"
                raise ModelError("an operator cannot have this name", where="Choice", value=name, hint=hint)
            self.add_module(name, module)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the operators."""
        return self.decision.choices

    def operator(self, index: int) -> nn.Module:
        """Return an operator by its index."""
        return self.get_submodule(self.names[index])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active operator, or all of them, mixed."""
        if self.decision.mix is None:
            return self.operator(self.decision.chosen)(*args, **kwargs)
        if self.decision.share > 1 and self.width is not None:
            return self._mixed_partly(self.width, *args, **kwargs)
        return self._mixed(*args, **kwargs)

    def _mixed(self, *args: Any, **kwargs: Any) -> Any:
        outputs = [self.operator(index)(*args, **kwargs) for index in range(len(self.names))]
        return sum(weight * output for weight, output in zip(self.decision.mix or (), outputs, strict=True))

    def _mixed_partly(self, width: Channels, x: Tensor) -> Tensor:
        """Mix operators on the first channels; the others pass by, and all are shuffled.

        Xu et al. 2020, "PC-DARTS: Partial Channel Connections for Memory-Efficient Architecture Search"
        (arXiv:1907.05737). What passes by has the sum of the weights, as the mixture has.
        """
        weights, share = self.decision.mix or (), self.decision.share
        part = x.shape[1] // share
        with width.narrowed(part):
            mixed = self._mixed(x[:, :part])
        y = torch.cat([mixed, sum(weights) * x[:, part:]], 1)
        return y.reshape(len(y), share, part, *y.shape[2:]).transpose(1, 2).flatten(1, 2)

    def plain(self, memo: dict[int, Any]) -> Any:
        """Return a plain copy of the active operator."""
        return copy.deepcopy(self.operator(self.decision.chosen), memo)


class Node(nn.Module):
    """The sum of what edges give: a node of a cell, each edge a `Choice` from another node.

    Searches over cells treat the edges of a node together: they keep the best few, or weigh them against each other.

    Args:
        edges: Modules of one input each, whose outputs have the same shape.

    Raises:
        ModelError: There is no edge.
    """

    def __init__(self, edges: Sequence[nn.Module]) -> None:
        super().__init__()
        if not edges:
            raise ModelError("at least one edge is needed", where="Node", value=list(edges))
        self.edges = nn.ModuleList(edges)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Map one input for each edge to the sum of the edges' outputs."""
        pairs = list(zip(self.edges, inputs, strict=True))
        # In a built net an edge that passes nothing on costs nothing; one is left where all are so.
        passing = [pair for pair in pairs if not isinstance(pair[0], Zero)] or pairs[:1]
        result: Tensor = sum(edge(x) for edge, x in passing)
        return result


class Repeat(Searchable, nn.Sequential):
    """Blocks of which the first ones run, `least` to `most` of them.

    Args:
        blocks: A function that makes the block of an index (from 0), or the blocks.
        least: Fewest blocks that run.
        most: How many blocks there are; may be left out where the blocks are given.

    Attributes:
        least: Fewest blocks that run.
        chosen: How many more than the fewest run; all unless an architecture says otherwise.

    Raises:
        ModelError: The numbers do not fit each other or the blocks.
    """

    def __init__(
        self, blocks: Callable[[int], nn.Module] | Sequence[nn.Module], least: int, most: int | None = None
    ) -> None:
        if isinstance(blocks, nn.Module) or not isinstance(blocks, Sequence):
            made = self._made(blocks, most)
        else:
            made = list(blocks)
        if not made:
            raise ModelError("at least one block is needed", where="Repeat.blocks", value=made)
        for block in made:
            if not isinstance(block, nn.Module):
                raise ModelError("a block must be a module", where="Repeat.blocks", value=block)
        count = len(made) if most is None else most
        if count != len(made):
            raise ModelError(f"there are {len(made)} blocks", where="Repeat.most", value=most, hint="leave most out")
        if isinstance(least, bool) or not isinstance(least, int) or not 0 <= least <= count:
            raise ModelError(f"must be a whole number from 0 to {count}", where="Repeat.least", value=least)
        super().__init__(*made)
        self.least = least
        self.chosen = count - least

    @staticmethod
    def _made(blocks: Any, most: int | None) -> list[nn.Module]:
        if isinstance(blocks, nn.Module) or not callable(blocks):
            hint = "give a function of the block's index, such as lambda index: Block(), or a list of blocks"
            raise ModelError(
                "must be a function or a list", where="Repeat.blocks", value=type(blocks).__name__, hint=hint
            )
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ModelError("must be a whole number of at least 1", where="Repeat.most", value=most)
        return [blocks(index) for index in range(most)]

    @property
    def depth(self) -> int:
        """How many blocks run."""
        return self.least + self.chosen

    def running(self) -> list[nn.Module]:
        """Return the blocks that run."""
        return list(self)[: self.depth]

    def forward(self, input: Any) -> Any:
        """Run the first blocks one after another."""
        for block in self.running():
            input = block(input)
        return input

    def plain(self, memo: dict[int, Any]) -> nn.Sequential:
        """Return plain copies of the blocks that run, in a `torch.nn.Sequential`."""
        return nn.Sequential(*(copy.deepcopy(block, memo) for block in self.running())).train(self.training)


class Zero(nn.Module):
    """The operator that passes nothing on: zeros of the input's shape, smaller by a stride.

    Args:
        stride: By which the last two axes shrink, as those of a padded convolution do.
    """

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, h, w) to zeros (batch, channels, ceil(h / stride), ceil(w / stride))."""
        return torch.zeros_like(x if self.stride == 1 else x[..., :: self.stride, :: self.stride])

    def extra_repr(self) -> str:
        """Return what `repr` says of it."""
        return f"stride={self.stride}"
