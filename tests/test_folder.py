"""Folders that verbs write into: whose they are, who works in them, and what is said when a disk refuses."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from parloop import folder as module
from parloop.errors import OutputError
from parloop.folder import (
    BENCH,
    CLAIM,
    DIAGNOSIS,
    EVALUATION_REPORT,
    LOCK,
    STUDY,
    check_room,
    claimed,
    disk_errors,
    locked,
    new_folder,
)

KINDS = [STUDY, DIAGNOSIS, BENCH, EVALUATION_REPORT]
RESULT = {STUDY: "results.json", DIAGNOSIS: "results.json", BENCH: "results.json", EVALUATION_REPORT: "evaluation.json"}


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


# Whose it is


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_verb_wrote_it_may_write_over(kind, tmp_path):
    for text in ("one", "two"):
        with claimed(tmp_path / "deep" / "out", kind) as out:
            out.write(RESULT[kind], text)
    assert files(tmp_path / "deep" / "out").keys() == {CLAIM, RESULT[kind]}
    assert (tmp_path / "deep" / "out" / RESULT[kind]).read_text() == "two"


@pytest.mark.parametrize(
    "name", ["results.json", "report.html", "README.md", "loss.png", "lenses-heads.png", "parloop.json"]
)
def test_a_strangers_file_is_refused_before_anything_is_written(name, tmp_path):
    (tmp_path / name).write_text('{"mine": 1}')
    with (
        pytest.raises(OutputError, match=rf"is not empty and holds no study \({name}\): choose another folder"),
        claimed(tmp_path, STUDY),
    ):
        pytest.fail("it was claimed")
    assert files(tmp_path) == {name: '{"mine": 1}'}


@pytest.mark.parametrize("name", ["evaluation.json", "report.html", "evaluation.png", "parloop.json"])
def test_a_report_among_other_things_leaves_them_alone(name, tmp_path):
    (tmp_path / "toy@1").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    with claimed(tmp_path, EVALUATION_REPORT) as out:
        out.write("report.html", "ours")
    for path in (tmp_path / CLAIM, tmp_path / "report.html"):
        path.unlink()
    (tmp_path / name).write_text("mine")
    with (
        pytest.raises(OutputError, match=rf"holds {name}, which parloop did not write"),
        claimed(tmp_path, EVALUATION_REPORT),
    ):
        pytest.fail("it was claimed")
    assert files(tmp_path) == {"notes.txt": "mine", name: "mine"}


def test_a_file_that_was_changed_since_is_somebody_elses(tmp_path):
    with claimed(tmp_path, STUDY) as out:
        out.write("README.md", "ours")
        out.write("report.html", "ours")
    (tmp_path / "README.md").write_text("ours, and my notes")
    with pytest.raises(OutputError, match=r"holds README.md, which .* or which was changed since"), claimed(tmp_path, STUDY):
        pytest.fail("it was claimed")
    assert (tmp_path / "README.md").read_text() == "ours, and my notes"
    (tmp_path / "README.md").rename(tmp_path / "notes.md")  # as the message says
    with claimed(tmp_path, STUDY) as out:
        out.write("README.md", "again")
    assert (tmp_path / "notes.md").read_text() == "ours, and my notes"


def test_a_file_that_comes_while_a_verb_works_is_not_written_over(tmp_path):
    with pytest.raises(OutputError, match=r"holds README.md"), claimed(tmp_path, STUDY) as out:
        (tmp_path / "README.md").write_text("mine")
        out.write("README.md", "ours")
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_link_to_somewhere_else_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("ours")
    with claimed(tmp_path / "out", STUDY) as out:
        out.write("README.md", "ours")
    (tmp_path / "out" / "README.md").unlink()
    (tmp_path / "out" / "README.md").symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match=r"README.md"), claimed(tmp_path / "out", STUDY):
        pytest.fail("it was claimed")
    assert (tmp_path / "precious").read_text() == "ours"


def test_another_verbs_folder_is_refused(tmp_path):
    with claimed(tmp_path, STUDY) as out:
        out.write("results.json", "{}")
    for kind in (DIAGNOSIS, BENCH, EVALUATION_REPORT):
        with pytest.raises(OutputError, match="holds a study, and not a"), claimed(tmp_path, kind):
            pytest.fail("it was claimed")


def test_a_folder_about_something_else_is_refused(tmp_path):
    with claimed(tmp_path, DIAGNOSIS, of="/a/r2") as out:
        out.write("results.json", "{}")
    with claimed(tmp_path, DIAGNOSIS, of="/a/r2"):
        pass
    with (
        pytest.raises(OutputError, match="holds a diagnosis of /a/r2, and not of /b/r2"),
        claimed(tmp_path, DIAGNOSIS, of="/b/r2"),
    ):
        pytest.fail("it was claimed")


@pytest.mark.parametrize(
    ("kind", "content", "beside"),
    [
        (STUDY, {"rows": [], "verdict": ""}, "README.md"),
        (DIAGNOSIS, {"command": "", "checkpoints": []}, "lenses.csv"),
        (BENCH, {"settings": {}, "blocks": []}, "bench.png"),
        (EVALUATION_REPORT, {"benchmarks": [], "folders": []}, "report.html"),
    ],
)
def test_folders_of_before_there_were_claims_go_on(kind, content, beside, tmp_path):
    (tmp_path / RESULT[kind]).write_text(json.dumps(content))
    (tmp_path / beside).write_text("ours")
    with claimed(tmp_path, kind) as out:
        out.write(beside, "again")
    assert (tmp_path / beside).read_text() == "again"


def test_an_interrupted_study_of_before_there_were_claims_goes_on(tmp_path):
    (tmp_path / "r1-seed0").mkdir()
    (tmp_path / "r1-seed0" / "recipe.yaml").write_text("loops: 1")
    with claimed(tmp_path, STUDY):
        pass
    (tmp_path / CLAIM).unlink()
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(OutputError, match="holds no study"), claimed(tmp_path, STUDY):
        pytest.fail("it was claimed")


@pytest.mark.parametrize("broken", ["replace", "claim"])
def test_what_is_killed_while_it_writes_can_write_again(broken, tmp_path, monkeypatch):
    """Between the claim's note of a file and the file, and before the note."""
    with claimed(tmp_path, STUDY) as out:
        out.write("report.html", "one")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), claimed(tmp_path, STUDY) as out:
        patch.setattr(*((module.os, "replace") if broken == "replace" else (module, "write_json")), killed)
        if broken == "replace":  # of the file only
            patch.setattr(module, "write_json", lambda path, content: path.write_text(json.dumps(content)))
        out.write("report.html", "two")
    assert (tmp_path / "report.html").read_text() == "one"
    for text in ("three", "four", "five"):
        with claimed(tmp_path, STUDY) as out:
            out.write("report.html", text)
    assert files(tmp_path).keys() == {CLAIM, "report.html"}


def test_half_a_file_is_not_left(tmp_path):
    with claimed(tmp_path, STUDY) as out:
        out.write("report.html", "whole")
        with pytest.raises(ZeroDivisionError), out.file("report.html") as path:
            path.write_text("hal")
            raise ZeroDivisionError
        with pytest.raises(ZeroDivisionError):
            out.write_files(lambda folder: [(folder / "README.md").write_text("half"), 1 / 0])
    assert files(tmp_path).keys() == {CLAIM, "report.html"}
    assert (tmp_path / "report.html").read_text() == "whole"


def test_a_strangers_claim_in_a_folder_that_looks_like_ours(tmp_path):
    (tmp_path / "results.json").write_text('{"rows": [], "verdict": ""}')
    (tmp_path / CLAIM).write_text('{"kind": "mine"}')
    with pytest.raises(OutputError, match=rf"holds {CLAIM}, which parloop did not write"), claimed(tmp_path, STUDY):
        pytest.fail("it was claimed")
    assert (tmp_path / CLAIM).read_text() == '{"kind": "mine"}'


def test_a_folder_that_is_deleted_meanwhile(tmp_path):
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "out", STUDY):
        shutil.rmtree(tmp_path / "out")
        raise ZeroDivisionError
    with claimed(tmp_path / "out", STUDY) as out:
        out.write("report.html", "ours")


def test_nothing_is_left_where_nothing_came_of_it(tmp_path):
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "out", STUDY):
        raise ZeroDivisionError
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "empty", STUDY):
        raise ZeroDivisionError
    assert list((tmp_path / "empty").iterdir()) == []


def test_clearing_deletes_what_was_written_and_nothing_else(tmp_path):
    with claimed(tmp_path, STUDY) as out:
        out.write("report.html", "ours")
        (tmp_path / "r1-seed0").mkdir()
        for stranger in (".git", "notes.txt"):
            (tmp_path / stranger).write_text("mine")
            with pytest.raises(OutputError, match=rf"holds more than a study \({stranger}\), so it is not deleted"):
                out.clear()
            assert (tmp_path / "r1-seed0").exists()
            (tmp_path / stranger).unlink()
        (tmp_path / "report.html").write_text("mine now")
        with pytest.raises(OutputError, match=r"\(report.html, changed since\)"):
            out.clear()
        (tmp_path / "report.html").write_text("ours")
        out.clear()
    assert list(tmp_path.iterdir()) == []


# One at a time


WORKS = """
import os, sys, time
from pathlib import Path
from parloop.folder import BENCH, claimed
with claimed(sys.argv[1], BENCH) as out:
    out.write("results.json", "{}")
    if os.fork() == 0:  # a worker, which outlives it
        os.setsid()
        os.closerange(0, 3)
        time.sleep(60)
        os._exit(0)
    print("works", flush=True)
    time.sleep(60)
"""


def test_the_second_is_refused_while_the_first_lives_and_takes_over_when_it_was_killed(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", WORKS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "works\n"
        with (
            pytest.raises(OutputError, match=rf"another run works in .* \(parloop: process {first.pid}\): wait for it"),
            claimed(tmp_path, BENCH),
        ):
            pytest.fail("two in one folder")
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        with claimed(tmp_path, BENCH) as out:
            out.write("results.json", "[]")
    finally:
        first.kill()
        first.wait()
    assert files(tmp_path).keys() == {CLAIM, "results.json"}


def test_two_in_one_process_are_kept_apart_too(tmp_path):
    with claimed(tmp_path, STUDY) as out:
        out.write("results.json", "{}")
        with pytest.raises(OutputError, match="another run works in"), claimed(tmp_path, STUDY):
            pytest.fail("two in one folder")
        with claimed(out, STUDY) as same:  # handed on, it is the same one
            assert same is out
        assert (tmp_path / LOCK).exists()


def test_a_lock_that_is_deleted_between_opening_and_locking_is_made_again(tmp_path, monkeypatch):
    real, calls = module._lock, []

    def deleted_meanwhile(file):
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(file)
        return real(file)

    monkeypatch.setattr(module, "_lock", deleted_meanwhile)
    with locked(tmp_path):
        assert len(calls) == 2
        monkeypatch.setattr(module, "_lock", real)
        with pytest.raises(OutputError, match="another run works"), locked(tmp_path):
            pytest.fail("two in one folder")


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", none)
    with pytest.warns(UserWarning, match="cannot be locked .* no other run works there"), locked(tmp_path):
        pass


# What disks say


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"the disk of .*out is full: make room, and run the same command again; it goes on"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/elsewhere/x"), r"the disk of .*out is full"),
        (Exception("No space left on device (os error 28)"), r"the disk of .*out is full"),
        (RuntimeError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"), r"is full"),
        (OSError(errno.EROFS, "Read-only file system", "{out}/x"), r"out/x' cannot be written \(Read-only file system\): choose another --out,"),
        (Exception("Read-only file system (os error 30)"), r"out' cannot be written \(Read-only file system\)"),
        (PermissionError(errno.EACCES, "Permission denied", "{out}/x"), r"out/x' cannot be written \(Permission denied\)"),
        (PermissionError(errno.EACCES, "Permission denied", "{out}"), r"out' cannot be written"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "{out}/x", None, "{out}/y"), r"out/y' cannot be written \(Is a directory\)"),
        (FileExistsError(errno.EEXIST, "File exists", "{out}/x"), r"out/x' cannot be written \(File exists\)"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "{out}"), r"out' cannot be written \(File name too long\)"),
        (OSError(errno.EIO, "Input/output error", "{out}/x"), r"out/x' cannot be written \(Input/output error\)"),
    ],
)  # fmt: skip
def test_what_a_disk_says_becomes_what_to_do(error, message, tmp_path):
    folder = tmp_path / "out"
    if isinstance(error, OSError) and error.filename:
        names = [name and name.format(out=folder) for name in (error.filename, error.filename2)]
        error = type(error)(error.errno, error.strerror, names[0], None, names[1])
    with pytest.raises(OutputError, match=message) as raised, disk_errors(folder, "it goes on", "--out"):
        raise error
    assert raised.value.__cause__ is error


def test_a_full_disk_is_found_behind_what_a_library_makes_of_it(tmp_path):
    class CheckpointException(BaseException):
        """Like torch's, which is not an Exception."""

    with pytest.raises(OutputError, match="is full"), disk_errors(tmp_path):
        try:
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))
        except OSError:
            raise CheckpointException("rank 0 failed") from None
    with pytest.raises(OutputError, match="is full"), disk_errors(tmp_path):
        raise CheckpointException("OSError: [Errno 28] No space left on device")


@pytest.mark.parametrize("free", [2**20, 2**40])
def test_torchs_writer_that_tells_no_reason(free, tmp_path, monkeypatch):
    usage = module.shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    message = "is full" if free == 2**20 else r"cannot be written \(Input/output error\)"
    with pytest.raises(OutputError, match=message), disk_errors(tmp_path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "/elsewhere/text.py"),  # of what is read
        PermissionError(errno.EACCES, "Permission denied", "{beside}/text.py"),
        PermissionError(errno.EACCES, "Permission denied"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        ValueError("error 28 of 30"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_stay_what_they_are(error, tmp_path):
    if isinstance(error, OSError) and error.filename:
        error = type(error)(error.errno, error.strerror, error.filename.format(beside=tmp_path))
    with pytest.raises(type(error)) as raised, disk_errors(tmp_path / "out"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("way", [claimed, new_folder])
def test_a_file_in_the_way(way, tmp_path):
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(OutputError, match=r"is a file: choose|exists and is not empty"),
        way(tmp_path / "file", *([STUDY] * (way is claimed))),
    ):
        pytest.fail("it was made")
    with (
        pytest.raises(OutputError, match=r"(is|since '.*file' is) a file: choose"),
        way(tmp_path / "file" / "a" / "b", *([STUDY] * (way is claimed))),
    ):
        pytest.fail("it was made")
    assert files(tmp_path) == {"file": "mine"}


@pytest.mark.parametrize("way", [claimed, new_folder])
def test_a_place_that_holds_no_folders(way):
    with (
        pytest.raises(OutputError, match=r"'/proc/parloop' cannot be made: choose another folder"),
        way("/proc/parloop", *([STUDY] * (way is claimed))),
    ):
        pytest.fail("it was made")


def test_room_is_looked_for_before_the_work(tmp_path):
    check_room(tmp_path / "not" / "yet", 1, "the model")
    with pytest.raises(
        OutputError, match=r"the model takes 1e\+09 GB, and the disk of '.*yet' has .* GB free: make room, or choose"
    ):
        check_room(tmp_path / "not" / "yet", 1e18, "the model")


# Folders that are filled at once


def test_a_new_folder_appears_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / "deep" / "out") as scratch:
        (scratch / "x").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert files(tmp_path) == {"deep/out/x": "x"}


@pytest.mark.parametrize("link", [False, True])
def test_an_empty_folder_is_filled_in_its_place(tmp_path, link):
    """It may be a disk of its own, mounted into a container whose other folders cannot be written, or a link."""
    (tmp_path / "out").mkdir()
    if link:
        (tmp_path / "link").symlink_to(tmp_path / "out")
    before = (tmp_path / "out").stat().st_ino
    with new_folder(tmp_path / ("link" if link else "out")) as scratch:
        (scratch / "x").write_text("x")
        (scratch / "y").mkdir()
        assert scratch.parent.samefile(tmp_path / "out")
    assert (tmp_path / "out").stat().st_ino == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["x", "y"]


@pytest.mark.parametrize("there", [False, True])
def test_a_new_folder_that_fails_leaves_nothing(tmp_path, there):
    if there:
        (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as scratch:
        (scratch / "x").write_text("x")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["out"] * there


def test_scratch_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "x").write_text("mine")
    with new_folder(tmp_path / "out") as scratch:
        (scratch / "x").write_text("ours")
    assert files(tmp_path) == {".out.partial/x": "mine", "out/x": "ours"}
