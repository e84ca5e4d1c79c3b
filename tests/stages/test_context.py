"""The context: what is read is written down, by name and with the fingerprint that decides about reuse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mil_cli.data.base import Data
from mil_cli.device.host import resolve
from mil_cli.errors import DataError, RecipeError, StageError
from mil_cli.events import SilentProgress
from mil_cli.spaces import DesignedSpace
from mil_cli.stages import context as module
from mil_cli.stages import surroundings as surroundings_module
from mil_cli.stages.context import Context
from mil_cli.stages.registry import config_type
from mil_cli.stages.surroundings import Surroundings, derive_seed
from mil_cli.stages.trace import Trace
from mil_cli.training.config import TrainerConfig


@dataclass
class Split:
    content: str

    def __len__(self) -> int:
        return 8

    def batches(self, batch_size: int, **options: Any) -> Iterator[tuple[torch.Tensor, ...]]:
        for start in range(0, 8, batch_size):
            yield (torch.arange(start, min(8, start + batch_size)),)

    def fingerprint(self) -> str:
        return self.content


@dataclass
class Task:
    content: str = "task"

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return batch, {}

    def fingerprint(self) -> str:
        return self.content


def surroundings(**changes: Any) -> Surroundings:
    base: dict[str, Any] = {
        "seed": 0,
        "task": Task(),
        "data": Data(name="toy", train=Split("train"), val=Split("val"), test=Split("test")),
        "device": resolve({"name": "host_cpu"}),
        "trainer": TrainerConfig(),
        "goals": {"size": {"max": 100.0}},
        "stages": {"recover": config_type("train", "supervised")()},
        "load_source": lambda source: f"model of {source}",
        "source_fingerprint": lambda source: f"content of {source}",
        "load_data": lambda settings: Data(name="other", train=Split("images"), val=Split("-"), test=Split("-")),
        "load_space": lambda: "space",
        "space_fingerprint": lambda: "module",
    }
    return Surroundings(**{**base, **changes})


def context(around: Surroundings, **options: Any) -> Context:
    return Context(name="cut", surroundings=around, progress=SilentProgress(), **options)


READS = {
    "task": lambda context: context.task,
    "data/train": lambda context: context.data.train,
    "data/val": lambda context: context.data.val,
    "device/threads": lambda context: context.device.threads,
    "trainer": lambda context: context.trainer(),
    "goal/size": lambda context: context.goal("size"),
    "seed": lambda context: context.generator(),
    'source/"teacher.pt2"': lambda context: context.source("teacher.pt2"),
    "space": lambda context: context.space(),
    'other_data/{"_target_": "images"}': lambda context: context.other_data({"_target_": "images"}).train,
}


@pytest.mark.parametrize("name", READS)
def test_each_read_is_recorded_and_nothing_else(name: str) -> None:
    reader = context(surroundings())
    assert reader.trace.reads == {}
    READS[name](reader)
    assert list(reader.trace.reads) == [name]


CHANGES: dict[str, dict[str, Any]] = {
    "task": {"task": Task("other task")},
    "data/train": {"data": Data(name="toy", train=Split("other"), val=Split("val"), test=Split("test"))},
    "data/val": {"data": Data(name="toy", train=Split("train"), val=Split("other"), test=Split("test"))},
    "device/threads": {"device": resolve({"name": "host_cpu", "threads": 7})},
    "trainer": {"trainer": TrainerConfig(epochs=99)},
    "goal/size": {"goals": {"size": {"max": 200.0}}},
    "seed": {"seed": 1},
    'source/"teacher.pt2"': {"source_fingerprint": lambda source: "other content"},
    "space": {"space_fingerprint": lambda: "other module"},
    'other_data/{"_target_": "images"}': {
        "load_data": lambda settings: Data(name="other", train=Split("changed"), val=Split("-"), test=Split("-"))
    },
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("changed", CHANGES)
def test_a_change_matters_exactly_to_those_who_read_it(read: str, changed: str) -> None:
    reader = context(surroundings())
    READS[read](reader)
    later = replace(surroundings(), **CHANGES[changed])
    assert reader.trace.holds(surroundings())
    assert reader.trace.holds(later) is (read != changed)


def test_what_nobody_reads_matters_to_nobody() -> None:
    reader = context(surroundings())
    for read in READS.values():
        read(reader)
    test_changed = Data(name="toy", train=Split("train"), val=Split("val"), test=Split("other"))
    described = resolve({"name": "host_cpu", "description": "another text"})
    assert reader.trace.holds(surroundings(data=test_changed, device=described))


def test_who_measures_latencies_depends_on_how_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(module, "measure_latency", lambda files, **options: asked.append((files, options)) or ["timed"])
    reader = context(surroundings())
    files: Any = ["a.onnx"]
    assert reader.latencies(files, feeds={}) == ["timed"]
    assert asked[0][0] == files
    assert list(reader.trace.reads) == ["latency_protocol"]
    assert reader.trace.holds(surroundings())
    monkeypatch.setattr(surroundings_module, "LATENCY_VERSION", surroundings_module.LATENCY_VERSION + 1)
    assert not reader.trace.holds(surroundings())


def test_a_stage_that_is_gone_makes_the_trace_invalid() -> None:
    assert not Trace({"stage/gone": "x"}).holds(surroundings())
    assert not Trace({"device/gone": "x"}).holds(surroundings())


def test_the_test_split_is_out_of_reach() -> None:
    with pytest.raises(RuntimeError, match="reporting only"):
        _ = context(surroundings()).data.test


def test_another_split_to_train_on_leaves_the_recipes_own_unread() -> None:
    reader = context(surroundings(shorten=lambda split: Split("shortened")))
    data = reader.with_train(Split("made"))
    assert data.train == Split("made")
    assert reader.trace.reads == {}
    assert data.val == Split("val")
    assert list(reader.trace.reads) == ["data/val"]
    assert reader.with_train(Split("made"), made=True).train == Split("shortened")
    with pytest.raises(RuntimeError, match="reporting only"):
        _ = data.test


def test_other_data_that_cannot_be_read_are_named_by_the_stages_key() -> None:
    def load(settings: object) -> Data:
        raise DataError("the image folder is missing", where="data.root", value="nowhere")

    with pytest.raises(DataError, match=r"stages\.cut\.data\.root: the image folder is missing"):
        context(surroundings(load_data=load)).other_data({"_target_": "images"})


def test_the_original_is_out_of_reach_while_it_is_made() -> None:
    with pytest.raises(StageError, match="does not exist yet"):
        _ = context(surroundings()).original


def test_trainer_overrides_are_merged_and_checked() -> None:
    reader = context(surroundings())
    assert reader.trainer({"epochs": 3}).epochs == 3
    assert reader.trainer().epochs == TrainerConfig().epochs
    with pytest.raises(RecipeError, match=r"stages\.cut\.trainer\.epochz.*\n.*did you mean 'epochs'"):
        reader.trainer({"epochz": 3})


def test_fine_tuning_needs_a_stage_that_trains() -> None:
    quantize = config_type("quantize", "static")()
    reader = context(surroundings(stages={"recover": config_type("train", "supervised")(), "quantize": quantize}))
    model: Any = None
    with pytest.raises(StageError, match=r"no stage 'recovr'.*\n.*did you mean 'recover'"):
        reader.finetune(model, stage="recovr", name="a")
    with pytest.raises(StageError, match="does not train"):
        reader.finetune(model, stage="quantize", name="a")


def test_trainer_settings_of_fine_tuning_go_over_those_of_its_stage_key_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    adamw = {"_target_": "torch.optim.AdamW", "lr": 0.1, "weight_decay": 0.2}
    stages = {"recover": config_type("train", "supervised")(trainer={"optimizer": adamw, "epochs": 3})}
    reader = context(surroundings(stages=stages))
    seen: list[TrainerConfig] = []
    monkeypatch.setattr(reader, "fit", lambda model, *, settings, **options: seen.append(settings))
    model: Any = None
    reader.finetune(model, stage="recover", name="a", trainer={"optimizer": {"lr": 0.01}})
    assert seen[0].optimizer == {**adamw, "lr": 0.01}
    assert seen[0].epochs == 3


def test_seeds_differ_by_stage_and_purpose_and_follow_the_recipe() -> None:
    assert derive_seed(0, "a") != derive_seed(0, "b") != derive_seed(1, "b")
    assert derive_seed(3, "a", "b") == derive_seed(3, "a", "b")
    first, second = (context(surroundings()).generator("order") for _ in range(2))
    assert torch.equal(torch.rand(4, generator=first), torch.rand(4, generator=second))


def test_a_checkpoint_is_written_after_the_trace_it_depends_on(tmp_path: Path) -> None:
    stored: list[dict[str, str]] = []
    reader = context(surroundings(), workspace=tmp_path, on_checkpoint=lambda trace: stored.append(dict(trace.reads)))
    _ = reader.task
    slot = reader.slot()
    assert slot.load() is None
    slot.save({"step": 3, "weights": torch.ones(2)})
    assert list(stored[0]) == ["task"]
    loaded = context(surroundings(), workspace=tmp_path).slot().load()
    assert loaded is not None
    assert loaded["step"] == 3
    assert context(surroundings(), workspace=tmp_path).slot("other").load() is None


def test_calibration_gives_about_as_many_samples_as_asked() -> None:
    drawn = [args[0] for args, _ in context(surroundings()).calibration(samples=5, batch_size=2)]
    assert sum(len(part) for part in drawn) == 6


def test_a_model_without_choices_is_no_space() -> None:
    reader = context(replace(surroundings(), load_space=lambda: DesignedSpace(torch.nn.Linear(2, 2))))
    with pytest.raises(StageError, match=r"stage 'cut' searches a space .* nothing to choose") as problem:
        reader.space()
    assert "nas/elastic" in str(problem.value)
