"""An archive that someone tampered with is refused, and nothing in it runs."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mil_cli.errors import ArchiveError
from mil_cli.graph import safety
from mil_cli.graph.archive import sidecar_path
from mil_cli.graph.model import Model

_GRAPH = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_WEIGHTS = "data/weights/model_weights_config.json"
_CONSTANTS = "data/constants/model_constants_config.json"


class Evil:
    """Unpickling this touches a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.target),)


def evil_pickle(target: Path, *, plain: bool = False) -> bytes:
    if plain:
        return pickle.dumps(Evil(target))
    buffer = io.BytesIO()
    torch.save(((Evil(target),), {}), buffer)
    return buffer.getvalue()


def rewrite(path: Path, changes: dict[str, bytes]) -> None:
    """Write an archive again with members replaced or added, and without its sidecar."""
    with zipfile.ZipFile(path) as file:
        root = file.namelist()[0].partition("/")[0]
        members = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    sidecar_path(path).unlink(missing_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, content in (members | changes).items():
            file.writestr(f"{root}/{name}", content)


def member(path: Path, name: str) -> Any:
    with zipfile.ZipFile(path) as file:
        return json.loads(file.read(f"{file.namelist()[0].partition('/')[0]}/{name}"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "model.pt2"
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    Model.capture(module, (torch.randn(4, 3, 8, 8),)).save(path)
    return path


@pytest.fixture
def saved(written: Path, tmp_path: Path) -> Path:
    for file in written.parent.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path / written.name


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "the-attack-ran"


def refused(path: Path, target: Path) -> str:
    with pytest.raises(ArchiveError) as caught:
        Model.load(path)
    assert not target.exists()
    return str(caught.value)


def test_the_attack_works_on_torch_alone(saved: Path, target: Path) -> None:
    """Without our check the swapped member runs: this proves that the other tests test something."""
    rewrite(saved, {_SAMPLES: evil_pickle(target)})
    with contextlib.suppress(Exception):
        torch.export.load(str(saved))
    assert target.exists()


def test_rewriting_alone_does_no_harm(saved: Path) -> None:
    expected = Model.load(saved)
    rewrite(saved, {})
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(Model.load(saved)(x), expected(x))


def test_swapped_samples_are_refused(saved: Path, target: Path) -> None:
    rewrite(saved, {_SAMPLES: evil_pickle(target)})
    assert "full unpickling" in refused(saved, target)


def test_swapped_samples_are_refused_with_the_sidecar_too(saved: Path, target: Path) -> None:
    sidecar = sidecar_path(saved).read_bytes()
    rewrite(saved, {_SAMPLES: evil_pickle(target)})
    sidecar_path(saved).write_bytes(sidecar)
    assert "does not belong to its sidecar" in refused(saved, target)
    changed = json.loads(sidecar)
    import hashlib

    changed["sha256"]["archive"] = hashlib.sha256(saved.read_bytes()).hexdigest()
    sidecar_path(saved).write_text(json.dumps(changed))
    assert "full unpickling" in refused(saved, target)


@pytest.mark.parametrize("config", [_WEIGHTS, _CONSTANTS])
@pytest.mark.parametrize("prefix", ["weight_0", "tensor_0", "custom_obj_0", "opaque_obj_0"])
def test_pickled_payloads_are_refused(saved: Path, target: Path, config: str, prefix: str) -> None:
    listed = member(saved, config)
    weights = member(saved, _WEIGHTS)["config"]
    entry = {**next(iter(weights.values())), "path_name": prefix, "use_pickle": True}
    listed["config"]["0.weight" if config == _WEIGHTS else "constant"] = entry
    folder = config.rpartition("/")[0]
    payload = evil_pickle(target, plain=prefix.startswith("opaque"))
    rewrite(saved, {config: json.dumps(listed).encode(), f"{folder}/{prefix}": payload})
    assert "full unpickling" in refused(saved, target)


@pytest.mark.parametrize("folder", ["weights", "constants"])
def test_legacy_pickles_are_refused(saved: Path, target: Path, folder: str) -> None:
    rewrite(saved, {f"data/{folder}/model.pt": evil_pickle(target)})
    assert "full unpickling" in refused(saved, target)


@pytest.mark.parametrize(
    "name", ["data/aotinductor/model/x.so", "models/other.json", "data/weights/extra", "code/x.py", "data/x.pkl"]
)
def test_unknown_members_are_refused(saved: Path, target: Path, name: str) -> None:
    rewrite(saved, {name: evil_pickle(target)})
    refused(saved, target)


@pytest.mark.parametrize(
    "function",
    [
        "torch.os.mkdir",
        "torch.hub.load",
        "torch.load",
        "_operator.methodcaller",
        "torch.ops.load_library",
        "#x.y",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.__class__.__subclasses__",
        "torch.ops.aten.__init__.x",
        "torch.ops.other.op.default",
        "torch.ops.higher_order.call_torchbind",
    ],
)
def test_functions_that_are_no_operators_are_refused(saved: Path, target: Path, function: str) -> None:
    program = member(saved, _GRAPH)
    program["graph_module"]["graph"]["nodes"][0]["target"] = function
    rewrite(saved, {_GRAPH: json.dumps(program).encode()})
    assert "not a tensor operator" in refused(saved, target)


def code_making(target: Path) -> str:
    """Return an expression without dots of its own that makes a folder."""
    return f"getattr(__import__('os'), 'mkdir')('{target}')"


def wrapped(program: Any, argument: dict[str, Any]) -> None:
    """Let the first node call `torch.ops.higher_order.wrap` with one argument."""
    node = program["graph_module"]["graph"]["nodes"][0]
    node.update(target="torch.ops.higher_order.wrap", inputs=[argument], is_hop_single_tensor_return=True)


def test_names_of_arguments_that_are_code_are_refused(
    saved: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = member(saved, _GRAPH)
    wrapped(program, {"name": f"x=[{code_making(target)}], y", "arg": {"as_int": 1}, "kind": 2})
    rewrite(saved, {_GRAPH: json.dumps(program).encode()})
    assert "not a plain name" in refused(saved, target)
    monkeypatch.setattr(safety, "_check_names", lambda *_: None)
    with contextlib.suppress(Exception):
        Model.load(saved)
    assert target.exists()  # the name does run where it is not refused


def test_names_of_weights_that_are_code_are_refused(saved: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = json.dumps(f'0.training"), {code_making(target)}, ("').encode()
    changes = {part: json.dumps(member(saved, part)).encode() for part in (_GRAPH, _WEIGHTS)}
    rewrite(saved, {part: content.replace(b'"0.weight"', name) for part, content in changes.items()})
    assert "not a plain name" in refused(saved, target)
    monkeypatch.setattr(safety, "_check_names", lambda *_: None)
    with contextlib.suppress(Exception):
        Model.load(saved)
    assert target.exists()  # the name does run where it is not refused


def test_other_names_that_are_code_are_refused(saved: Path, target: Path) -> None:
    whole = member(saved, _GRAPH)
    evil = f"input=[{code_making(target)}]"
    for key in ("forward_arg_names", "in_spec"):
        program = copy.deepcopy(whole)
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        keywords = signature["in_spec"].replace('"[]"', json.dumps(json.dumps([evil])))
        signature[key] = [evil] if key == "forward_arg_names" else keywords
        assert program != whole
        rewrite(saved, {_GRAPH: json.dumps(program).encode()})
        assert "not a plain name" in refused(saved, target)
    text = json.dumps(whole).replace('"name": "input"', '"name": ' + json.dumps(evil))
    rewrite(saved, {_GRAPH: text.encode()})
    assert "not a plain name" in refused(saved, target)


def test_names_that_make_no_code_are_refused(saved: Path, target: Path) -> None:
    program = member(saved, _GRAPH)
    program["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = ["lambda"]
    rewrite(saved, {_GRAPH: json.dumps(program).encode()})
    assert "makes no code" in refused(saved, target)


@pytest.mark.parametrize("name", [_GRAPH, _WEIGHTS])
def test_members_nested_without_end_are_refused(saved: Path, target: Path, name: str) -> None:
    rewrite(saved, {name: b"[" * 200_000 + b"]" * 200_000})
    assert "damaged" in refused(saved, target)


def test_a_sidecar_nested_without_end_is_refused(saved: Path, target: Path) -> None:
    sidecar_path(saved).write_bytes(b"[" * 200_000 + b"]" * 200_000)
    assert "the sidecar is damaged" in refused(saved, target)


def test_functions_as_arguments_are_refused(saved: Path, target: Path) -> None:
    program = member(saved, _GRAPH)
    wrapped(program, {"name": "", "arg": {"as_operator": "torch.os.mkdir"}, "kind": 1})
    rewrite(saved, {_GRAPH: json.dumps(program).encode()})
    assert "not a tensor operator" in refused(saved, target)


def test_expressions_that_are_code_are_refused(saved: Path, target: Path) -> None:
    text = json.dumps(member(saved, _GRAPH))
    attacked, count = re.subn(r"Symbol\('s\d+'[^)]*\)", f"__import__('os').mkdir('{target}')", text)
    assert count
    rewrite(saved, {_GRAPH: attacked.encode()})
    assert "not arithmetic" in refused(saved, target)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "Symbol('s0').func",
        "Max(1, ().__class__)",
        "Symbol(name='__import__')",
        "Symbol('s0', positive=print())",
        "Max(*[1])",
        "[x for x in (1,)]",
        "lambda: 1",
        "exit()",
        "s0 if s1 else s2",
        "f'{1}'",
        "'s0'.upper()",
        "(",
        3,
    ],
)
def test_what_is_not_arithmetic(text: object) -> None:
    assert not safety._is_arithmetic(text)


@pytest.mark.parametrize(
    "text",
    [
        "4",
        "s77",
        "4*s77 + 1",
        "Symbol('s77', positive=True, integer=True)",
        "FloorDiv(Symbol('s0'), Integer(2))",
        "-oo",
    ],
)
def test_what_is_arithmetic(text: str) -> None:
    assert safety._is_arithmetic(text)


def test_trees_of_someones_classes_are_refused(saved: Path, target: Path) -> None:
    tree = '[1, {"type": "collections.defaultdict", "context": "{}", "children_spec": []}]'
    with pytest.raises(ArchiveError, match="class of someone's own"):
        safety.check_tree(tree, where="x")
    context = json.dumps([{"__enum__": True, "fqn": "os:x"}])
    enum = json.dumps([1, {"type": "builtins.dict", "context": context, "children_spec": []}])
    with pytest.raises(ArchiveError, match="Python objects"):
        safety.check_tree(enum, where="x")
    program = member(saved, _GRAPH)
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    signature["out_spec"] = tree
    rewrite(saved, {_GRAPH: json.dumps(program).encode()})
    assert "class of someone's own" in refused(saved, target)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a zip at all" * 100])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pt2"
    path.write_bytes(content)
    with pytest.raises(ArchiveError):
        Model.load(path)


def test_a_plain_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ArchiveError, match=r"not a \.pt2 archive"):
        Model.load(path)


@pytest.mark.parametrize(
    "function",
    [
        "torch.ops.aten.conv2d.default",
        "torch.ops.aten.__and__.Tensor",
        "torch.ops.aten._native_batch_norm_legit.default",
        "torch.ops.mil.quantize_affine.default",
        "torch.ops.higher_order.wrap_with_set_grad_enabled",
        "_operator.mul",
        "torch.sym_max",
    ],
)
def test_operators_are_known(function: str) -> None:
    assert safety._TARGET.match(function)


def test_quantizers_are_read(saved: Path, tmp_path: Path) -> None:
    model = Model.load(saved).clone()
    graph = model.graph.graph
    weight = next(node for node in graph.find_nodes(op="get_attr") if node.target == "0.weight")
    model.graph.register_buffer("scale", torch.tensor([0.1, 0.2, 0.3, 0.4]))
    model.graph.register_buffer("zero", torch.zeros(4, dtype=torch.int32))
    convolution = next(iter(weight.users))
    with graph.inserting_before(convolution):
        values = [graph.get_attr("scale"), graph.get_attr("zero")]
        target = torch.ops.mil.quantize_affine.default
        quantized = graph.call_function(target, (weight, *values, 0, -128, 127))
    convolution.replace_input_with(weight, quantized)
    model.graph.recompile()
    model.save(tmp_path / "q.pt2")
    loaded = Model.load(tmp_path / "q.pt2")
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(loaded(x), model(x))
    assert not torch.equal(loaded(x), Model.load(tmp_path / "model.pt2")(x))
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.macs() == 36 * 4 * 27 + 4 * 36 * 5
