"""The three things that a stage does with coupling, on a `Model`: analyse, cut, check."""

from __future__ import annotations

from collections.abc import Iterable

from mil_cli.graph.coupling.analysis import analyse_graph
from mil_cli.graph.coupling.coupling import Coupling, Removed
from mil_cli.graph.coupling.cut import cut_graph, named_tensor
from mil_cli.graph.coupling.equivalence import TOLERANCE, Call, EquivalenceReport, check_graphs
from mil_cli.graph.model import Model


def analyse(model: Model) -> Coupling:
    """Find what must be cut together in a model; the model is not changed.

    The graph is run on shapes alone, made from the model's samples.
    """
    source = model.clone().eval() if model.training else model
    if model.spec.batch is None:
        return analyse_graph(source.graph, *source.samples)
    return analyse_graph(source.graph, *source.samples, resized=source.batch_input)


def cut(model: Model, coupling: Coupling, removed: Removed) -> Model:
    """Return a new model, in evaluation mode, without the removed classes.

    Args:
        model: The analysed model, or one with the same graph and other weights (fine-tuned since).
        coupling: Its analysis.
        removed: By space, the classes to remove; `repair` gives a selection that can be cut.

    Raises:
        ModelError: A class cannot be removed, or an axis would become empty.
    """
    graph = cut_graph(coupling, removed, weights=lambda name: named_tensor(model.graph, name))
    return Model(graph=graph, spec=model.spec, samples=model.samples)


def check_equivalence(
    model: Model,
    coupling: Coupling,
    removed: Removed,
    cut_model: Model,
    inputs: Iterable[Call],
    *,
    tolerance: float = TOLERANCE,
) -> EquivalenceReport:
    """Prove that a cut changed nothing but what was cut out; if it did, name the spaces that are to blame.

    The whole cut is compared at once, and bisected only when it fails.

    Args:
        model: The model before the cut.
        coupling: Its analysis.
        removed: What was removed.
        cut_model: What `cut` gave.
        inputs: Real inputs, as (args, kwargs).
        tolerance: Largest difference, relative to the largest value of an output.
    """
    return check_graphs(
        coupling,
        removed,
        cut_model.graph,
        inputs,
        recut=lambda subset: cut(model, coupling, subset).graph,
        original=model.graph,
        tolerance=tolerance,
    )
