"""Composition: search path, overrides, interpolation, sweeps, awkward paths, and what cannot be composed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mil_cli.errors import RecipeError, RecipeErrors
from mil_cli.recipe.compose import check_path, compose, dotted_keys, sweep, sweep_points

Write = Callable[..., Path]

PLAIN = """\
a: 1
b: {c: two, d: '${a}'}
e: [1, '${b.c}']
"""


def test_plain_file_without_any_group(write: Write) -> None:
    assert compose(write(text=PLAIN)) == {"a": 1, "b": {"c": "two", "d": 1}, "e": [1, "two"]}


def test_overrides_replace_add_and_delete(write: Write) -> None:
    assert compose(write(text=PLAIN), ["a=5", "+b.new=[1,2]", "~e"]) == {
        "a": 5,
        "b": {"c": "two", "d": 5, "new": [1, 2]},
    }


def test_a_dotted_key_that_the_recipe_leaves_out_needs_no_plus(write: Write) -> None:
    assert compose(write(text=PLAIN), ["b.new.deep=3", "f.g=[1,2]"])["b"]["new"] == {"deep": 3}
    points = sweep_points(write(text=PLAIN), ["b.new=1,2"])
    assert points is not None
    assert [(point.overrides, point.content["b"]["new"]) for point in points] == [(("b.new=1",), 1), (("b.new=2",), 2)]


def test_own_groups_beside_the_recipe_win_over_the_shipped(write: Write) -> None:
    write(text="_target_: mine.build\n", name="model/convnet.yaml")
    content = compose(write(text="defaults:\n  - /model: convnet\n  - /task: classification\n  - _self_\n"))
    assert content["model"] == {"_target_": "mine.build"}
    assert content["task"]["_target_"].startswith("mil_cli.")


def test_searchpath_in_the_recipe(write: Write, tmp_path: Path) -> None:
    write(text="answer: 42\n", name="elsewhere/extra/deep.yaml")
    text = f"hydra: {{searchpath: ['file://{tmp_path}/elsewhere']}}\ndefaults:\n  - /extra: deep\n  - _self_\n"
    assert compose(write(text=text, name="here/recipe.yaml")) == {"extra": {"answer": 42}}


def test_shipped_groups_follow_an_installed_wheel_too(write: Write) -> None:
    content = compose(write())
    assert content["stages"]["quantize"]["family"] == "quantize"
    assert content["stages"]["prune"]["macs"] == 0.5


@pytest.mark.parametrize("folder", ["with space", "comma,and[bracket]", "quote'd", "unicode-é", "equals=x"])
def test_awkward_folders(write: Write, folder: str) -> None:
    assert compose(write(text=PLAIN, name=f"{folder}/recipe.yaml"))["a"] == 1


def test_relative_path_from_another_folder(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(text=PLAIN, name="deep/recipe.yaml")
    monkeypatch.chdir(path.parent.parent)
    assert compose(Path("deep/recipe.yaml"))["a"] == 1


def test_no_state_is_left(write: Write) -> None:
    compose(write(text=PLAIN))
    assert not GlobalHydra.instance().is_initialized()
    assert HydraConfig.instance().cfg is None


def test_all_missing_values_and_interpolations_at_once(write: Write) -> None:
    with pytest.raises(RecipeErrors) as caught:
        compose(write(text="a: ???\nb: {c: '${nowhere}'}\nd: [1, '${gone.away}']\n"))
    assert [problem.where for problem in caught.value.problems] == ["a", "b.c", "d[1]"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["a=1,2"], "add -m"),
        (["bb=1"], "did you mean 'b'?"),
        (["hydra.sweepr.x=1"], "no such key"),
        (["~zzz"], "no such key to delete"),
        (["a=[1"], "cannot be read"),
        (["model=convnet"], "does not choose this group"),
    ],
)
def test_bad_overrides_say_what_to_type(write: Write, overrides: list[str], expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        compose(write(text=PLAIN), overrides)
    assert expected in str(caught.value)


@pytest.mark.parametrize("override", ["device=5", "data=null", "=5"])
def test_an_option_of_a_group_that_is_no_name(write: Write, override: str) -> None:
    with pytest.raises(RecipeError, match="an option of a group is a name") as caught:
        compose(write(), [override])
    assert override in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1\n", "not valid YAML"),
        ("a: 1\n\tb: 2\n", "recipe.yaml:2"),
        ("defaults: [/model: resnt20]\n", "did you mean 'resnet20'?"),
        ("defaults: [/modle: resnet20]\n", "did you mean 'model'?"),
        ("defaults: [recipe]\n", "includes itself"),
        ("defaults: [other]\n", "other.yaml beside the recipe"),
        ("- 1\n- 2\n", "recipe"),
    ],
)
def test_bad_files_say_what_is_wrong(write: Write, text: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        compose(write(text=text))
    assert expected in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"a: \xff\xfe\x00")
    with pytest.raises(RecipeError):
        compose(path)


def test_check_path_names_the_way_out(write: Write, tmp_path: Path) -> None:
    write(text=PLAIN, name="odd/recipe.yml")
    write(text=PLAIN, name="${x}/recipe.yaml")
    for path, expected in [
        (tmp_path / "odd/recipe.yml", "recipe.yaml"),
        (tmp_path / "odd/recipe.yaml", "did you mean 'recipe.yml'?"),
        (tmp_path / "odd", "folder"),
        (tmp_path / "${x}/recipe.yaml", "${"),
    ]:
        with pytest.raises(RecipeError) as caught:
            check_path(path)
        assert expected in str(caught.value)


def test_points_are_the_product_of_the_axes_in_order(write: Write) -> None:
    points = sweep_points(write(text=PLAIN), ["a=1,2", "b.c=x,y"])
    assert points is not None
    assert [(point.number, point.content["a"], point.content["b"]["c"]) for point in points] == [
        (0, 1, "x"),
        (1, 1, "y"),
        (2, 2, "x"),
        (3, 2, "y"),
    ]
    assert points[3].overrides == ("a=2", "b.c=y")


def test_points_of_a_recipe_that_says_what_to_sweep(write: Write) -> None:
    path = write(text=PLAIN + "hydra: {sweeper: {params: {a: '7,8'}}}\n")
    points = sweep_points(path, [])
    assert points is not None
    assert [point.content["a"] for point in points] == [7, 8]
    assert compose(path)["a"] == 1


def test_sweep_over_orders_of_a_list(write: Write) -> None:
    points = sweep_points(write(text=PLAIN), ["e=[1,2],[2,1]"])
    assert points is not None
    assert [point.content["e"] for point in points] == [[1, 2], [2, 1]]


def test_a_bad_point_stops_the_sweep_before_any_runs(write: Write) -> None:
    with pytest.raises(RecipeError):
        sweep_points(write(text=PLAIN), ["a=1,2", "nothing=3,4"])


class Record:
    """Writes what a point got into its folder."""

    def __call__(self, config: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        overrides = list(HydraConfig.get().overrides.task)
        (folder / "seen.json").write_text(json.dumps({"a": config.a, "overrides": overrides, "keys": list(config)}))


@pytest.mark.parametrize("folder", ["out", "out [a],b'c d"])
def test_every_point_runs_in_its_own_folder(write: Write, tmp_path: Path, folder: str) -> None:
    sweep(write(text=PLAIN), ["a=3,4"], Record(), directory=tmp_path / folder)
    seen = [json.loads((tmp_path / folder / str(number) / "seen.json").read_text()) for number in range(2)]
    assert [point["a"] for point in seen] == [3, 4]
    assert [point["overrides"] for point in seen] == [["a=3"], ["a=4"]]
    assert "hydra" not in seen[0]["keys"]


def test_sweep_keeps_the_callers_log_handlers(write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    before = list(logging.getLogger().handlers)
    sweep(write(text=PLAIN), ["a=3,4"], Record(), directory=tmp_path / "out")
    assert logging.getLogger().handlers == before
    assert not (tmp_path / "out" / "0" / ".hydra").exists()


def test_dotted_keys_lists_parents_before_children() -> None:
    assert dotted_keys({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == ["a", "a.b", "a.c", "a.c.d", "e"]


def test_a_value_on_the_command_line_replaces_the_axis_of_the_recipe(write: Write) -> None:
    axes = "\nhydra: {sweeper: {params: {b.c: '1,2,3', a: '1,2'}}}\n"
    path = write(text=PLAIN + axes)
    points = sweep_points(path, ["b.c=7,8", "a=5"])
    assert points is not None
    assert [(point.content["b"]["c"], point.content["a"]) for point in points] == [(7, 5), (8, 5)]
    assert len(sweep_points(path, []) or []) == 6
