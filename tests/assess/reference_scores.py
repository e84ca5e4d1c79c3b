"""The scores as their authors' code takes them, over plain modules: by hooks and masks on Conv2d, Linear and ReLU.

Written anew after the arithmetic of github.com/SamsungLabs/zero-cost-nas (foresight/pruners/measures, commit a43bfbc),
github.com/BayesWatch/nas-without-training (score_networks.py, commit b3a82a6) and github.com/SLDGroup/ZiCo
(ZeroShotProxy/compute_zico.py, commit b0fec65). Networks are in training mode, as their code leaves them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Batches = Sequence[tuple[Tensor, Tensor]]


def _layers(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def _backward(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    net.zero_grad()
    images, labels = batch
    functional.cross_entropy(net(images), labels).backward()


def synflow(net: nn.Module, batches: Batches) -> float:
    net = copy.deepcopy(net).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.forward = lambda x: x
    for value in net.state_dict().values():
        value.abs_()
    net(torch.ones(1, *batches[0][0].shape[1:], dtype=torch.float64)).sum().backward()
    return sum(float((layer.weight * layer.weight.grad).abs().sum().detach()) for layer in _layers(net))


def snip(net: nn.Module, batches: Batches) -> float:
    """Every weight times a mask of ones; the masks' gradients count."""
    net = copy.deepcopy(net)
    masks = []
    for layer in _layers(net):
        weight, mask = layer.weight.detach(), torch.ones_like(layer.weight, requires_grad=True)
        del layer._parameters["weight"]
        layer.weight = weight * mask
        masks.append(mask)
    images, labels = batches[0]
    functional.cross_entropy(net(images), labels).backward()
    return sum(float(mask.grad.abs().sum()) for mask in masks)


def grad_norm(net: nn.Module, batches: Batches) -> float:
    net = copy.deepcopy(net)
    _backward(net, batches[0])
    return sum(float(layer.weight.grad.norm()) for layer in _layers(net))


def grasp(net: nn.Module, batches: Batches) -> float:
    """Two passes: the gradient as a constant, then the gradient of its product with itself."""
    net = copy.deepcopy(net)
    images, labels = batches[0]
    weights = [layer.weight for layer in _layers(net)]
    first = torch.autograd.grad(functional.cross_entropy(net(images), labels), weights)
    second = torch.autograd.grad(functional.cross_entropy(net(images), labels), weights, create_graph=True)
    net.zero_grad()
    sum((a.detach() * b).sum() for a, b in zip(first, second, strict=True)).backward()
    return sum(float((-weight.detach() * weight.grad).sum()) for weight in weights)


def fisher(net: nn.Module, batches: Batches) -> float:
    """Each layer's output is cloned before anything works on it in place, and its gradient caught."""
    net = copy.deepcopy(net)
    kept: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        output.retain_grad()
        kept[module] = output
        return output.clone()

    for layer in _layers(net):
        layer.register_forward_hook(keep)
    _backward(net, batches[0])
    total = 0.0
    for layer in _layers(net):
        product = kept[layer].detach() * kept[layer].grad
        if product.ndim > 2:
            product = product.sum(tuple(range(2, product.ndim)))
        saliency = product.pow(2).mean(0).mul(0.5)
        total += sum(float(each) * layer.weight[0].numel() for each in saliency)
    return total


def jacov(net: nn.Module, batches: Batches) -> float:
    net = copy.deepcopy(net)
    images = batches[0][0].clone().requires_grad_(True)
    outputs = net(images)
    outputs.backward(torch.ones_like(outputs))
    values = np.linalg.eigvals(np.corrcoef(images.grad.flatten(1).numpy()))
    return float(-np.sum(np.log(values + 1e-5) + 1.0 / (values + 1e-5)).real)


def naswot(net: nn.Module, batches: Batches) -> float:
    net = copy.deepcopy(net)
    images, _ = batches[0]
    kernel = np.zeros((len(images), len(images)))

    def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal kernel
        on = (inputs[0].reshape(len(images), -1) > 0).float()
        kernel = kernel + (on @ on.T).detach().numpy() + ((1 - on) @ (1 - on.T)).detach().numpy()

    for module in net.modules():
        if "ReLU" in type(module).__name__:
            module.register_forward_hook(count)
    net(images)
    return float(np.linalg.slogdet(kernel)[1])


def zico(net: nn.Module, batches: Batches) -> float:
    net = copy.deepcopy(net)
    gradients: list[list[np.ndarray]] = [[] for _ in _layers(net)]
    for batch in batches:
        _backward(net, batch)
        for layer, found in zip(_layers(net), gradients, strict=True):
            found.append(layer.weight.grad.flatten().numpy().copy())
    total = 0.0
    for found in gradients:
        spread = np.std(found, axis=0)
        ratio = (np.mean(np.abs(found), axis=0)[spread != 0] / spread[spread != 0]).sum()
        total += math.log(ratio) if ratio else 0.0
    return total


REFERENCES: dict[str, Callable[[nn.Module, Batches], float]] = {
    "synflow": synflow,
    "naswot": naswot,
    "jacov": jacov,
    "snip": snip,
    "grasp": grasp,
    "grad_norm": grad_norm,
    "fisher": fisher,
    "zico": zico,
}
