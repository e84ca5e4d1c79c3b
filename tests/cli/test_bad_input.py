"""Bad input: each case gets the right exit code, one message with the key or file and the next step, no traceback."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mil_cli.cli.main import main

PRUNE = "  prune: {macs: 0.5}\n"

Project = Callable[..., Path]


def refused(arguments: list[str], *expected: str, capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Run a command that must fail, and check its one message."""
    assert main(arguments) == code, capsys.readouterr()
    captured = capsys.readouterr()
    message = captured.err[captured.err.find("error:") :]
    assert captured.err.count("error:") == 1, captured.err
    assert "Traceback" not in captured.err
    assert "  -> " in message, f"no next step in: {message}"
    for text in expected:
        assert text in message, f"{text!r} is not in: {message}"
    assert captured.out == ""
    return message


FILES = {
    "yaml syntax": (("chain: [quantize]", "chain: [quantize"), ["recipe.yaml:", "not valid YAML"]),
    "tab": (("chain: [quantize]", "chain:\n\t- quantize"), ["recipe.yaml:16"]),
    "unknown group": (("/task: classification", "/tsk: classification"), ["/tsk", "did you mean 'task'?"]),
    "unknown option": (("/task: classification", "/task: clasification"), ["did you mean 'classification'?"]),
    "unknown method": (("magnitude", "magnitud"), ["did you mean 'magnitude'?"]),
    "unknown key": (("chain: [quantize]", "chain: [quantize]\nchian: 3"), ["chian", "did you mean 'chain'?"]),
    "no data": (("data: {_target_: data.build}", ""), ["data:", "/data: digits"]),
    "no target": (("data: {_target_: data.build}", "data: {root: x}"), ["data._target_"]),
    "no model": (("model: {_target_: model.build}", ""), ["model:", "/model: resnet20"]),
    "dangling interpolation": (("trainer: {", "trainer: {ema: '${nowhere}', "), ["trainer.ema", "${nowhere}"]),
    "missing value": (("data.build}", "data.build, root: '???'}"), ["data.root", "a value is needed"]),
    "no list": (("chain: [quantize]", "chain: 3"), ["chain", "list"]),
    "a list": (("trainer: {epochs: 1, batch_size: 16}", "trainer: [1]"), ["a mapping", "a list"]),
    "a goal without bound": (("{size: {max_ratio: 9}}", "{size: {}}"), ["goals.size", "bounds nothing"]),
    "an empty goal": (("{size: {max_ratio: 9}}", "{latency: }"), ["goals.latency", "bounds nothing"]),
    "stage without method": ((PRUNE, PRUNE + "  quantise: {weight_bits: 8}\n"),
                             ["stages.quantise", "did you mean 'quantize'?"]),
    "stage of no family": ((PRUNE, PRUNE + "  x: {family: prun, method: magnitude}\n"),
                           ["stages.x", "did you mean 'prune'?"]),
    "stage of no method": ((PRUNE, PRUNE + "  x: {family: prune, method: magnit}\n"),
                           ["stages.x", "did you mean 'magnitude'?"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_recipe_file(name: str, project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    change, expected = FILES[name]
    project(recipe=change)
    refused(["compress", "recipe.yaml"], *expected, capsys=capsys)
    assert not Path("runs").exists()


OVERRIDES = {
    "wrong type": (["trainer.epochs=many"], ["trainer.epochs", "'many'", "whole number"]),
    "folder of hydra's": (["hydra.run.dir=elsewhere"], ["hydra.run.dir", "--out FOLDER"]),
    "folder of a sweep": (["-m", "seed=0,1", "hydra.sweep.dir=elsewhere"], ["hydra.sweep.dir", "--out FOLDER"]),
    "bad range": (["trainer.epochs=0"], ["trainer.epochs", "greater than or equal to 1", "got 0"]),
    "bad share": (["stages.recover.weight=1.5"], ["stages.recover.weight", "less than or equal to 1"]),
    "bad target": (["stages.prune.macs=1.5"], ["stages.prune.macs", "1.5"]),
    "bad choice": (["stages.quantize.observer=percntile"], ["did you mean 'percentile'?"]),
    "unknown stage key": (["stages.quantize.bits=4"], ["stages.quantize.bits", "no such key"]),
    "trainer of a stage": (["stages.recover.trainer.epoch=4"], ["stages.recover.trainer.epoch", "'epochs'"]),
    "unknown schedule": (["trainer.scheduler=cosin"], ["scheduler", "cosine"]),
    "unknown goal": (["goals.latncy.max_ratio=0.5"], ["goals.latncy", "did you mean 'latency'?"]),
    "unknown unit": (["goals.size.max='3 furlongs'"], ["goals.size.max", "furlongs", "kb"]),
    "a drop of everything": (["goals.quality.max_drop=100%"], ["goals.quality.max_drop", "1%"]),
    "below nothing": (["goals.latency.max='-2 ms'"], ["goals.latency.max", "can never be met"]),
    "stage not there": (["chain=[quantise]"], ["chain[0]", "did you mean 'quantize'?"]),
    "recovery not there": (["stages.prune.recover=recovr"], ["stages.prune.recover", "did you mean 'recover'?"]),
    "recovery that does not train": (["stages.prune.recover=quantize"], ["stages.prune.recover", "train or distill"]),
    "loss of no stage": (
        ["stage/quantize@stages.quantize=lsq", "stages.quantize.distill=recovr"],
        ["stages.quantize.distill", "did you mean 'recover'?"],
    ),
    "loss of a pruning": (
        ["stage/quantize@stages.quantize=lsq", "stages.quantize.distill=prune"],
        ["stages.quantize.distill", "train or distill"],
    ),
    "short training by no stage": (
        ["stage/prune@stages.prune=netadapt", "stages.prune.finetune=recovr"],
        ["stages.prune.finetune", "did you mean 'recover'?"],
    ),
    "two targets": (["stages.prune.params=0.5"], ["stages.prune", "exactly one"]),
    "empty chain": (["chain=[]"], ["chain", "empty"]),
    "wrong order": (["chain=[quantize,prune]"], ["chain", "'prune'", "before"]),
    "quantized twice": (["chain=[quantize,quantize]"], ["chain"]),
    "baseline that is no training": (["+baseline.family=quantize", "+baseline.method=static"], ["baseline"]),
    "negative seed": (["seed=-1"], ["seed"]),
    "too few rounds": (["measure.rounds=5"], ["measure.rounds", "60"]),
    "unknown device key": (["device.thread=2"], ["device.thread", "did you mean 'threads'?"]),
    "no threads": (["device.threads=0"], ["device.threads"]),
    "unreadable": (["trainer.epochs=[1"], ["command line", "trainer.epochs=[1"]),
    "several values": (["trainer.epochs=1,2"], ["-m"]),
    "no such checkpoint": (["model.checkpoint=weights.pt"], ["model.checkpoint", "weights.pt"]),
    "two origins": (["model.pt2=x.pt2"], ["model"]),
    "group not chosen": (["model=resnet20"], ["model", "- /model: ..."]),
    "delete nothing": (["~trainr"], ["trainr", "did you mean 'trainer'?"]),
}  # fmt: skip


@pytest.mark.parametrize("name", OVERRIDES)
def test_override(name: str, project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, expected = OVERRIDES[name]
    project()
    refused(["compress", "recipe.yaml", *overrides], *expected, capsys=capsys)
    assert not Path("runs").exists()


def test_all_problems_come_together(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project()
    arguments = ["trainer.epochs=0", "seed=-1", "stages.quantize.bits=4", "chain=[quantise]", "goals.size.max_ratio=0"]
    message = refused(["compress", "recipe.yaml", *arguments], "problems in the recipe", capsys=capsys)
    for key in ("trainer.epochs", "seed", "stages.quantize.bits", "chain[0]", "goals.size.max_ratio"):
        assert f"  {key}: " in message


def test_one_bad_point_of_a_sweep_stops_it_before_it_runs(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project()
    refused(["compress", "recipe.yaml", "-m", "trainer.epochs=1,0"], "trainer.epochs", "got 0", capsys=capsys)
    assert not Path("runs").exists()


def test_paths(project: Project, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = project()
    refused(["compress", "nowhere.yaml"], "nowhere.yaml", capsys=capsys)
    refused(["compress", "recip.yaml"], "did you mean 'recipe.yaml'?", capsys=capsys)
    refused(["compress", "."], "folder", "recipe.yaml", capsys=capsys)
    (folder / "recipe.yaml").rename(folder / "recipe.yml")
    refused(["compress", "recipe.yml"], ".yaml", "rename", capsys=capsys)
    odd = tmp_path / "${odd}"
    odd.mkdir()
    (odd / "recipe.yaml").write_text("a: 1\n")
    refused(["compress", str(odd / "recipe.yaml")], "${", capsys=capsys)


USER_CODE = {
    "no module": ({"recipe": ("model.build", "modle.build")}, ["model._target_", "modle"]),
    "no function": ({"recipe": ("model.build", "model.biuld")}, ["did you mean 'build'?"]),
    "no argument": ({"recipe": ("model.build", "model.build, widht: 3")}, ["model.widht", "did you mean 'width'?"]),
    "no model": ({"model": ("return Net(width)", "return width")}, ["model._target_", "torch.nn.Module"]),
    "model raises": ({"model": ("return Net(width)", "return Net(1 / 0)")}, ["ZeroDivisionError", "model.py:"]),
    "syntax error": ({"model": ("return Net(width)", "return Net(width")}, ["SyntaxError", "model.py"]),
    "missing import": ({"model": ("import torch\n", "import torch, nopackage\n")}, ["nopackage"]),
    "not captured": (
        {"model": ("return self.head(", "if image.sum() > 0: image = image + 1\n        return self.head(")},
        ["model.py:11"],
    ),
    "does not run": ({"model": ("nn.Linear(width, 10)", "nn.Linear(width + 1, 10)")}, ["model.py:"]),
    "nan in data": ({"data": ("torch.randn(n, 1, 8, 8, generator=g)", "torch.full((n, 1, 8, 8), float('nan'))")},
                    ["data.train", "NaN"]),
    "empty split": ({"data": ('"val": split(32)', '"val": split(0)')}, ["data.val", "empty"]),
    "no test split": ({"data": (', "test": split(32)', "")}, ["test"]),
    "no data returned": ({"data": ("return {", "return None and {")}, ["data"]),
    "lengths differ": ({"data": ("torch.randint(0, 10, (n,)", "torch.randint(0, 10, (n + 1,)")}, ["data."]),
    "label out of range": ({"data": ("torch.randint(0, 10, (n,)", "torch.randint(10, 20, (n,)")}, ["10"]),
    "energy without a reading": ({"recipe": ("size: {max_ratio: 9}", "energy: {max: 1 mJ}")}, ["energy"]),
    "cost without a price": ({"recipe": ("size: {max_ratio: 9}", "cost: {max: 1}")}, ["cost", "price_per_hour"]),
    "impossible device": ({"recipe": ("goals:", "device: {requires: {isa: [nonsense]}}\ngoals:")}, ["nonsense"]),
}  # fmt: skip


@pytest.mark.parametrize("name", USER_CODE)
def test_users_code_and_data(name: str, project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    changes, expected = USER_CODE[name]
    project(**changes)
    refused(["compress", "recipe.yaml", "--out", "run"], *expected, capsys=capsys)
    assert not Path("run/model.onnx").exists()


def test_missing_data_says_what_to_install(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    target = "_target_: mil_cli.data.fashion_mnist.fashion_mnist, root: nowhere"
    project(recipe=("_target_: data.build", target))
    refused(["compress", "recipe.yaml"], "nowhere", "apt-get install dataset-fashion-mnist", capsys=capsys)


class Payload:
    """What a pickle that runs code looks like."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.marker,))


def write_checkpoint(kind: str, path: Path) -> None:
    import torch

    weights = {"conv.weight": torch.zeros(8, 1, 3, 3), "conv.bias": torch.zeros(8)}
    match kind:
        case "pickle":
            torch.save({"model": Payload(path.with_name("pwned")), **weights}, path)
        case "plain pickle":
            path.write_bytes(pickle.dumps(Payload(path.with_name("pwned"))))
        case "keys missing":
            torch.save(weights, path)
        case "shapes differ":
            torch.save({**weights, "head.weight": torch.zeros(10, 9), "head.bias": torch.zeros(10)}, path)
        case "cut short":
            torch.save(weights, path)
            path.write_bytes(path.read_bytes()[:200])
        case "empty":
            path.write_bytes(b"")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("pickle", ["weights.pt"]),
        ("plain pickle", ["weights.pt"]),
        ("keys missing", ["head.weight"]),
        ("shapes differ", ["head.weight"]),
        ("cut short", ["weights.pt"]),
        ("empty", ["weights.pt"]),
    ],
)
def test_checkpoint(kind: str, expected: list[str], project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    folder = project(recipe=("model.build", "model.build, checkpoint: weights.pt"))
    write_checkpoint(kind, folder / "weights.pt")
    refused(["compress", "recipe.yaml", "--out", "run"], *expected, capsys=capsys)
    assert not (folder / "pwned").exists()


def test_damaged_safetensors(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    folder = project(recipe=("model.build", "model.build, checkpoint: weights.safetensors"))
    (folder / "weights.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00not json")
    refused(["compress", "recipe.yaml", "--out", "run"], "weights.safetensors", capsys=capsys)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model."""
    import torch

    from mil_cli.graph.model import Model

    path = tmp_path_factory.mktemp("archive") / "model.pt2"
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    Model.capture(model, (torch.zeros(2, 1, 8, 8),)).save(path)
    return path


def damage(archive: Path, target: Path, kind: str) -> None:
    for file in archive.parent.glob("model.*"):
        (target.parent / file.name).write_bytes(file.read_bytes())
    match kind:
        case "cut short":
            target.write_bytes(target.read_bytes()[:500])
        case "text":
            target.write_text("hello")
        case "sidecar":
            target.with_suffix(".json").write_text("{")
        case "swapped pickle":
            with zipfile.ZipFile(archive) as source, zipfile.ZipFile(target, "w") as changed:
                prefix = source.namelist()[0].partition("/")[0]
                for name in source.namelist():
                    if name != f"{prefix}/data/sample_inputs/model.pt":
                        changed.writestr(name, source.read(name))
                stream = io.BytesIO()
                pickle.dump(Payload(target.with_name("pwned")), stream)
                changed.writestr(f"{prefix}/data/sample_inputs/model.pt", stream.getvalue())
            target.with_suffix(".json").unlink()


@pytest.mark.parametrize(
    ("kind", "verb"),
    [
        *(("swapped pickle", verb) for verb in ("export", "measure", "inspect", "compress")),
        *((kind, "export") for kind in ("cut short", "text", "sidecar")),
    ],
)
def test_archive(kind: str, verb: str, archive: Path, project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    folder = project(recipe=("_target_: model.build", "pt2: model.pt2"))
    damage(archive, folder / "model.pt2", kind)
    named = "recipe.yaml" if verb == "compress" else "model.pt2"
    refused([verb, named], "model", capsys=capsys)
    assert not (folder / "pwned").exists()


def test_output_folder_in_the_way(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project()
    Path("run").write_text("a file")
    refused(["compress", "recipe.yaml", "--out", "run"], "run", capsys=capsys)
    refused(["compress", "recipe.yaml", "--out", "run/deeper"], "run", capsys=capsys)
    assert Path("run").read_text() == "a file"


@pytest.mark.parametrize(("number", "expected"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "another folder")])
def test_disk_full_or_read_only(
    number: int,
    expected: str,
    project: Project,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    private_cache: Path,
) -> None:
    project()

    def refuse(source: object, target: object, **_: object) -> None:
        raise OSError(number, os.strerror(number), str(target))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refuse)
        refused(["compress", "recipe.yaml", "--out", "run"], expected, capsys=capsys)
    left = [path for folder in (Path("run"), private_cache) for path in folder.rglob(".writing-*")]
    assert left == []


def test_cache_that_is_a_file(project: Project, capsys: pytest.CaptureFixture[str], private_cache: Path) -> None:
    project()
    private_cache.write_text("in the way")
    refused(["compress", "recipe.yaml", "--out", "run"], "cannot write", capsys=capsys)
    assert main(["doctor"]) == 2
    assert "MIL_CACHE" in capsys.readouterr().out


def test_reports(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project()
    refused(["report", "nowhere"], "nowhere", "runs/", capsys=capsys)
    refused(["report", "."], "no run in this folder", capsys=capsys)
    for text in ("{", "[]", json.dumps({"version": 99})):
        Path("report.json").write_text(text)
        refused(["report", "."], "report.json", capsys=capsys)


def test_subjects(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project()
    Path("text.onnx").write_text("hello")
    Path("empty.onnx").write_bytes(b"")
    refused(["measure", "text.onnx"], "text.onnx", "ONNX", capsys=capsys)
    refused(["measure", "empty.onnx"], "empty.onnx", "ONNX", capsys=capsys)
    refused(["measure", "nowhere.onnx"], "nowhere.onnx", capsys=capsys)
    refused(["measure", "txt.onnx"], "did you mean 'text.onnx'?", capsys=capsys)
    Path("folder.onnx").mkdir()
    refused(["measure", "folder.onnx"], "folder.onnx", "folder", "name a file in it", capsys=capsys)
    Path("model.pt2").write_text("a model")
    refused(["export", "model.pt2", "-o", "./model.pt2"], "--output", "the model itself", capsys=capsys)
    assert Path("model.pt2").read_text() == "a model"
    refused(["measure", "model.py"], "model.py", ".pt2", capsys=capsys)
    refused(["measure", "text.onnx", "--device", "host_cp"], "did you mean 'host_cpu'?", capsys=capsys)
    refused(["measure", "text.onnx", "--json", "."], "--json", capsys=capsys)
    refused(["export", "text.onnx"], "text.onnx", ".pt2", capsys=capsys)
    refused(["export", "nowhere.pt2"], "nowhere.pt2", capsys=capsys)
    refused(["inspect", "nowhere.yaml"], "nowhere.yaml", capsys=capsys)


def test_interrupted(project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    project()

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mil_cli.stages.quantize.post_training.place_observed", interrupt)
        assert main(["compress", "recipe.yaml"]) == 130
    captured = capsys.readouterr()
    assert "the same command goes on" in captured.err
    assert "Traceback" not in captured.err
