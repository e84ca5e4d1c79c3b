"""Which entries of a batch become inputs and target."""

from __future__ import annotations

import pytest
import torch

from mil_cli.data.base import Batch
from mil_cli.errors import TaskError
from mil_cli.task.classification import Classification
from mil_cli.task.fields import Entry, output_tensor

A, B, Y = torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([0, 1])


def test_of_a_tuple_the_last_is_the_target() -> None:
    args, kwargs = Classification().inputs((A, B, Y))
    assert args[0] is A
    assert args[1] is B
    assert len(args) == 2
    assert kwargs == {}


@pytest.mark.parametrize("key", ["labels", "label", "target", "targets", "y"])
def test_of_a_dict_the_usual_key_is_the_target(key: str) -> None:
    args, kwargs = Classification().inputs({key: Y, "input_ids": A, "attention_mask": B})
    assert args == ()
    assert set(kwargs) == {"input_ids", "attention_mask"}
    assert kwargs["input_ids"] is A


def test_entries_can_be_chosen() -> None:
    batch = (Y, A, B)
    args, _ = Classification(target_key=0, input_keys=[2]).inputs(batch)
    assert args[0] is B
    assert len(args) == 1
    args, _ = Classification(target_key=0).inputs(batch)
    assert [id(value) for value in args] == [id(A), id(B)]
    _, kwargs = Classification(target_key="t", input_keys={"x": "image"}).inputs({"image": A, "t": Y, "id": B})
    assert set(kwargs) == {"x"}
    assert kwargs["x"] is A


@pytest.mark.parametrize(
    ("task", "batch", "words"),
    [
        (Classification(), {"image": A, "klass": Y}, "target_key"),
        (Classification(input_keys=["imag"]), {"image": A, "y": Y}, "did you mean 'image'"),
        (Classification(input_keys=[5]), (A, Y), "has none at that position"),
    ],
)
def test_what_is_not_there_is_told(task: Classification, batch: object, words: str) -> None:
    with pytest.raises(TaskError, match=words):
        task.inputs(batch)  # type: ignore[arg-type]


@pytest.mark.parametrize(("batch", "chosen"), [((B, A, Y), 1), ({"other": B, "image": A, "labels": Y}, "image")])
def test_one_entry_needs_no_list(batch: Batch, chosen: Entry) -> None:
    args, kwargs = Classification(input_keys=chosen).inputs(batch)
    (only,) = [*args, *kwargs.values()]
    assert only is A


@pytest.mark.parametrize("labels", [[0, 1], ["cat", "dog"]])
def test_a_target_that_is_no_tensor_is_told(labels: list[object]) -> None:
    with pytest.raises(TaskError, match=r"task\.target_key: the entry 'labels' of the batch is no tensor"):
        Classification().loss(torch.zeros(2, 2), {"image": A, "labels": labels})


def test_the_scored_output() -> None:
    assert output_tensor(A, None) is A
    assert output_tensor((A, B), None) is A
    assert output_tensor((A, B), 1) is B
    assert output_tensor({"hidden": A, "logits": B}, None) is B
    assert output_tensor({"anything": A}, None) is A
    with pytest.raises(TaskError, match="no such entry"):
        output_tensor({"a": A}, "b")
