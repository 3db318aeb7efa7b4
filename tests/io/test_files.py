"""Files and folders are written through no link and under no name that can be foreseen."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from loraplus_hydra.errors import ConfigErrors, UserError
from loraplus_hydra.io import files, folders
from loraplus_hydra.io.metrics_log import MetricsLog

WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: files.write_text(path, "new"),
    "bytes": lambda path: files.write_bytes(path, b"new"),
    "a line": lambda path: files.append_text(path, "new"),
    "a cut": lambda path: files.truncate(path, 1),
    "a line of the log": lambda path: MetricsLog(path).write(1, {"loss": 1.0}),
}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file that must keep its text."""
    file = tmp_path / "outside.txt"
    file.write_text("precious")
    return file


@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_written_through_a_link(name: str, tmp_path: Path, outside: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(outside)
    with pytest.raises(UserError, match="link is a link"):
        WRITERS[name](link)
    assert outside.read_text() == "precious"
    assert link.is_symlink()
    link.unlink()
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link is a link"):
        WRITERS[name](link)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["a line", "a cut"])
def test_fifo_is_refused_at_once(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match=r"not a regular file|No such device"):
        WRITERS[name](tmp_path / "fifo")


def test_drafts_have_random_names_and_are_removed_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len({files.draft_of(tmp_path / "a") for _ in range(100)}) == 100

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        files.write_text(tmp_path / "a", "new")
    assert list(tmp_path.iterdir()) == []


def test_longest_name_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127):
        files.write_text(tmp_path / name, "new")
        assert (tmp_path / name).read_text() == "new"
    with pytest.raises(UserError, match="can't be a file"):
        files.new_file(str(tmp_path / ("x" * 256)), key="out")
    with folders.new_folder(tmp_path / ("y" * 255), key="to") as draft:
        (draft / "a").touch()
    assert (tmp_path / ("y" * 255) / "a").exists()


def test_new_file_beside_another_replaces_nothing(tmp_path: Path, outside: Path) -> None:
    out = tmp_path / "out"
    assert files.write_beside(out, ".part", "first") == tmp_path / "out.part"
    (tmp_path / "out.part2").symlink_to(outside)
    (tmp_path / "out.part3").symlink_to(tmp_path / "nowhere")
    before = outside.read_text()
    assert files.write_beside(out, ".part", "second") == tmp_path / "out.part4"
    assert [(tmp_path / f"out.part{n}").read_text() for n in ("", "4")] == ["first", "second"]
    assert outside.read_text() == before
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["x" * 251, "x" * 255, "é" * 127])
def test_file_beside_one_with_the_longest_name_has_a_shorter_stem(name: str, tmp_path: Path) -> None:
    made = [files.write_beside(tmp_path / name, ".part", text) for text in ("first", "second")]
    assert [file.read_text() for file in made] == ["first", "second"]
    assert [file.suffix for file in made] == [".part", ".part2"]
    assert all(name.startswith(file.stem) and len(file.stem) >= 120 for file in made)


def test_one_process_writes_a_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with files.reserved(str(out), key="out"):
        with pytest.raises(UserError, match="another process writes"), files.reserved(str(out), key="out"):
            pass
        files.write_text(out, "new")
    assert out.read_text() == "new"
    with pytest.raises(UserError, match="exists already"), files.reserved(str(out), key="out"):
        pass
    assert list(tmp_path.iterdir()) == [out]


def test_reserved_name_is_free_again_after_an_error_and_after_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), files.reserved(str(out), key="out"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    out.touch()  # as a killed process leaves it
    with files.reserved(str(out), key="out"):
        files.write_text(out, "new")
    assert out.read_text() == "new"


def test_link_as_out_is_refused(tmp_path: Path, outside: Path) -> None:
    outside.write_text("")
    (tmp_path / "out").symlink_to(outside)
    with pytest.raises(UserError, match="exists already"), files.reserved(str(tmp_path / "out"), key="out"):
        pass


def test_one_process_writes_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with folders.new_folder(target, key="to") as draft:
        with pytest.raises(UserError, match="another process is active"), folders.new_folder(target, key="to"):
            pass
        (draft / "weights").write_text("whole")
    assert [path.name for path in target.iterdir()] == ["weights"]
    assert list(target.parent.iterdir()) == [target]
    with pytest.raises(UserError, match="isn't empty"), folders.new_folder(target, key="to"):
        pass


def test_folder_that_another_process_filled_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "target"
    writing = folders.new_folder(target, key="to")
    (writing.__enter__() / "weights").write_text("mine")
    (target / "weights").write_text("theirs")  # on a file system without locks
    with pytest.raises(UserError, match="meanwhile"):
        writing.__exit__(None, None, None)
    assert (target / "weights").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [target]


def test_nothing_is_left_of_a_folder_after_an_error(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with folders.new_folder(tmp_path / "deep" / "target", key="to") as draft:
            (draft / "half").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []


def killed_while_it_writes(target: Path) -> None:
    with folders.new_folder(target, key="to") as draft:
        (draft / "half").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def test_draft_of_a_killed_process_is_removed_by_the_next(tmp_path: Path) -> None:
    target, other = tmp_path / "target", tmp_path / "other"
    for each in (target, other):
        process = multiprocessing.get_context("fork").Process(target=killed_while_it_writes, args=(each,))
        process.start()
        process.join()
    left = [path.name for path in tmp_path.glob(".*.unfinished")]
    assert len(left) == 2
    with folders.new_folder(target, key="to") as draft:
        (draft / "whole").touch()
    assert [path.name.split(".")[1] for path in tmp_path.glob(".*.unfinished")] == ["other"], "it may be at work"


def test_links_at_drafts_names_are_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "thesis").touch()
    (tmp_path / f".target.{'0' * 16}.unfinished").symlink_to(tmp_path / "victim")
    with folders.new_folder(tmp_path / "target", key="to") as draft:
        (draft / "whole").touch()
    assert (tmp_path / "victim" / "thesis").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target", "victim"]


def test_folder_is_replaced_whole_and_not_through_a_link(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    for name in ("first", "second"):
        with folders.replaced_folder(folder) as draft:
            (draft / name).touch()
        assert [path.name for path in folder.iterdir()] == [name]
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(UserError, match="link is a link"), folders.replaced_folder(tmp_path / "link"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "link"]


def test_removing_a_link_leaves_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "thesis").touch()
    for remove in (folders.remove, folders.remove_folder):
        (tmp_path / "link").symlink_to(tmp_path / "victim")
        remove(tmp_path / "link")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "link").symlink_to(tmp_path / "victim")
        remove(tmp_path / "folder")
        assert [path.name for path in tmp_path.iterdir()] == ["victim"]
        assert (tmp_path / "victim" / "thesis").exists()


def test_link_or_fifo_at_any_depth_is_refused(tmp_path: Path, outside: Path) -> None:
    run = tmp_path / "run"
    (run / "deep").mkdir(parents=True)
    (run / "deep" / "file").touch()
    folders.refuse_links(run, key="run")
    folders.refuse_links(tmp_path / "new", key="run")
    (run / "deep" / "link").symlink_to(outside)
    with pytest.raises(ConfigErrors, match="link is a link"):
        folders.refuse_links(run, key="run")
    (run / "deep" / "link").unlink()
    os.mkfifo(run / "deep" / "fifo")
    with pytest.raises(ConfigErrors, match="fifo is neither a file nor a folder"):
        folders.refuse_links(run, key="run")


def test_folders_nested_too_deep_are_refused(tmp_path: Path) -> None:
    (tmp_path / "/".join("d" * 30)).mkdir(parents=True)
    folders.refuse_links(tmp_path, key="run")
    (tmp_path / "/".join("d" * 300)).mkdir(parents=True)
    with pytest.raises(ConfigErrors, match="more than 50 levels of folders"):
        folders.refuse_links(tmp_path, key="run")


def test_link_that_leads_to_the_folder_and_a_trackers_own_are_accepted(tmp_path: Path) -> None:
    run = tmp_path / "disk" / "run"
    (run / "wandb" / "offline-run-1").mkdir(parents=True)
    (run / "wandb" / "latest-run").symlink_to("offline-run-1")
    (tmp_path / "outputs").symlink_to(tmp_path / "disk")
    folders.refuse_links(tmp_path / "outputs" / "run", key="run")
    with folders.new_folder(tmp_path / "outputs" / "export", key="to") as draft:
        (draft / "whole").touch()
    assert (tmp_path / "disk" / "export" / "whole").exists()


def test_hub_caches_links_into_its_own_blobs_are_read_but_not_written(tmp_path: Path, outside: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "abc").touch()
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    folders.refuse_links(snapshot, key="adapter.path", reading=True)
    with pytest.raises(ConfigErrors, match="is a link"):
        folders.refuse_links(snapshot, key="adapter.path")
    (blobs / "evil").symlink_to(outside)
    (snapshot / "more.json").symlink_to("../../blobs/evil")
    with pytest.raises(ConfigErrors, match=r"more.json is a link"):
        folders.refuse_links(snapshot, key="adapter.path", reading=True)


def test_dangling_link_is_no_place_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ConfigErrors, match="a target that doesn't exist"):
        folders.refuse_used_folder(tmp_path / "link", key="hydra.run.dir")
    with pytest.raises(ConfigErrors, match="a target that doesn't exist"):
        files.refuse_unwritable(tmp_path / "link" / "run", key="hydra.run.dir")


def test_temporary_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert folders.private_folder("mine") == folders.private_folder("mine")
    (tmp_path / "theirs").symlink_to(tmp_path / "mine")
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    for name in ("theirs", "open"):
        with pytest.raises(UserError, match="only you"):
            folders.private_folder(name)


def test_name_that_is_not_utf_8_is_stored_in_json(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jsonl")
    files.write_text(tmp_path / "result.json", json.dumps({"file": name}, ensure_ascii=False))
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == {"file": name}
