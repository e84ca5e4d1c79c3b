"""Stages and their cache: reuse by content, resume, failure, and runs at the same time."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from mil_cli.device.host import resolve
from mil_cli.errors import StageError
from mil_cli.run.execute import CapturedModel
from mil_cli.stages.quantize.static import StaticConfig
from mil_cli.stages.quantize.weights import settle_biases
from mil_cli.stages.registry import config_type
from mil_cli.training.config import TrainerConfig
from tests.run.toys import RUNS, Scale, toy_data, toy_executor, toy_model


@pytest.fixture(autouse=True)
def _no_runs() -> None:
    RUNS.clear()


@pytest.fixture(scope="module")
def model() -> CapturedModel:
    return toy_model()


def weights(model: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.load().parameters()]


def test_a_stage_runs_once_and_leaves_its_input_alone(tmp_path: Path, model: CapturedModel) -> None:
    before = weights(model)
    first = toy_executor(tmp_path).run("scale", Scale(), model)
    again = toy_executor(tmp_path).run("scale", Scale(), model)
    assert (first.cached, again.cached, RUNS) == (False, True, ["scale"])
    assert first.model.fingerprint == again.model.fingerprint == again.model.load().fingerprint()
    for old, same, new in zip(before, weights(model), weights(again.model), strict=True):
        assert torch.equal(old, same)
        assert torch.equal(new, old * 2)
    assert {key: again.facts[key] for key in ("macs", "params")} == {"macs": 48, "params": 58}
    assert again.facts["quality"]["split"] == "val"


KEYS: dict[str, dict[str, Any]] = {
    "settings": {"config": Scale(factor=3)},
    "name": {"name": "other"},
    "upstream": {"model": 1},
    "fresh": {"fresh": True},
    "data": {"data": toy_data(1)},
}


@pytest.mark.parametrize("changed", KEYS)
def test_what_a_key_holds_recomputes(tmp_path: Path, model: CapturedModel, changed: str) -> None:
    toy_executor(tmp_path).run("scale", Scale(), model)
    change = dict(KEYS[changed])
    upstream = toy_model(change.pop("model")) if "model" in change else model
    name, config = change.pop("name", "scale"), change.pop("config", Scale())
    assert not toy_executor(tmp_path, **change).run(name, config, upstream).cached


@pytest.mark.parametrize("reads", [(), ("preferred_multiple",)])
def test_a_device_field_matters_only_to_its_readers(
    tmp_path: Path, model: CapturedModel, reads: tuple[str, ...]
) -> None:
    config = Scale(reads=reads)
    toy_executor(tmp_path).run("scale", config, model)
    other = resolve({"name": "host_cpu", "preferred_multiple": {"float": 4, "int8": 32}})
    assert toy_executor(tmp_path, device=other).run("scale", config, model).cached is (reads == ())
    back = toy_executor(tmp_path).run("scale", config, model)
    assert back.cached


def test_the_trainer_matters_to_training_only(tmp_path: Path, model: CapturedModel) -> None:
    train = config_type("train", "supervised")()
    other = {"trainer": TrainerConfig(epochs=1, batch_size=8)}
    for name, config, cached in (("scale", Scale(), True), ("train", train, False)):
        toy_executor(tmp_path, trainer=TrainerConfig(epochs=1, batch_size=16)).run(name, config, model)
        assert toy_executor(tmp_path, **other).run(name, config, model).cached is cached


def test_thread_count_recomputes(tmp_path: Path, model: CapturedModel) -> None:
    threads = torch.get_num_threads()
    toy_executor(tmp_path).run("scale", Scale(), model)
    try:
        torch.set_num_threads(threads + 1)
        assert not toy_executor(tmp_path).run("scale", Scale(), model).cached
    finally:
        torch.set_num_threads(threads)
    assert toy_executor(tmp_path).run("scale", Scale(), model).cached


def test_a_killed_stage_goes_on_and_a_failed_one_is_not_cached(tmp_path: Path, model: CapturedModel) -> None:
    dies = Scale(fail_at=2)
    for _ in range(2):  # the second attempt starts where the first one died
        with pytest.raises(RuntimeError, match="killed"):
            toy_executor(tmp_path).run("scale", dies, model)
    (workspace,) = (tmp_path / "work").iterdir()
    assert (workspace / "checkpoints").is_dir()
    with pytest.raises(RuntimeError, match="killed"):
        toy_executor(tmp_path, fresh=True).run("scale", dies, model)
    assert not (tmp_path / "entries").exists()


def test_a_checkpoint_is_used_only_while_what_was_read_is_the_same(
    tmp_path: Path, model: CapturedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.run import toys

    def interrupted(location: Path, **changes: Any) -> int:
        """Die after two steps, then let the stage through; return the step it started from."""
        config = Scale(reads=("preferred_multiple",))
        original = toys.scale
        calls = iter([True, False])

        def dying(model: Any, config: Any, context: Any) -> Any:
            if next(calls):
                return original(model, config.model_copy(update={"fail_at": 2}), context)
            return original(model, config, context)

        monkeypatch.setitem(__import__("mil_cli.stages.registry", fromlist=["x"])._FUNCTIONS, Scale, dying)
        dying.__module__ = original.__module__
        with pytest.raises(RuntimeError, match="killed"):
            toy_executor(location).run("scale", config, model)
        return int(toy_executor(location, **changes).run("scale", config, model).facts["notes"]["first_step"])

    assert interrupted(tmp_path / "same") == 2
    other = resolve({"name": "host_cpu", "preferred_multiple": {"float": 4, "int8": 32}})
    assert interrupted(tmp_path / "changed", device=other) == 0


def test_runs_at_the_same_time_share_the_work(tmp_path: Path, model: CapturedModel) -> None:
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(toy_executor(tmp_path).run("scale", Scale(), model)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert RUNS == ["scale"]
    assert sorted(result.cached for result in results) == [False, True, True, True]
    assert len({result.model.fingerprint for result in results}) == 1
    assert list((tmp_path / "work").iterdir()) == []


def test_a_damaged_entry_is_computed_again(tmp_path: Path, model: CapturedModel) -> None:
    first = toy_executor(tmp_path).run("scale", Scale(), model)
    archive = first.folder / "model.pt2"
    archive.write_bytes(archive.read_bytes()[:-100])
    again = toy_executor(tmp_path).run("scale", Scale(), model)
    assert not again.cached
    assert again.model.fingerprint == first.model.fingerprint


@pytest.mark.parametrize(
    ("where", "told"),
    [("factor", "stages.scale.factor"), ("stages.other", "stages.other"), ("data.train", "data.train")],
)
def test_what_a_stage_refuses_is_told_with_the_whole_key(
    tmp_path: Path, model: CapturedModel, where: str, told: str
) -> None:
    with pytest.raises(StageError) as caught:
        toy_executor(tmp_path).run("scale", Scale(refuses=where), model)
    assert caught.value.where == told


def test_training_a_quantized_model_leaves_its_biases_whole_steps(tmp_path: Path, model: CapturedModel) -> None:
    executor = toy_executor(tmp_path, trainer=TrainerConfig(epochs=1, batch_size=16, learning_rate=0.1))
    quantized = executor.run("quantize", StaticConfig(weight_bits=4), model)
    trained = executor.run("train", config_type("train", "supervised")(), quantized.model).model.load()
    biases = [name for name, _ in trained.named_parameters() if name.endswith("bias")]
    before, after = dict(quantized.model.load().named_parameters()), dict(trained.named_parameters())
    assert biases
    assert all(not torch.equal(before[name], after[name]) for name in biases)
    fingerprint = trained.fingerprint()
    settle_biases(trained.graph)
    assert trained.fingerprint() == fingerprint
