"""Teachers at work: no gradient, no change, and answers kept that never change a result."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mil_cli.data.base import Data
from mil_cli.data.digits import digits
from mil_cli.errors import StageError
from mil_cli.graph.model import Model
from mil_cli.stages.distill.soft_labels import SoftLabelsConfig, soft_label_objective, soft_labels
from mil_cli.stages.distill.teacher import Memory, Teacher, answers_by_sample, views_repeat
from mil_cli.task.classification import Classification
from mil_cli.training.config import TrainerConfig
from tests.stages.contexts import Notices, make_context, run_through_kills, running, trained_digits
from tests.stages.distill.lessons import lesson_of


@pytest.fixture(scope="module")
def data() -> Data:
    return digits(crop_padding=0)


@cache
def _captured() -> Model:
    torch.manual_seed(3)
    return Model.capture(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), _images())


def _student() -> Model:
    torch.manual_seed(3)
    return _captured().clone()


def _images(samples: int = 4) -> tuple[Tensor]:
    return (torch.rand(samples, 1, 8, 8, generator=torch.Generator().manual_seed(samples)),)


def test_no_gradient_reaches_the_teacher_and_it_stays_in_evaluation(data: Data) -> None:
    teacher, learner = trained_digits(), _student().train()
    before = teacher.fingerprint()
    lesson = lesson_of(teacher)
    objective = soft_label_objective(lesson, SoftLabelsConfig())
    batch: Any = next(iter(data.train.batches(20)))
    objective(learner(batch[0]), batch).backward()  # type: ignore[no-untyped-call]
    assert not lesson.teacher(batch).requires_grad
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in learner.parameters())
    assert teacher.fingerprint() == before


def test_a_teacher_gives_values_inside_it() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)).eval()
    model = Model.capture(net, (torch.randn(4, 5),))
    teacher = Teacher(model, Classification(), running(model), taps=["2"])
    x = torch.randn(6, 5)
    outputs, values = teacher.study((x, torch.zeros(6)))
    torch.testing.assert_close(outputs, net(x))
    torch.testing.assert_close(values["2"], net[:3](x))
    assert not values["2"].requires_grad


class _Counted:
    """Answers with two tensors, and counts the samples that it was asked for."""

    def __init__(self) -> None:
        self.samples = 0

    def __call__(self, args: tuple[Any, ...], kwargs: Any) -> Any:
        (x,) = args
        self.samples += len(x)
        return {"logits": x.flatten(1).double() * 3, "sign": x.flatten(1)[:, 0] > 0.5}


def test_answers_are_kept_by_content_to_the_bit(tmp_path: Path) -> None:
    compute, memory = _Counted(), Memory(tmp_path, limit=1_000_000)
    x = _images(9)[0]
    expected = compute((x,), {})
    compute.samples = 0
    for order in (torch.arange(9), torch.tensor([4, 0, 8, 2])):
        answer = memory.answer((x[order],), {}, compute)
        assert torch.equal(answer["logits"], expected["logits"][order])
        assert torch.equal(answer["sign"], expected["sign"][order])
    assert compute.samples == 9
    changed = x.clone()
    changed[2] += 1e-6
    assert torch.equal(memory.answer((changed,), {}, compute)["logits"], compute((changed,), {})["logits"])


def test_kept_answers_stay_below_their_bound(tmp_path: Path) -> None:
    row = 64 * 8 + 1
    compute, memory = _Counted(), Memory(tmp_path, limit=5 * row)
    x = _images(9)[0]
    for _ in range(2):
        assert torch.equal(memory.answer((x,), {}, compute)["logits"], compute((x,), {})["logits"])
    assert (tmp_path / "answers.bin").stat().st_size <= 5 * row
    compute.samples = 0
    memory.answer((x[:5],), {}, compute)
    assert compute.samples == 0
    memory.answer((x[4:],), {}, compute)
    assert compute.samples == 5


def test_outputs_that_are_no_rows_of_samples_are_not_kept(tmp_path: Path) -> None:
    memory = Memory(tmp_path, limit=1000)
    x = _images(4)[0]
    for value in (1.0, 2.0):
        mean = memory.answer((x,), {}, lambda args, kwargs, value=value: args[0].mean() * value)
        assert float(mean) == pytest.approx(float(x.mean()) * value)


@pytest.mark.parametrize("problem", [TypeError, ValueError, IndexError, RuntimeError, KeyError])
def test_whatever_a_teacher_stumbles_over_is_told(problem: type[Exception]) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise problem("of another kind")

    teacher = Teacher(_student(), Classification(), running(_student(), forward=fail), where="stages.a.teacher")
    with pytest.raises(StageError, match="of another kind") as caught:
        teacher((_images()[0], torch.zeros(4)))
    assert caught.value.where == "stages.a.teacher"


def test_a_full_gpu_is_not_taken_for_a_wrong_teacher() -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        Teacher(_student(), Classification(), running(_student(), forward=fail))((_images()[0], torch.zeros(4)))


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.int64, torch.float64, torch.complex64])
def test_any_dtype_is_kept_beside_any_other(dtype: torch.dtype, samples: int, tmp_path: Path) -> None:
    def compute(args: tuple[Tensor], kwargs: Any) -> list[Tensor]:
        (x,) = args
        calls.append(len(x))
        return [x.real.float() > 0, x.real.float().double().exp(), x[:, 0], x[:, :0]]

    x = torch.arange(3 * samples).view(samples, 3).to(dtype)
    calls: list[int] = []
    memory = Memory(tmp_path, limit=1_000_000)
    first, second = (memory.answer((x,), {}, compute) for _ in range(2))
    assert calls == [samples]
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(first, second, strict=True))


def test_dtypes_and_shapes_tell_samples_apart(tmp_path: Path) -> None:
    memory = Memory(tmp_path, limit=1_000_000)
    zeros = [torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, 2, 2), torch.zeros(2, 2).double()]
    for number, x in enumerate(zeros):
        answer = memory.answer((x,), {}, lambda args, kwargs, number=number: torch.full((2, 1), float(number)))
        assert answer.tolist() == [[number]] * 2


def test_what_is_not_laid_out_in_rows_is_computed(tmp_path: Path) -> None:
    memory, x = Memory(tmp_path, limit=1_000_000), torch.eye(3)
    for value in (1.0, 2.0):
        by_sparse = memory.answer((x.to_sparse(),), {}, lambda args, kwargs, value=value: torch.full((3, 1), value))
        assert by_sparse.tolist() == [[value]] * 3
        sparse = memory.answer((x,), {}, lambda args, kwargs, value=value: (args[0] * value).to_sparse())
        assert torch.equal(sparse.to_dense(), x * value)
    assert float(memory.answer((torch.tensor(2.0),), {}, lambda args, kwargs: args[0] + 1)) == 3
    assert memory.answer((x[:0],), {}, lambda args, kwargs: args[0] + 1).shape == (0, 3)


@pytest.mark.parametrize("failing", ["write", "read", "space"])
def test_a_full_disk_ends_the_keeping_and_not_the_run(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, compute = Notices(), _Counted()
    memory = Memory(tmp_path, limit=1_000_000, progress=told)
    x = _images(9)[0]
    expected = compute((x,), {})["logits"]
    compute.samples = 0
    if failing == "space":
        full = SimpleNamespace(free=500_000_000)
        monkeypatch.setattr("mil_cli.stages.distill.teacher.shutil.disk_usage", lambda folder: full)
    elif failing == "write":
        (tmp_path / "answers.bin").symlink_to("/dev/full")  # every write there fails as on a full disk
    for _ in range(3):
        assert torch.equal(memory.answer((x,), {}, compute)["logits"], expected)
        if failing == "read":
            (tmp_path / "answers.bin").unlink(missing_ok=True)
    assert compute.samples == 27
    assert [text.startswith("teacher outputs are no longer kept") for text in told.told] == [True] * (
        failing != "space"
    )
    assert not (tmp_path / "answers.bin").exists()


def test_answers_are_kept_only_where_samples_come_first(data: Data) -> None:
    class Joint(nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            return x * scale, x.sum()

    assert answers_by_sample(_student())
    assert not answers_by_sample(Model.capture(Joint(), (torch.rand(4, 3), torch.rand(3))))
    assert not answers_by_sample(Model.capture(nn.GRU(3, 2), (torch.rand(5, 4, 3),)))


class _Augmented:
    """A split whose views depend on the epoch."""

    def __init__(self, split: Any) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def batches(self, batch_size: int, **options: Any) -> Any:
        for image, label in self._split.batches(batch_size, **options):
            yield image + options.get("augment", False) * options.get("epoch", 0) * 0.01, label


def test_views_are_compared_over_epochs(data: Data) -> None:
    assert views_repeat(data, Classification(), seed=0)
    changing = Data(name="changing", train=_Augmented(data.train), val=data.val, test=data.test)  # type: ignore[arg-type]
    assert not views_repeat(changing, Classification(), seed=0)


def test_keeping_answers_changes_no_weight(data: Data, tmp_path: Path) -> None:
    results = []
    for cache_gb in (0.0, 2.0):
        settings = TrainerConfig(epochs=3, batch_size=64, learning_rate=0.05)
        context = make_context(data, original=trained_digits(), trainer=settings, workspace=tmp_path / str(cache_gb))
        results.append(soft_labels(_student(), SoftLabelsConfig(cache_gb=cache_gb), context).fingerprint())
        assert context.notes["teacher_outputs_kept"] == (cache_gb > 0)
        assert not list(tmp_path.rglob("answers.bin"))
    assert results[0] == results[1]


def test_a_killed_distillation_with_kept_answers_ends_alike(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TrainerConfig(epochs=3, batch_size=64, learning_rate=0.05, checkpoint_every_seconds=0)

    def run(workspace: Path) -> Model:
        context = make_context(data, original=trained_digits(), trainer=settings, workspace=workspace)
        return soft_labels(_student(), SoftLabelsConfig(beside_plain=True), context)

    whole = run(tmp_path / "whole")
    killed = run_through_kills(lambda: run(tmp_path / "killed"), monkeypatch, saves={5, 30, 70})
    assert killed.fingerprint() == whole.fingerprint()
