"""The stage cache: content keys, traces, corruption, atomicity, clearing."""

from __future__ import annotations

import errno
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mil_cli.errors import OutputError
from mil_cli.run.cache import Cache


class Recorder:
    """A progress sink that remembers notices."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    def work(self, description: str, total: int | None = None, *, done: int = 0) -> Any:
        raise AssertionError("the cache does no long work")

    def notice(self, text: str) -> None:
        self.notices.append(text)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def cache(tmp_path: Path, recorder: Recorder) -> Cache:
    return Cache(tmp_path / "cache", recorder)


def store(cache: Cache, key: str, text: str, trace: dict[str, str]) -> Path:
    with cache.computing(key, "label") as workspace:
        (workspace.result / "data.txt").write_text(text)
        return cache.store(key, workspace, kind="stage", label="label", trace=trace, facts={"text": text}).folder


def test_an_entry_is_found_only_while_its_trace_is_valid(cache: Cache) -> None:
    store(cache, "k", "a", {"device/multiple": "8"})
    store(cache, "k", "b", {"device/multiple": "16"})
    for multiple, text in (("8", "a"), ("16", "b")):
        entry = cache.find("k", lambda reads, multiple=multiple: reads == {"device/multiple": multiple})
        assert entry is not None
        assert entry.facts["text"] == text
        assert (entry.folder / "data.txt").read_text() == text
    assert cache.find("k", lambda reads: False) is None
    assert cache.find("other", lambda reads: True) is None


def test_nothing_temporary_stays_behind(cache: Cache) -> None:
    store(cache, "k", "a", {})
    assert [path.name for path in cache.location.iterdir() if path.name != "work"] == ["entries"]
    assert list((cache.location / "work").iterdir()) == []


@pytest.mark.parametrize("damage", ["content", "record", "missing"])
def test_a_damaged_entry_is_a_miss_with_a_notice(cache: Cache, recorder: Recorder, damage: str) -> None:
    folder = store(cache, "k", "a", {})
    match damage:
        case "content":
            (folder / "data.txt").write_text("b")
        case "record":
            (folder / "entry.json").write_text('{"format": 1, "tra')
        case "missing":
            (folder / "data.txt").unlink()
    assert cache.find("k", lambda reads: True) is None
    assert "damaged" in recorder.notices[0]
    store(cache, "k", "a", {})
    assert cache.find("k", lambda reads: True) is not None


def test_a_failed_computation_keeps_its_checkpoints_and_stores_nothing(cache: Cache) -> None:
    with suppress(RuntimeError), cache.computing("k", "label") as workspace:
        (workspace.folder / "checkpoints").mkdir()
        workspace.remember({"seed": "1"}, 2.5)
        (workspace.result / "half.txt").write_text("half")
        raise RuntimeError("boom")
    assert cache.find("k", lambda reads: True) is None
    with cache.computing("k", "label") as workspace:
        assert workspace.remembered() == ({"seed": "1"}, 2.5)
        assert (workspace.folder / "checkpoints").is_dir()
        assert list(workspace.result.iterdir()) == []
        workspace.forget_checkpoints()
        assert workspace.remembered() is None
        assert not (workspace.folder / "checkpoints").exists()


def test_memo_computes_once_and_again_when_fresh(cache: Cache) -> None:
    calls: list[int] = []

    def compute(folder: Path) -> dict[str, Any]:
        calls.append(1)
        (folder / "n.txt").write_text(str(len(calls)))
        return {"n": len(calls)}

    facts = [
        cache.memo("k", kind="export", label="x", fresh=fresh, compute=compute)[0].facts["n"]
        for fresh in (False, False, True, False)
    ]
    assert facts == [1, 1, 2, 2]


def test_one_measures_at_a_time_and_nothing_stays(cache: Cache) -> None:
    inside: list[int] = []
    most: list[int] = []

    def measure() -> None:
        with cache.measuring():
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    threads = [threading.Thread(target=measure) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]
    assert list((cache.location / "work").iterdir()) == []


def test_listing_and_clearing(cache: Cache) -> None:
    store(cache, "k1", "abc", {})
    store(cache, "k2", "abc", {})
    with pytest.raises(RuntimeError), cache.computing("k3", "label"):
        raise RuntimeError
    assert sorted(listed.kind for listed in cache.entries()) == ["stage", "stage", "unfinished"]
    assert cache.clear(older_than_seconds=3600) == (0, 0)
    with cache.computing("k4", "label"):  # being computed now: not to be removed
        count, size = cache.clear()
    assert count == 3
    assert size > 0
    assert cache.find("k1", lambda reads: True) is None


def test_what_other_processes_of_a_run_stored_is_listed_and_cleared(cache: Cache, recorder: Recorder) -> None:
    store(Cache(cache.location / "processes" / "1-of-2", recorder), "k", "abc", {})
    assert [listed.kind for listed in cache.entries()] == ["stage"]
    assert cache.clear()[0] == 1
    assert cache.entries() == []


def test_files_that_a_living_run_removes_do_not_disturb_the_listing(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(cache, "k", "abc", {})
    real = Path.is_file

    def removed_right_after(path: Path) -> bool:
        there = real(path)
        if path.name == "data.txt":
            path.unlink()
        return there

    monkeypatch.setattr(Path, "is_file", removed_right_after)
    assert [listed.kind for listed in cache.entries()] == ["stage"]


def test_an_entry_that_another_user_owns_is_taken(
    cache: Cache, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(cache, "k", "a", {})

    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr("mil_cli.run.cache.os.utime", refuse)
    assert cache.find("k", lambda reads: True) is not None
    assert recorder.notices == []


def test_a_file_that_a_stage_cannot_read_is_not_taken_for_the_caches(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), cache.computing("k", "label"):
        (tmp_path / "absent").read_text()
    with pytest.raises(OutputError, match="the disk is full"), cache.computing("k", "label"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path: Path, recorder: Recorder) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"), Cache(tmp_path / "file", recorder).computing("k", "label"):
        pass
