from __future__ import annotations

import errno
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from regraft.errors import InputError, OutputExistsError
from regraft.files import check_output, scratch_folder, whole_file, whole_folder


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill_file(
    path: Path, content: str, error: BaseException | None = None, *, force: bool = False
) -> None:
    """Writes a whole file, or is stopped half-way by an error."""
    with whole_file(path, force) as hidden:
        hidden.write_text(content)
        if error:
            raise error


def fill_folder(
    path: Path, content: str, error: BaseException | None = None, *, force: bool = False
) -> None:
    """Writes a whole bundle-like folder, or is stopped half-way by an error."""
    with whole_folder(path, "manifest.json", force) as hidden:
        (hidden / "manifest.json").write_text(content)
        if error:
            raise error


def test_a_file_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "out.npz"
    with whole_file(target) as hidden:
        hidden.write_text("new")
        assert not target.exists()
        assert hidden.parent == tmp_path
        assert hidden.name.startswith(".")
        assert hidden.suffix == ".npz"
    assert target.read_text() == "new"
    assert left_in(tmp_path) == ["out.npz"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_file_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        fill_file(tmp_path / "out.npz", "half", error())
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_folder_leaves_the_old_one(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "manifest.json").write_text("old")
    with pytest.raises(error):
        fill_folder(target, "half", error(), force=True)
    assert (target / "manifest.json").read_text() == "old"
    assert left_in(tmp_path) == ["bundle"]


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "out.npz"
    target.write_text("old")
    with whole_file(target, force=True) as hidden:
        hidden.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "manifest.json").write_text("old")
    (target / "stale.onnx").write_text("old")
    with whole_folder(target, "manifest.json", force=True) as hidden:
        (hidden / "manifest.json").write_text("new")
        (hidden / "deeper").mkdir()
    assert left_in(target) == ["deeper", "manifest.json"]
    assert left_in(tmp_path) == ["bundle"]


@pytest.mark.parametrize("fails", [1, 2], ids=["moving-old", "moving-new"])
def test_a_swap_that_is_interrupted_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    target = tmp_path / "bundle"
    fill_folder(target, "old")
    calls, rename = 0, Path.rename

    def interrupted(self: Path, to: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == fails:
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill_folder(target, "new", force=True)
    assert (target / "manifest.json").read_text() == "old"
    assert left_in(tmp_path) == ["bundle"]


@pytest.mark.parametrize("existed", [False, True])
def test_of_two_processes_that_write_one_folder_the_last_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existed: bool
) -> None:
    target = tmp_path / "bundle"
    if existed:
        fill_folder(target, "old")
    rename, rivals = Path.rename, [1]

    def raced(self: Path, to: Path) -> Path:
        if to == target and rivals:
            rivals.pop()
            fill_folder(target, "rival", force=True)
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", raced)
    fill_folder(target, "new", force=True)
    assert not rivals
    assert (target / "manifest.json").read_text() == "new"
    assert left_in(tmp_path) == ["bundle"]


def test_an_existing_output_is_refused_by_name(tmp_path: Path) -> None:
    target = tmp_path / "out.npz"
    target.write_text("old")
    bundle = tmp_path / "bundle"
    fill_folder(bundle, "old")
    for path, opened in (
        (target, whole_file(target)),
        (bundle, whole_folder(bundle, "manifest.json")),
    ):
        with pytest.raises(OutputExistsError) as caught, opened:
            pytest.fail("the block must not run")
        assert str(caught.value) == f"{path}: exists already; give --force to replace it"
    assert target.read_text() == "old"


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out.npz"
    writing = whole_file(target)
    writing.__enter__().write_text("ours")
    target.write_text("theirs")
    with pytest.raises(OutputExistsError, match=r"out\.npz: exists already"):
        writing.__exit__(None, None, None)
    assert target.read_text() == "theirs"
    assert left_in(tmp_path) == ["out.npz"]


def test_force_does_not_delete_a_folder_of_another_kind(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match=r"home: is a folder without manifest\.json, so --force"):
        fill_folder(home, "new", force=True)
    assert (home / "thesis.tex").read_text() == "years"


def test_kinds_are_not_confused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="file: is a file; expected the name of a folder"):
        fill_folder(tmp_path / "file", "new", force=True)
    with pytest.raises(InputError, match="folder: is a folder; expected the name of a file"):
        fill_file(tmp_path / "folder", "new", force=True)


@pytest.mark.parametrize("force", [False, True])
def test_another_kind_is_refused_before_the_work_and_without_advising_force(
    tmp_path: Path, force: bool
) -> None:
    file, folder, home = tmp_path / "file", tmp_path / "folder", tmp_path / "home"
    file.write_text("")
    folder.mkdir()
    home.mkdir()
    (home / "thesis.tex").write_text("years")
    for path, marker, message in (
        (folder, None, "is a folder; expected the name of a file"),
        (file, "manifest.json", "is a file; expected the name of a folder"),
        (home, "manifest.json", "is a folder without manifest.json, so --force does not replace"),
    ):
        with pytest.raises(InputError) as caught:
            check_output(path, force, marker=marker)
        assert str(caught.value).startswith(f"{path}: {message}")
    assert check_output(folder, force=True, marker="manifest.json") == folder.resolve()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a /proc")
def test_a_place_that_takes_no_files_is_one_line() -> None:
    with pytest.raises(InputError) as caught:
        check_output("/proc/a.npz")
    assert str(caught.value).startswith("/proc/a.npz: cannot be written (")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EINVAL, errno.ESTALE, errno.ETXTBSY])
def test_whatever_the_place_answers_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(self: Path, **_: object) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(InputError) as caught:
        check_output(tmp_path / "out.npz")
    assert str(caught.value) == (
        f"{tmp_path / 'out.npz'}: cannot be written ({os.strerror(number)}); choose another place"
    )


def test_devices_and_missing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="/dev/null: is a device or a pipe"):
        check_output("/dev/null", force=True)
    missing = tmp_path / "no" / "out.npz"
    with pytest.raises(InputError) as caught:
        check_output(missing)
    assert str(caught.value) == f"{missing}: the folder {missing.parent} does not exist; " + (
        "create it first"
    )
    file = tmp_path / "file"
    file.touch()
    for below in (file / "out.npz", file / "deeper" / "out.npz"):
        with pytest.raises(InputError) as caught:
            check_output(below)
        assert str(caught.value) == f"{below}: {file} is a file, not a folder; choose another place"


def test_a_link_keeps_its_place(tmp_path: Path) -> None:
    real, link = tmp_path / "real.npz", tmp_path / "link.npz"
    real.write_text("old")
    link.symlink_to(real)
    with whole_file(link, force=True) as hidden:
        hidden.write_text("new")
    assert link.is_symlink()
    assert real.read_text() == "new"


def test_permissions_are_the_usual_ones(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    (tmp_path / "usual.d").mkdir()
    with whole_file(tmp_path / "ours") as hidden:
        hidden.write_text("")
    with whole_folder(tmp_path / "ours.d", "manifest.json"):
        pass
    for ours, usual in (("ours", "usual"), ("ours.d", "usual.d")):
        assert (tmp_path / ours).stat().st_mode == (tmp_path / usual).stat().st_mode


@pytest.fixture
def small_file_limit():
    """No file may grow beyond 1000 bytes: what a full disk looks like, without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_file_limit")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    target = tmp_path / "out.npz"
    with pytest.raises(InputError) as caught:
        fill_file(target, "x" * 5000)
    assert str(caught.value).startswith(f"{target}: cannot be written (File too large); choose a")
    with pytest.raises(InputError, match="bundle: cannot be written"):
        fill_folder(tmp_path / "bundle", "x" * 5000)
    assert left_in(tmp_path) == []


def test_an_error_elsewhere_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    for path in ("/elsewhere/cat.jpg", str(tmp_path / "cat.jpg")):
        with pytest.raises(PermissionError, match="cat"):
            fill_file(tmp_path / "out.npz", "half", PermissionError(13, "Permission denied", path))


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    """A folder that this process cannot write to, root or not."""
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp())  # pytest's own are root's alone, so nobody cannot enter
    folder.chmod(0o755)
    os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(0)
        folder.rmdir()


def test_a_read_only_folder_is_one_line(unwritable: Path) -> None:
    target = unwritable / "out.npz"
    message = f"{target}: cannot be written (Permission denied); choose a place you may write to"
    with pytest.raises(InputError) as caught:
        check_output(target)
    assert str(caught.value) == message


def test_a_folder_that_cannot_be_entered_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out.npz"

    def locked(self: Path, **_: object) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", locked)
    with pytest.raises(InputError, match=r"out\.npz: cannot be written \(Permission denied\)"):
        check_output(target)


def test_a_scratch_folder_is_removed(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "out.npz") as folder:
        (folder / "rows").write_text("x")
    assert left_in(tmp_path) == []


def test_long_names_fit(tmp_path: Path) -> None:
    name = "ü" * 124 + ".npz"  # 252 bytes
    with whole_file(tmp_path / name) as hidden, scratch_folder(hidden):
        hidden.write_text("new")
    assert left_in(tmp_path) == [name]
