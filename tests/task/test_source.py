"""A user's own task, and every shipped task config."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional

from mil_cli.errors import TaskError
from mil_cli.task.base import Task
from mil_cli.task.source import build_task

CONFIGS = Path(__file__).parents[2] / "configs" / "task"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_build(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    config = {key: 3 if value == "???" else value for key, value in yaml.safe_load(text).items()}
    task = build_task(config, tmp_path)
    assert isinstance(task, Task)
    assert task.name == path.stem


def test_a_loss_is_enough(tmp_path: Path) -> None:
    (tmp_path / "own_loss_task.py").write_text(
        "class Mine:\n"
        "    def __init__(self, scale=1.0):\n        self.scale = scale\n"
        "    def loss(self, outputs, batch):\n"
        "        return self.scale * (outputs - batch['target']).abs().mean()\n"
    )
    task = build_task({"_target_": "own_loss_task.Mine", "scale": 2.0}, tmp_path)
    assert isinstance(task, Task)
    assert (task.name, task.metric_name, task.higher_is_better) == ("Mine", "loss", False)
    metric = task.metric()
    for size, value in ((3, 1.0), (1, 5.0)):
        batch = {"x": torch.zeros(size, 2), "target": torch.zeros(size)}
        assert set(task.inputs(batch)[1]) == {"x"}
        task.update(metric, torch.full((size,), value), batch)
    assert float(metric.compute()) == pytest.approx(2 * (3 * 1 + 5) / 4)  # weighted by samples
    a, b = torch.randn(4, 2), torch.randn(4, 2)
    torch.testing.assert_close(task.distance(a, b, {}, temperature=1.0), functional.mse_loss(a, b))
    other = build_task({"_target_": "own_loss_task.Mine", "scale": 3.0}, tmp_path)
    assert task.fingerprint() != other.fingerprint()


def test_score_inputs_and_distance_are_used(tmp_path: Path) -> None:
    (tmp_path / "own_score_task.py").write_text(
        "import torch\n"
        "class Mine:\n"
        "    metric_name = 'hits'\n"
        "    def inputs(self, batch):\n        return batch[1]\n"
        "    def loss(self, outputs, batch):\n        return outputs.sum()\n"
        "    def score(self, outputs, batch):\n        return (outputs > 0).float().mean()\n"
        "    def distance(self, student, teacher, batch, *, temperature):\n        return temperature * student.sum()\n"
    )
    task = build_task({"_target_": "own_score_task.Mine"}, tmp_path)
    batch = (torch.zeros(2), torch.ones(2))
    assert task.inputs(batch)[0][0] is batch[1]
    assert task.higher_is_better
    metric = task.metric()
    task.update(metric, torch.tensor([1.0, -1.0]), batch)
    assert float(metric.compute()) == 0.5
    assert float(task.distance(torch.ones(3), torch.ones(3), batch, temperature=2.0)) == 6.0


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("class Mine:\n    pass\n", "Mine", "needs a method loss"),
        ("class Mine:\n    def loss(self, o, b): return o\n    def metric(self): return None\n", "Mine", "together"),
        ("class Mine:\n    def loss(self, o, b): return o\n", "Mime", "did you mean 'Mine'"),
        ("class Mine:\n    def __init__(self): raise ValueError('no')\n", "Mine", "ValueError: no"),
        ("import nothing_like_this\n", "Mine", "pip install nothing_like_this"),
        ("def broken(:\n", "Mine", "SyntaxError"),
    ],
)
def test_mistakes_are_told(source: str, target: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "own_bad_task.py").write_text(source)
    with pytest.raises(TaskError, match=words):
        build_task({"_target_": f"own_bad_task.{target}"}, tmp_path)


def test_what_fails_in_a_users_method_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "own_failing_task.py").write_text(
        "import torch\n"
        "class Mine:\n"
        "    def loss(self, outputs, batch):\n        return torch.nn.functional.mse_loss(outputs, batch['labels'])\n"
        "    def score(self, outputs, batch):\n        return torch.zeros(3)\n"
    )
    task = build_task({"_target_": "own_failing_task.Mine"}, tmp_path)
    batch = {"x": torch.zeros(2, 3)}
    with pytest.raises(TaskError, match=r"task\.loss: loss failed: KeyError.*\n.*own_failing_task\.py:4"):
        task.loss(torch.zeros(2), batch)
    with pytest.raises(TaskError, match="one for each of the 2 samples"):
        task.update(task.metric(), torch.zeros(2), batch)


def test_a_loss_that_is_no_scalar_is_told(tmp_path: Path) -> None:
    (tmp_path / "own_vector_task.py").write_text("class Mine:\n    def loss(self, o, b): return o\n")
    task = build_task({"_target_": "own_vector_task.Mine"}, tmp_path)
    with pytest.raises(TaskError, match="scalar"):
        task.loss(torch.zeros(3), ())


@pytest.mark.parametrize("given", ["o", "(o, b[1].reshape(1, 1, -1))", "(o.flatten(), b[1])", "[o.argmax(1), b[1]]"])
def test_class_scores_of_another_form_are_told(given: str, tmp_path: Path) -> None:
    source = f"class Mine:\n    def loss(self, o, b): return o\n    def class_scores(self, o, b): return {given}\n"
    module = f"own_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(source)
    task = build_task({"_target_": f"{module}.Mine"}, tmp_path)
    with pytest.raises(TaskError, match=r"scores \(positions, classes\)"):
        task.class_scores(torch.randn(4, 3), (None, torch.zeros(4)))
