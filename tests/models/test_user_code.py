"""User code beside a recipe: found, kept apart, read anew when it changes, fingerprinted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mil_cli.errors import ModelError
from mil_cli.models.user_code import call_target, importable, user_code_fingerprint, user_modules


@pytest.fixture(autouse=True)
def _clean_modules() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def _call(root: Path, target: str) -> object:
    return call_target({"_target_": target}, root=root, where="model", error=ModelError)


def _write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_path_is_undone_and_nothing_is_written(tmp_path: Path) -> None:
    _write(tmp_path, "uc_plain.py", "import sys\ndef f():\n    return 1\n")
    path, flag = list(sys.path), sys.dont_write_bytecode
    assert _call(tmp_path, "uc_plain.f") == 1
    assert sys.path == path
    assert sys.dont_write_bytecode is flag
    assert [p.name for p in tmp_path.iterdir()] == ["uc_plain.py"]
    with pytest.raises(ModelError):
        _call(tmp_path, "uc_plain.g")
    assert sys.path == path


def test_two_recipes_may_use_the_same_module_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        _write(tmp_path / name, "uc_same.py", f"from uc_helper import value\ndef f():\n    return value + '{name}'\n")
        _write(tmp_path / name, "uc_helper.py", f"value = '{name}-'\n")
    assert _call(tmp_path / "one", "uc_same.f") == "one-one"
    assert _call(tmp_path / "two", "uc_same.f") == "two-two"
    assert _call(tmp_path / "one", "uc_same.f") == "one-one"


def test_two_recipes_may_use_the_same_folder_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        _write(tmp_path / name, "uc_folder/part.py", f"value = '{name}'\n")
        _write(tmp_path / name, "uc_main.py", "import uc_folder.part\ndef f():\n    return uc_folder.part.value\n")
    assert [_call(tmp_path / name, "uc_main.f") for name in ("one", "two", "one")] == ["one", "two", "one"]


def test_a_module_in_the_way_steps_aside(tmp_path: Path) -> None:
    _write(tmp_path / "elsewhere", "uc_way.py", "value = 'elsewhere'\n")
    _write(tmp_path / "recipe", "uc_way.py", "def f():\n    return 'recipe'\n")
    with importable(tmp_path / "elsewhere"):
        foreign = __import__("uc_way")
    assert _call(tmp_path / "recipe", "uc_way.f") == "recipe"
    assert foreign.value == "elsewhere"
    assert list(user_modules(tmp_path / "recipe")) == ["uc_way"]
    assert user_modules(tmp_path / "elsewhere") == {}


def test_a_change_is_read_and_an_unchanged_module_is_kept(tmp_path: Path) -> None:
    _write(tmp_path, "uc_edit.py", "from uc_part import value\nmarker = object()\ndef f():\n    return value, marker\n")
    _write(tmp_path, "uc_part.py", "value = 1\n")
    first = _call(tmp_path, "uc_edit.f")
    assert _call(tmp_path, "uc_edit.f") == first
    _write(tmp_path, "uc_part.py", "value = 2\n")
    value, marker = _call(tmp_path, "uc_edit.f")  # type: ignore[misc]
    assert value == 2
    assert marker is not first[1]  # type: ignore[index]


def test_the_fingerprint_covers_what_was_imported_and_nothing_else(tmp_path: Path) -> None:
    _write(tmp_path, "uc_main.py", "import uc_pack.inner\ndef f():\n    return 0\n")
    _write(tmp_path, "uc_pack/__init__.py", "")
    _write(tmp_path, "uc_pack/inner.py", "x = 1\n")
    _write(tmp_path, "uc_unused.py", "x = 1\n")
    _call(tmp_path, "uc_main.f")
    assert set(user_modules(tmp_path)) == {"uc_main", "uc_pack", "uc_pack.inner"}
    before = user_code_fingerprint(tmp_path)
    _write(tmp_path, "uc_unused.py", "x = 2\n")
    assert user_code_fingerprint(tmp_path) == before
    _write(tmp_path, "uc_pack/inner.py", "x = 2\n")
    assert user_code_fingerprint(tmp_path) != before
    moved = tmp_path / "moved"
    _write(moved, "uc_main.py", "import uc_pack.inner\ndef f():\n    return 0\n")
    _write(moved, "uc_pack/__init__.py", "")
    _write(moved, "uc_pack/inner.py", "x = 1\n")
    _call(moved, "uc_main.f")
    assert user_code_fingerprint(moved) == before


def test_installed_packages_inside_the_folder_do_not_count(tmp_path: Path) -> None:
    site = tmp_path / ".venv" / "lib" / "site-packages"
    _write(site, "uc_installed.py", "x = 1\n")
    with importable(site):
        __import__("uc_installed")
    assert user_modules(tmp_path) == {}
    assert not [name for name in user_modules(Path(__file__).parents[2]) if name.startswith("mil_cli")]


@pytest.mark.parametrize(
    ("text", "words", "line"),
    [
        ("def f():\n    raise RuntimeError('oh')\n", "RuntimeError: oh", ":2"),
        ("import json\njson.loads('{')\n", "JSONDecodeError", None),
        ("x = (\n", "SyntaxError", ":1"),
        ("import uc_absent_thing\n", "needs the module 'uc_absent_thing'", None),
        ("import sys\nsys.exit(2)\n", "SystemExit: 2", ":2"),
        ("def f():\n    raise SystemExit('oh')\n", "SystemExit: oh", ":2"),
    ],
)
def test_failures_name_the_users_line(text: str, words: str, line: str | None, tmp_path: Path) -> None:
    _write(tmp_path, "uc_fails.py", text)
    with pytest.raises(ModelError, match=words) as caught:
        _call(tmp_path, "uc_fails.f")
    if line is not None:
        assert f"uc_fails.py{line}" in str(caught.value)
