"""Which files a user's module depends on: imports of every form, followed through others, nothing run."""

from __future__ import annotations

from pathlib import Path

from mil_cli.models.imports import local_sources


def test_imports_of_every_form_are_followed(tmp_path: Path) -> None:
    files = {
        "task.py": "import os, first\nfrom pack import inner\n\ndef late():\n    from lazy import thing\n",
        "first.py": "from second import x\nraise SystemExit('never run')\n",
        "second.py": "import first\n",
        "lazy.py": "thing = 1\n",
        "pack/__init__.py": "",
        "pack/inner.py": "from . import sibling\nfrom .deep.leaf import y\n",
        "pack/sibling.py": "",
        "pack/deep/__init__.py": "",
        "pack/deep/leaf.py": "y = 1\n",
        "unused.py": "",
        "broken.py": "def (",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = {path.relative_to(tmp_path).as_posix() for path in local_sources(tmp_path / "task.py", root=tmp_path)}
    assert found == set(files) - {"unused.py", "broken.py"}
    assert local_sources(tmp_path / "broken.py", root=tmp_path) == [tmp_path / "broken.py"]
