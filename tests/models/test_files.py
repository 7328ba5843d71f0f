"""Writing directories and files all at once or not at all."""

import errno
import os

import pytest

from bivec.models import BivecError, CheckpointError
from bivec.models.files import atomic_directory, remove_abandoned, write_text_atomic


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def contents(folder):
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def write(folder, **files):
    for name, text in files.items():
        (folder / name).write_text(text)


def test_a_new_directory_appears_whole(tmp_path):
    target = tmp_path / "a" / "b"
    with atomic_directory(target) as temporary:
        write(temporary, one="1")
        (temporary / "sub").mkdir()
        write(temporary / "sub", two="2")
        assert not target.exists()
    assert contents(tmp_path) == {"a/b/one": "1", "a/b/sub/two": "2"}


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("no"), Killed()])
def test_an_error_leaves_what_was_there(tmp_path, existed, error):
    target = tmp_path / "out"
    if existed:
        target.mkdir()
        write(target, one="old")

    def replace() -> None:
        with atomic_directory(target, stale=("*",), last="one") as temporary:
            write(temporary, one="new")
            raise error

    with pytest.raises(type(error)):
        replace()
    assert target.exists() == existed
    assert contents(tmp_path) == ({"out/one": "old"} if existed else {})


def test_files_of_others_stay_and_stale_ones_go(tmp_path):
    write(tmp_path, notes="mine", config="old", shard1="old", shard2="old")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", shard3="mine", both="old")
    with atomic_directory(tmp_path, stale=("shard*", "absent"), last="config") as temporary:
        write(temporary, config="new", shard1="new")
        (temporary / "sub").mkdir()
        write(temporary / "sub", both="new")
    expected = {"notes": "mine", "config": "new", "shard1": "new", "sub/shard3": "mine", "sub/both": "new"}
    assert contents(tmp_path) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config", "notes", "shard1", "sub"]


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_kill_between_the_moves_leaves_nothing_that_loads(tmp_path, monkeypatch, moves):
    write(tmp_path, a="old", config="old", z="old")
    done = []

    def replace(source, target, replace=os.replace):
        if len(done) == moves:
            raise Killed
        done.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Killed), atomic_directory(tmp_path, last="config") as temporary:
        write(temporary, a="new", config="new", z="new")
    assert done == ["a", "z"][:moves] and "config" not in contents(tmp_path)


def test_links_and_the_working_directory_stay_what_they_are(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_directory(tmp_path / "link") as temporary:
        write(temporary, one="1")
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == {"one": "1"}
    monkeypatch.chdir(tmp_path / "real")
    with atomic_directory(".") as temporary:
        write(temporary, two="2")
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == ["one", "two"]


def test_a_file_in_the_way(tmp_path):
    write(tmp_path, out="text")
    with pytest.raises(CheckpointError, match="out is a file"), atomic_directory(tmp_path / "out"):
        pass
    assert contents(tmp_path) == {"out": "text"}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "x"), OSError(errno.EDQUOT, "x"), RuntimeError("No space left on device (28)")]
)
def test_a_full_disk_is_said_so(tmp_path, monkeypatch, error):
    write(tmp_path, text="old")
    with pytest.raises(CheckpointError, match=r"out: the disk is full"), atomic_directory(tmp_path / "out"):
        raise error
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(error))
    with pytest.raises(BivecError, match="text: the disk is full"):
        write_text_atomic(tmp_path / "text", "new")
    assert contents(tmp_path) == {"text": "old"}


def test_texts_are_replaced(tmp_path):
    for text in ("one ä\n", "two"):
        write_text_atomic(tmp_path / "text", text)
        assert (tmp_path / "text").read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_what_a_kill_has_left_is_removed(tmp_path):
    write(tmp_path, **{".run.json.01234567.tmp": "half", ".curve.01234567.tmp.png": "half"})
    write(tmp_path, **{".hidden": "mine", "notes.tmp": "mine", ".notes.tmpl": "mine"})
    for name in (".merged.01234567.tmp", ".mntp-000010.old.tmp", "..01234567.tmp", "kept.tmp", ".notes.old.tmp"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, file="x")
    (tmp_path / ".link.01234567.tmp").symlink_to(tmp_path / "kept.tmp")
    remove_abandoned(tmp_path)
    kept = {"kept.tmp/file": "x", ".notes.old.tmp/file": "x"}
    assert contents(tmp_path) == kept | {".hidden": "mine", "notes.tmp": "mine", ".notes.tmpl": "mine"}
    assert not (tmp_path / ".merged.01234567.tmp").exists() and not (tmp_path / ".link.01234567.tmp").is_symlink()
    remove_abandoned(tmp_path / "nowhere")
