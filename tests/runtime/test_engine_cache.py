from __future__ import annotations

import dataclasses
import json
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest

from regraft import engine_key
from regraft.cache_trust import cache_root
from regraft.engine_cache import Entry, held, latest, new_entry
from regraft.engine_key import CacheKey, graph_hashes
from regraft.errors import EngineError

KEY = CacheKey(
    engine="openvino",
    version="2026.4",
    device="CPU: some processor",
    precision="fp32",
    graph_sha256="a" * 64,
    weights_sha256="b" * 64,
    options={"max-batch": 8, "level": "high"},
)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "model.onnx").write_bytes(b"graph")
    return tmp_path / "bundle" / "model.onnx"


def put(graph: Path, key: CacheKey = KEY, content: bytes = b"compiled") -> Path:
    with new_entry(key, graph) as draft:
        (draft.folder / "parts").mkdir()
        (draft.folder / "model.blob").write_bytes(content)
        (draft.folder / "parts" / "0").write_bytes(b"part")
        draft.report = {"build": {"bytes": len(content)}}
    return key.folder


def test_what_was_put_is_found_with_its_report(graph: Path) -> None:
    assert latest(KEY, graph) is None
    folder = put(graph)
    entry = latest(KEY, graph)
    assert isinstance(entry, Entry)
    assert entry.folder == folder
    assert entry.report == {"build": {"bytes": 8}}
    assert entry.options == {"max-batch": 8, "level": "high"}
    assert (folder / "model.blob").read_bytes() == b"compiled"
    assert json.loads((folder / "key.json").read_text()) == KEY.to_json()
    assert folder.is_relative_to(cache_root() / "engines" / "openvino")


def test_only_the_user_may_read_it_whatever_the_umask(graph: Path) -> None:
    before = os.umask(0)
    try:
        folder = put(graph)
    finally:
        os.umask(before)
    root = cache_root()
    paths = [root, *root.rglob("*")]
    assert len(paths) >= 9
    for path in paths:
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path
    assert folder in paths


@pytest.mark.parametrize(
    "change",
    [
        {"engine": "other"},
        {"version": "2026.5"},
        {"device": "CPU: another processor"},
        {"precision": "bf16"},
        {"graph_sha256": "c" * 64},
        {"weights_sha256": "c" * 64},
        {"weights_sha256": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_difference_is_another_entry(graph: Path, change: dict[str, str]) -> None:
    put(graph)
    other = dataclasses.replace(KEY, **change)
    assert other.folder != KEY.folder
    assert latest(other, graph) is None
    put(graph, other, b"other")
    ours, theirs = latest(KEY, graph), latest(other, graph)
    assert ours is not None
    assert theirs is not None
    assert (ours.folder, theirs.folder) == (KEY.folder, other.folder)


def test_of_several_build_options_the_last_built_replaces_the_others(graph: Path) -> None:
    other = dataclasses.replace(KEY, options={"max-batch": 64, "level": "high"})
    assert other.folder != KEY.folder
    for key in (KEY, other, KEY):
        put(graph, key)
        entry = latest(dataclasses.replace(KEY, options={}), graph)
        assert entry is not None
        assert (entry.folder, entry.options) == (key.folder, key.options)
        assert list(key.group.iterdir()) == [key.folder]


def test_only_a_build_that_passes_replaces_others(graph: Path) -> None:
    put(graph)
    other = dataclasses.replace(KEY, options={"max-batch": 64, "level": "high"})
    with suppress(ZeroDivisionError), new_entry(other, graph):
        raise ZeroDivisionError
    assert list(KEY.group.iterdir()) == [KEY.folder]


def test_what_killed_builds_left_is_removed_after_a_day(graph: Path) -> None:
    put(graph)
    abandoned, in_work = KEY.group / ".left.0a", KEY.group / ".left.0b"
    for folder, age in ((abandoned, 25), (in_work, 23)):
        folder.mkdir()
        (folder / "model.blob").write_bytes(b"half")
        os.utime(folder, (time.time() - 3600 * age,) * 2)
    put(graph)
    assert sorted(KEY.group.iterdir()) == sorted([in_work, KEY.folder])


def test_nobody_replaces_what_is_being_opened(graph: Path) -> None:
    put(graph)
    other = dataclasses.replace(KEY, options={"max-batch": 64, "level": "high"})
    builds = [Thread(target=put, args=(graph, key, b"new")) for key in (KEY, other)]
    with held(KEY):
        for build in builds:
            build.start()
        for build in builds:
            build.join(0.2)
            assert build.is_alive()
        entry = latest(KEY, graph)
        assert entry is not None
        assert (entry.folder / "model.blob").read_bytes() == b"compiled"
    for build in builds:
        build.join(10)
    entry = latest(KEY, graph)
    assert entry is not None
    assert (entry.folder / "model.blob").read_bytes() == b"new"


def test_many_may_build_and_open_at_once(graph: Path) -> None:
    put(graph)
    failures: list[Exception] = []

    def work(build: bool) -> None:
        try:
            for _ in range(40):
                if build:
                    put(graph)
                    continue
                with held(KEY):
                    entry = latest(KEY, graph)
                    assert entry is not None
                    assert (entry.folder / "model.blob").read_bytes() == b"compiled"
        except Exception as error:
            failures.append(error)

    threads = [Thread(target=work, args=(build,)) for build in (True, True, False, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_the_hashes_cover_graph_and_weights(graph: Path) -> None:
    alone = graph_hashes(graph)
    assert alone[1] is None
    (graph.parent / "weights.data").write_bytes(b"weights")
    both = graph_hashes(graph)
    (graph.parent / "weights.data").write_bytes(b"weightz")
    changed = graph_hashes(graph)
    assert alone[0] == both[0] == changed[0]
    assert len({alone[1], both[1], changed[1]}) == 3
    graph.write_bytes(b"grapf")
    assert graph_hashes(graph)[0] != alone[0]


def _change(folder: Path) -> None:
    (folder / "model.blob").write_bytes(b"compileD")


def _remove(folder: Path) -> None:
    (folder / "parts" / "0").unlink()


def _add(folder: Path) -> None:
    (folder / "more.blob").write_bytes(b"")


def _no_key(folder: Path) -> None:
    (folder / "key.json").unlink()


def _no_record(folder: Path) -> None:
    (folder / "record.json").unlink()


def _other_key(folder: Path) -> None:
    other = dataclasses.replace(KEY, device="elsewhere")
    (folder / "key.json").write_text(json.dumps(other.to_json()))


def _torn_record(folder: Path) -> None:
    (folder / "record.json").write_text("{")


def _writable(folder: Path) -> None:
    (folder / "model.blob").chmod(0o666)


def _writable_folder(folder: Path) -> None:
    folder.chmod(0o777)


def _link(folder: Path) -> None:
    folder.rename(cache_root() / "elsewhere")
    folder.symlink_to(cache_root() / "elsewhere")


FAULTS = [
    (_change, "is damaged: model.blob was changed (its sha256 differs)"),
    (_remove, "is damaged: parts/0 is missing"),
    (_add, "is damaged: more.blob was not there when it was built"),
    (_no_key, "is of unknown origin: key.json cannot be read"),
    (_no_record, "is of unknown origin: record.json cannot be read"),
    (_other_key, "is of unknown origin: key.json does not belong to this folder"),
    (_torn_record, "is damaged: key.json or record.json is malformed"),
    (_writable, "is of unknown origin: others may write to it (mode 666)"),
    (_writable_folder, "is of unknown origin: others may write to it (mode 777)"),
    (_link, "is of unknown origin: a symbolic link"),
]


@pytest.mark.parametrize(("damage", "message"), FAULTS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_damaged_or_foreign_entry_is_refused_by_name_and_building_again_mends_it(
    graph: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = put(graph)
    damage(folder)
    with pytest.raises(EngineError) as caught:
        latest(KEY, graph)
    text = str(caught.value)
    assert text.startswith(str(folder))
    assert message in text
    assert text.endswith("; remove it and build again with `regraft build`")
    put(graph)
    assert latest(KEY, graph) is not None
    assert not folder.is_symlink()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_folder_around_it_that_others_may_write_to_is_refused(graph: Path, which: int) -> None:
    folder = put(graph)
    around = [cache_root(), folder.parent.parent, folder.parent][which]
    around.chmod(0o770)
    for action in (lambda: latest(KEY, graph), lambda: put(graph)):
        with pytest.raises(EngineError) as caught:
            action()
        assert str(caught.value).startswith(f"{around}: is of unknown origin: others may write")


def test_a_cache_of_another_user_is_refused(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(graph)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    message = f"{cache_root()}: is of unknown origin: user {owner} owns it, this is {owner + 1}"
    for action in (lambda: latest(KEY, graph), lambda: put(graph)):
        with pytest.raises(EngineError, match=message):
            action()


def test_a_cache_inside_a_bundle_is_refused(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = graph.parent / "cache"
    put(graph)
    monkeypatch.setenv("REGRAFT_CACHE", str(inside))
    for action in (lambda: latest(KEY, graph), lambda: put(graph)):
        with pytest.raises(EngineError, match=r"lies in the bundle .*; set REGRAFT_CACHE to a fol"):
            action()
    assert not inside.exists()
    (graph.parent.parent / "link").symlink_to(graph.parent)
    monkeypatch.setenv("REGRAFT_CACHE", str(graph.parent.parent / "link" / "cache"))
    with pytest.raises(EngineError, match="lies in the bundle"):
        latest(KEY, graph)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, EngineError])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_an_interrupted_build_leaves_the_cache_as_it_was(
    graph: Path, error: type[BaseException], existing: bool
) -> None:
    if existing:
        put(graph, content=b"before")
    with suppress(error), new_entry(KEY, graph) as draft:
        (draft.folder / "model.blob").write_bytes(b"half")
        raise error
    assert [p.name for p in KEY.group.iterdir()] == ([KEY.folder.name] if existing else [])
    entry = latest(KEY, graph)
    assert (entry is not None) == existing
    if entry:
        assert (entry.folder / "model.blob").read_bytes() == b"before"


def test_one_in_the_making_is_not_found(graph: Path) -> None:
    with new_entry(KEY, graph) as draft:
        (draft.folder / "model.blob").write_bytes(b"half")
        assert latest(KEY, graph) is None
    assert latest(KEY, graph) is not None


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REGRAFT_CACHE", "relative")
    assert cache_root() == tmp_path / "relative"
    monkeypatch.setenv("REGRAFT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "regraft"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "home" / ".cache" / "regraft"


def test_a_cache_that_cannot_be_made_is_one_message(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (graph.parent.parent / "file").touch()
    monkeypatch.setenv("REGRAFT_CACHE", str(graph.parent.parent / "file" / "cache"))
    assert latest(KEY, graph) is None
    with pytest.raises(EngineError, match=r"cannot be written \(.+\); set REGRAFT_CACHE to a"):
        put(graph)


def test_the_cache_may_be_a_link_of_the_user(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = graph.parent.parent / "big-disk"
    real.mkdir(mode=0o700)
    (graph.parent.parent / "small").symlink_to(real)
    monkeypatch.setenv("REGRAFT_CACHE", str(graph.parent.parent / "small"))
    put(graph)
    assert latest(KEY, graph) is not None
    assert any(real.rglob("model.blob"))


def test_the_schema_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = KEY.folder
    monkeypatch.setattr(engine_key, "SCHEMA", engine_key.SCHEMA + 1)
    assert KEY.folder != before
