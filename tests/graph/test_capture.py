"""Capture: equality with the eager module, dynamic dimensions, names, trees, errors at the user's line."""

from __future__ import annotations

import dataclasses
import warnings
from collections import namedtuple
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mil_cli.errors import CaptureError
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, op_name

Pair = namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Outputs:
    logits: Tensor
    hidden: tuple[Tensor, ...]
    loss: Tensor | None = None


def same(model: Model, module: nn.Module, *args: Any, **kwargs: Any) -> None:
    expected = module.eval()(*args, **kwargs)
    expected = expected if isinstance(expected, Tensor) else torch.utils._pytree.tree_leaves(expected)[0]
    actual = model.flatten_outputs(model(*args, **kwargs))[0]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


class Tokens(nn.Module):
    """A transformer over a dict batch, with a mask, that returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, batch: dict[str, Tensor], *, scale: float = 1.0) -> Outputs:
        hidden = self.encoder(self.embed(batch["ids"]), src_key_padding_mask=batch["padding"])
        return Outputs(self.head(hidden.mean(1)) * scale, (hidden,))


@cache
def tokens() -> tuple[Tokens, Model]:
    module = Tokens()
    return module, Model.capture(module, (token_batch(),), {"scale": 2.0})


def token_batch(size: int = 2, length: int = 7) -> dict[str, Tensor]:
    padding = torch.zeros(size, length, dtype=torch.bool)
    padding[:, -1] = True
    return {"ids": torch.randint(0, 30, (size, length)), "padding": padding}


def test_a_dict_batch_and_a_dataclass() -> None:
    module, model = tokens()
    assert [tensor.name for tensor in model.spec.inputs] == ["batch.ids", "batch.padding"]
    assert [tensor.dtype for tensor in model.spec.inputs] == ["int64", "bool"]
    assert [tensor.name for tensor in model.spec.outputs] == ["logits", "hidden_0"]
    assert all(dict(tensor.dynamic) == {0: "batch"} for tensor in (*model.spec.inputs, *model.spec.outputs))
    batch = token_batch(9)
    expected = module.eval()(batch, scale=2.0)
    actual = model(batch, scale=2.0)
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(actual["hidden"][0], expected.hidden[0])
    assert actual.loss is None
    assert torch.equal(actual[0], actual.logits)
    assert torch.backends.mha.get_fastpath_enabled()


def test_outputs_come_back_from_flat_tensors() -> None:
    _, model = tokens()
    batch = token_batch(3)
    outputs = model(batch, scale=2.0)
    again = model.unflatten_outputs(model.flatten_outputs(outputs))
    assert torch.equal(again.logits, outputs.logits)
    assert torch.equal(again.hidden[0], outputs.hidden[0])
    flat = model.flat_inputs(batch, scale=2.0)
    assert torch.equal(flat[0], batch["ids"])
    assert torch.equal(flat[1], batch["padding"])


def test_named_tuples_keep_their_names() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Pair:
            return Pair(x + 1, x * 2)

    model = Model.capture(Two(), (torch.randn(4, 3),))
    x = torch.randn(6, 3)
    outputs = model(x)
    assert torch.equal(outputs.second, x * 2)
    first, second = outputs
    assert torch.equal(first, x + 1)
    assert torch.equal(second, x * 2)
    assert [tensor.name for tensor in model.spec.outputs] == ["first", "second"]


def test_records_survive_an_archive(tmp_path) -> None:
    _, model = tokens()
    model.save(tmp_path / "m.pt2")
    batch = token_batch(3)
    loaded = Model.load(tmp_path / "m.pt2")(batch, scale=2.0)
    assert torch.equal(loaded.logits, model(batch, scale=2.0).logits)
    assert loaded.loss is None
    with pytest.raises(AttributeError, match="there are: logits, hidden"):
        _ = loaded.nothing


def test_the_module_is_not_changed() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    module[1].eval()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    flags = [child.training for child in module.modules()]
    model = Model.capture(module, (torch.randn(4, 3, 8, 8),))
    assert [child.training for child in module.modules()] == flags
    model.train()(torch.randn(4, 3, 8, 8)).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


class CountsItsCalls(nn.Module):
    """Writes into one buffer, and puts another tensor in the place of a second."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("calls", torch.tensor(7.0))
        self.register_buffer("mean", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.layer(x)
        self.mean = 0.5 * self.mean + 0.5 * x.mean(0)
        return x - self.mean


def test_the_runs_of_a_capture_leave_no_trace_in_buffers() -> None:
    module = CountsItsCalls().eval()
    model = Model.capture(module, (torch.randn(4, 3),))
    for name, value in module.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    x = torch.randn(4, 3)
    torch.testing.assert_close(model(x), module(x))
    torch.testing.assert_close(model.state_dict(), module.state_dict())


def test_names_of_weights_are_the_users() -> None:
    module, model = tokens()
    assert set(model.state_dict()) == set(module.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in module.named_parameters()]


@pytest.mark.parametrize("size", [1, 5, 32])
def test_the_batch_is_found_whatever_the_example(size: int) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))
    model = Model.capture(module, (torch.randn(size, 3, 8, 8),))
    assert dict(model.spec.inputs[0].dynamic) == {0: "batch"}
    assert dict(model.spec.outputs[0].dynamic) == {0: "batch"}
    assert model.spec.notices == ()
    assert model.samples[0][0].shape[0] == 5
    for batch in (1, 3, 8):
        same(model, module, torch.randn(batch, 3, 8, 8))
        assert model.batch_input(batch)[0][0].shape[0] == batch


def test_dynamic_height_and_width() -> None:
    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.up = nn.ConvTranspose2d(8, 3, 2, stride=2)

        def forward(self, image: Tensor) -> Tensor:
            return torch.cat([image, self.up(F.relu(self.down(image)))], 1)

    module = UNet()
    dynamic = {"image": {0: "batch", 2: "height", 3: "width"}}
    model = Model.capture(module, (torch.randn(2, 3, 16, 24),), dynamic=dynamic)
    assert model.spec.notices == ()
    assert dict(model.spec.inputs[0].dynamic) == dynamic["image"]
    assert dict(model.spec.outputs[0].dynamic) == dynamic["image"]
    same(model, module, torch.randn(1, 3, 32, 8))
    clone_of_export = model.export_program().module(check_guards=False)
    x = torch.randn(3, 3, 8, 20)
    assert torch.equal(clone_of_export(x), model(x))


def test_a_dimension_that_specialises_becomes_static_with_a_notice() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.position

    model = Model.capture(Fixed(), (torch.randn(2, 6, 4),), dynamic={"x": {0: "batch", 1: "time"}})
    assert dict(model.spec.inputs[0].dynamic) == {0: "batch"}
    (notice,) = model.spec.notices
    assert "axis 1 (time) of input x is fixed to 6" in notice


def test_a_batch_that_specialises_becomes_static_with_a_notice() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(4, -1)

    class Checked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.ones(4, 1)

    model = Model.capture(Checked(), (torch.randn(4, 3),))
    assert dict(model.spec.inputs[0].dynamic) == {}
    assert "batch size is fixed to 4" in model.spec.notices[0]
    model = Model.capture(Fixed(), (torch.randn(4, 8),))
    assert model(torch.randn(4, 8)).shape == (4, 8)


@pytest.mark.parametrize("kind", [nn.LSTM, pytest.param(nn.GRU, marks=pytest.mark.slow)])
def test_recurrent_layers_with_a_dynamic_time(kind: type[nn.Module]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = kind(4, 8, num_layers=2, bidirectional=True, batch_first=True)
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x)[0])

    module = Recurrent()
    model = Model.capture(module, (torch.randn(2, 7, 4),), dynamic={"x": {0: "batch", 1: "time"}})
    same(model, module, torch.randn(6, 7, 4))
    if 1 in model.spec.inputs[0].dynamic:
        same(model, module, torch.randn(3, 12, 4))
    else:
        assert any("axis 1 (time)" in notice for notice in model.spec.notices)


def test_several_inputs_share_the_batch() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor, table: Tensor) -> Tensor:
            return a + b[:, None] + table.sum()

    model = Model.capture(Two(), (torch.randn(4, 3), torch.randn(4), torch.randn(7, 2)))
    assert [dict(tensor.dynamic) for tensor in model.spec.inputs] == [{0: "batch"}, {0: "batch"}, {}]
    args, _ = model.batch_input(6)
    assert [tuple(tensor.shape) for tensor in args] == [(6, 3), (6,), (7, 2)]


def test_given_names_are_kept() -> None:
    module = nn.Linear(3, 2)
    model = Model.capture(module, (torch.randn(4, 3),), input_names=["image"], output_names=["scores"], source="here")
    assert model.spec.inputs[0].name == "image"
    assert model.spec.outputs[0].name == "scores"
    assert model.spec.source == "here"
    with pytest.raises(CaptureError, match="1 input tensors"):
        Model.capture(module, (torch.randn(4, 3),), input_names=["a", "b"])


def test_attention_is_one_node() -> None:
    model = Model.capture(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (torch.randn(2, 5, 16),))
    assert "scaled_dot_product_attention" in [op_name(node) for node in calls(model.graph)]


class BranchesOnValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the user's line
            return x * 2
        return x


class UsesNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor(x.numpy() * 2)  # the user's line


class NeedsMore(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class WrongShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # the user's line


class ReturnsObjects(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x, object()


def line_of(kind: type, text: str = "# the user's line") -> str:
    import inspect

    lines, start = inspect.getsourcelines(kind)
    return f"{__file__}:{start + next(index for index, line in enumerate(lines) if text in line)}"


@pytest.mark.parametrize("kind", [BranchesOnValues, UsesNumpy, WrongShape])
def test_failures_name_the_users_line(kind: type[nn.Module], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError) as caught:
        Model.capture(kind(), (torch.randn(4, 3),))
    assert caught.value.where == line_of(kind)
    assert caught.value.hint
    assert "\n" not in caught.value.what
    assert caught.value.__suppress_context__
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [NeedsMore, ReturnsObjects])
def test_other_failures_have_a_hint(kind: type[nn.Module]) -> None:
    with pytest.raises(CaptureError) as caught:
        Model.capture(kind(), (torch.randn(4, 3),))
    assert caught.value.hint


def test_unknown_dynamic_inputs_are_named() -> None:
    with pytest.raises(CaptureError, match="did you mean 'input'"):
        Model.capture(nn.Linear(3, 2), (torch.randn(4, 3),), dynamic={"inptu": {0: "batch"}})
    with pytest.raises(CaptureError, match="has 2 axes"):
        Model.capture(nn.Linear(3, 2), (torch.randn(4, 3),), dynamic={"input": {5: "time"}})


def test_objects_are_no_inputs() -> None:
    with pytest.raises(CaptureError, match="not object"):
        Model.capture(nn.Linear(3, 2), (torch.randn(4, 3), object()))


def test_operators_of_others_are_refused() -> None:
    @torch.library.custom_op("miltest::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)

    class Custom(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return twice(x)

    with pytest.raises(CaptureError, match="miltest::twice"):
        Model.capture(Custom(), (torch.randn(4, 3),))


def test_old_weight_norms_are_copied() -> None:
    layer = nn.Linear(4, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = nn.Sequential(nn.utils.weight_norm(layer))
    module(torch.randn(2, 4))  # leaves a computed weight on the module
    model = Model.capture(module, (torch.randn(2, 4),))
    assert set(model.state_dict()) == set(module.state_dict())
    same(model, module, torch.randn(5, 4))


@pytest.mark.parametrize("name", ["code", "graph", "meta"])
def test_a_part_with_a_name_of_the_graphs_own_is_refused(name: str) -> None:
    module = nn.Sequential()
    module.add_module(name, nn.Linear(4, 4))
    with pytest.raises(CaptureError, match=f"'{name}'"):
        Model.capture(module, (torch.randn(2, 4),))
