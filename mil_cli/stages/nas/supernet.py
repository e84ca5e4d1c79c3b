"""The weight-sharing supernet: candidates as graphs over views of one model's weights, and how they are trained."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from mil_cli.data.base import Batch
from mil_cli.graph.coupling import cut, shared_cut
from mil_cli.graph.mode import switch_nodes
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import schema_index, set_argument
from mil_cli.graph.residual import leave_out, remove_branches
from mil_cli.stages.breeding import Candidate
from mil_cli.stages.nas.space import ElasticSpace
from mil_cli.task.base import Task
from mil_cli.training.objective import Binding, Objective, Running

_POOL_STEPS = 64
"""For so many steps random candidates come from one pool; then a new one is drawn."""

POOL_USES = 8
"""How often a candidate of the pool is trained: building one takes half as long as its step where nets are small."""


class SharedCandidates:
    """The candidates of a space over the weights of one model, in training mode; the last ones used are kept.

    Args:
        space: The space.
        model: Has the weights; its graph has the analysed one's names.
        capacity: How many graphs are kept.
    """

    def __init__(self, space: ElasticSpace, model: Model, *, capacity: int) -> None:
        self._space = space
        self._model = model
        self._capacity = capacity
        self._graphs: OrderedDict[Candidate, GraphModule] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def graph(self, candidate: Candidate) -> GraphModule:
        """Return the graph of a candidate; its gradients reach the model's weights."""
        if candidate in self._graphs:
            self._graphs.move_to_end(candidate)
            return self._graphs[candidate]
        graph = shared_candidate(self._space, candidate, self._model)
        self._graphs[candidate] = graph
        if len(self._graphs) > self._capacity:
            self._graphs.popitem(last=False)
        return graph


def shared_candidate(space: ElasticSpace, candidate: Candidate, model: Model, *, training: bool = True) -> GraphModule:
    """Return a candidate as a graph over views of a model's weights.

    In training its norms use the batch's statistics and leave the running ones, which are the whole model's, as they
    are.
    """
    branches = space.branches(candidate)

    def edit(graph: Graph, copies: Mapping[str, Node]) -> None:
        leave_out(graph, copies, branches)
        if training:
            switch_nodes(graph, True)
            for node in graph.nodes:
                if schema_index(node, "momentum") is not None:
                    set_argument(node, "momentum", 0.0)

    return shared_cut(space.coupling_of(candidate), space.removed(candidate), model.graph, edit=edit)


def cut_candidate(space: ElasticSpace, candidate: Candidate, model: Model) -> Model:
    """Return a candidate as a model of its own, in evaluation mode, with copies of the weights that it keeps."""
    result = cut(model, space.coupling_of(candidate), space.removed(candidate))
    branches = space.branches(candidate)
    if branches:
        remove_branches(result.graph, branches)
    return result


def sandwich(space: ElasticSpace, task: Task, *, random: int, temperature: float, seed: int) -> Binding:
    """Return the objective of the sandwich rule with in-place distillation, to be bound to a model in training.

    Yu and Huang 2019, "Universally Slimmable Networks" (arXiv:1903.05134); Yu et al. 2020, "BigNAS"
    (arXiv:2003.11142): in each step the whole net learns the labels, and the smallest and some random nets learn what
    the whole one gives, without a gradient through it. The terms are averaged, so that learning rates keep their
    meaning.

    Args:
        space: The space.
        task: Gives inputs, loss and distance.
        random: How many random candidates a step trains.
        temperature: Softens class scores.
        seed: Of the candidates: which ones a step trains follows from it and the number of the step alone.
    """

    def bind(running: Running) -> Objective:
        pool_size = max(1, _POOL_STEPS * random // POOL_USES)
        candidates = SharedCandidates(space, running.model, capacity=pool_size + 1)
        pools: dict[int, list[Candidate]] = {}

        def chosen(step: int) -> list[Candidate]:
            window, place = divmod(step, _POOL_STEPS)
            if window not in pools:
                pools.clear()
                pools[window] = random_pool(space, seed=seed + window, size=pool_size)
            pool = pools[window]
            drawn = [pool[(place * random + number) % len(pool)] for number in range(random)]
            return [space.smallest, *drawn]

        def objective(outputs: Any, batch: Batch) -> torch.Tensor:
            total = task.loss(outputs, batch)
            targets = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, outputs)
            trained = chosen(running.steps())
            for candidate in trained:
                args, kwargs = task.inputs(batch)
                given = running.forward(candidates.graph(candidate), *args, **kwargs)
                total = total + task.distance(given, targets, batch, temperature=temperature)
            return total / (1 + len(trained))

        return objective

    return bind


def random_pool(space: ElasticSpace, *, seed: int, size: int) -> list[Candidate]:
    """Return some random candidates that follow from a seed."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return [space.sample(generator) for _ in range(size)]
