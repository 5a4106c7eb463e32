"""The cache, where it can be written and where it cannot. (As root one may write anything, so a file is put in the way.)"""

import errno
import os
from pathlib import Path

import pytest
from rich.console import Console

from parloop.corpus import cache as module
from parloop.corpus import corpus as corpus_module
from parloop.corpus import load_corpus
from parloop.errors import OutputError
from tests.helpers.sources import QUIET, settings, write_sources


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Return the temporary folder of this test."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp" / f"parloop-{os.getuid()}"


@pytest.fixture
def blocked(tmp_path, monkeypatch):
    """A cache that cannot be made."""
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("PARLOOP_CACHE", str(tmp_path / "file" / "cache"))
    return tmp_path / "file" / "cache"


def said():
    return Console(record=True, width=100, file=open(os.devnull, "w"))


def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_one(tmp_path, temporary, blocked):
    folder, console = write_sources(tmp_path / "src"), said()
    corpus = load_corpus(settings(folder), console=console)
    assert corpus.folder.is_relative_to(temporary)
    assert temporary.stat().st_mode & 0o077 == 0
    shown = console.export_text()
    assert f"the cache '{blocked}/corpus' cannot be written (Not a directory): using '{temporary}/corpus'" in shown
    assert "set PARLOOP_CACHE" in shown
    made = corpus_module._make
    try:
        corpus_module._make = None  # what is there is used again
        assert load_corpus(settings(folder), console=QUIET).folder == corpus.folder
    finally:
        corpus_module._make = made


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_disk_that_refuses_is_like_a_cache_that_cannot_be_made(tmp_path, temporary, monkeypatch, number):
    real = module.tempfile.TemporaryFile

    def refuses(*args, **options):
        if not Path(options["dir"]).is_relative_to(temporary):
            raise OSError(number, os.strerror(number), str(options["dir"]))
        return real(*args, **options)

    monkeypatch.setattr(module.tempfile, "TemporaryFile", refuses)
    console = said()
    corpus = load_corpus(settings(write_sources(tmp_path / "src")), tmp_path / "cache", console)
    assert corpus.folder.is_relative_to(temporary)
    assert f"cannot be written ({os.strerror(number)}): using" in console.export_text()


def test_what_a_cache_that_cannot_be_written_holds_is_used(tmp_path, monkeypatch):
    folder = write_sources(tmp_path / "src")
    first = load_corpus(settings(folder), tmp_path / "cache", QUIET)
    monkeypatch.setattr(corpus_module, "cache_folder", None)
    assert load_corpus(settings(folder), tmp_path / "cache", QUIET).folder == first.folder


def test_neither_can_be_written(tmp_path, blocked, monkeypatch):
    monkeypatch.setattr(module.tempfile, "tempdir", str(blocked))
    with pytest.raises(
        OutputError,
        match=r"the cache .* cannot be written \(Not a directory\), nor can a temporary folder .* set PARLOOP_CACHE",
    ):
        load_corpus(settings(write_sources(tmp_path / "src")), console=QUIET)


def test_a_temporary_cache_of_somebody_else_is_not_used(temporary, blocked, monkeypatch):
    """On a machine that others use, they could put there what is read later."""
    temporary.mkdir(mode=0o700)
    assert module.cache_folder("corpus", QUIET) == temporary / "corpus"
    temporary.chmod(0o777)
    assert not module.cache_folder("corpus", QUIET).is_relative_to(temporary)
    temporary.chmod(0o700)
    me = os.getuid() + 1
    monkeypatch.setattr(module.os, "getuid", lambda: me)
    theirs = temporary.rename(temporary.with_name(f"parloop-{me}"))
    assert not module.cache_folder("corpus", QUIET).is_relative_to(theirs)


def test_a_disk_that_is_full_while_a_corpus_is_made(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(corpus_module, "_make", full)
    with pytest.raises(OutputError, match=r"the disk of .*cache/corpus is full: make room, and run the same command again"):
        load_corpus(settings(write_sources(tmp_path / "src")), tmp_path / "cache", QUIET)
    assert list((tmp_path / "cache" / "corpus").iterdir()) == []
