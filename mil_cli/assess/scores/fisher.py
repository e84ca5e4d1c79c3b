"""Fisher pruning as a score: what the loss would change by without each output channel."""

from __future__ import annotations

import torch

from mil_cli.assess.scores.layers import depending_on_inputs, weighted_layers
from mil_cli.assess.scores.samples import layouts
from mil_cli.assess.scores.subject import Subject
from mil_cli.graph.nodes import op_name
from mil_cli.graph.taps import Tapped


def fisher(subject: Subject) -> float:
    """Return the sum over convolutions and linear layers of each channel's saliency times the weights that make it.

    Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning"; Turner et al. 2020, "BlockSwap".
    A channel's saliency is half the mean over samples of ``(sum over positions of value * gradient)^2``, of what the
    layer gives. Abdelfattah et al. 2021, "Zero-cost proxies for lightweight NAS", give it to every weight of the
    channel, and sum. Layers that work on constants (tables of positions) do not count.

    Raises:
        ModelError: Samples depend on each other.
    """
    graph = subject.network.graph
    depending = depending_on_inputs(graph)
    layers = {node: weight for node, weight in weighted_layers(graph).items() if node in depending}
    places = layouts(subject, layers)
    tapped = Tapped(subject.network, {node.name: node for node in layers})
    batch = subject.batches[0]
    outputs, values = subject.run(tapped, subject.task.inputs(batch))
    loss = subject.task.loss(outputs, batch)
    gradients = torch.autograd.grad(loss, list(values.values()), allow_unused=True, materialize_grads=True)
    total = 0.0
    for (node, weight), gradient in zip(layers.items(), gradients, strict=True):
        products = values[node.name].detach() * gradient
        products = products if op_name(node) == "linear" else products.movedim(1, -1)
        changes = places[node].by_sample(products, subject.samples).flatten(1, -2).sum(1)
        total += float(0.5 * changes.square().mean(0).sum()) * (weight.numel() // changes.shape[1])
    return total
