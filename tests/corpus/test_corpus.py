"""Reading, splitting, tokenizing, packing."""

import glob
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from parloop.corpus import collate, load_corpus, pack, sources, text_ids, train_tokenizer
from parloop.corpus.samples import samples_of
from parloop.corpus.sources import read
from parloop.errors import SourceError
from tests.helpers.sources import QUIET, settings, write_sources


def test_bad_files_are_left_out_counted_and_named(tmp_path):
    folder = write_sources(tmp_path / "src")
    (folder / "picture.py").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
    (folder / "empty.py").write_text("")
    (folder / "blank.py").write_text("\n\n")
    (folder / "latin.py").write_bytes("# café".encode("latin-1"))
    (folder / "huge.py").write_text("x = 1\n" * 5000)
    (folder / "copy.py").write_text((folder / "package_0/module_0.py").read_text())
    (folder / "notes.md").write_text("notes")
    (folder / "dangling.py").symlink_to(tmp_path / "nowhere")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "module.py").write_text("never = 'read'")
    corpus = load_corpus(settings(folder, max_file_bytes=20_000), tmp_path / "cache", QUIET)
    assert corpus.summary["left_out"] == {
        "empty": 2,
        "binary": 1,
        "not UTF-8": 1,
        "over 20,000 bytes": 1,
        "duplicate": 1,
        "not .py": 1,
        "unreadable": 1,
    }
    assert corpus.summary["left_out_names"]["binary"] == [str(folder / "picture.py")]
    assert corpus.summary["train"]["documents"] + corpus.summary["validation"]["documents"] == 60
    console = Console(record=True, width=100)
    corpus.print_summary(console)
    text = console.export_text()
    assert "1 binary" in text
    assert "train" in text


def test_names_that_are_not_utf8_are_replaced(tmp_path):
    """In held-out documents, which are kept under their names, and in what is left out; in the source itself too."""
    folder = write_sources(tmp_path / "src")
    for path in folder.rglob("*.py"):
        path.rename(os.fsdecode(os.fsencode(path).replace(b"module", b"m\xf6dule")))
    (folder / os.fsdecode(b"\xff.py")).write_text("")
    named = tmp_path / os.fsdecode(b"s\xffurce")
    folder.rename(named)
    corpus = load_corpus(settings(named), tmp_path / "cache", QUIET)
    assert len(corpus.validation["name"]) > 4
    assert all(re.search(r"/s\?urce/package_\d/m\?dule_\d+\.py$", name) for name in corpus.validation["name"])
    assert corpus.summary["left_out_names"] == {"empty": [f"{tmp_path}/s?urce/?.py"]}
    assert corpus.summary["source"] == f"{tmp_path}/s?urce"


@pytest.mark.parametrize("kind", ["files", "jsonl"])
def test_byte_order_marks_are_no_part_of_a_text(tmp_path, kind):
    texts = ["\ufeffa = 1\n", "b = 2\n\ufeffc = 3\n", "\ufeff", "d = 4\n"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.py").write_text(text, encoding="utf-8")
    rows = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "rows.jsonl").write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    source = tmp_path if kind == "files" else tmp_path / "rows.jsonl"
    found = [text for _, text, reason in read(str(source), (".py",), "text", 10_000) if not reason.startswith("not .py")]
    assert found == ["a = 1\n", "b = 2\nc = 3\n", None, "d = 4\n"]


def links(tmp_path):
    """A folder with links: to a folder outside, to one inside, to itself, to what links back, to nothing, and to a file."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside / "z", outside / "deep"):
        folder.mkdir(parents=True)
        (folder / "module.py").write_text(f"x = {str(folder.name)!r}\n")
    (inside / "a").symlink_to(inside / "z")
    (inside / "b").symlink_to(outside)
    (inside / "c").symlink_to(inside)
    (outside / "back").symlink_to(inside)
    (inside / "d").symlink_to(tmp_path / "nowhere")
    (inside / "node_modules").symlink_to(outside)
    (inside / "e.py").symlink_to(inside / "z" / "module.py")
    return inside


def test_linked_folders_are_read_each_once(tmp_path):
    inside = links(tmp_path)
    found = [str(path.relative_to(inside)) for path in sources.files_of(str(inside))]
    # Of a folder that is here and linked to, under its own name; d leads nowhere, and is left out when it is read.
    assert found == ["d", "e.py", "z/module.py", "b/deep/module.py"]


def test_a_glob_gives_each_file_once(tmp_path):
    inside = links(tmp_path)
    found = sources.files_of(str(inside / "**" / "*.py"))
    assert [os.path.realpath(path) for path in found] == [
        str(tmp_path / "outside/deep/module.py"), str(tmp_path / "inside/z/module.py"),
    ]  # fmt: skip
    assert found[1] == inside / "z/module.py"


@pytest.mark.parametrize(
    "pattern",
    ["**/*.py", "**", "a*/**/*.py", "**/z/*", "a/**/z/**/*.py", "**/.hidden/*", ".*/**/*.py", "**/[mn]?d*.py", "a/**/../*.py", "*/*.py", "x/**"],
)  # fmt: skip
def test_globs_match_as_pythons_own(tmp_path, monkeypatch, pattern):
    for name in (
        "m.py",
        "a/mod.py",
        "a/b/z/node.py",
        "a/.hidden/x.py",
        ".hidden/z/y.py",
        "z/z/note.md",
        "ab/z/mode.py",
        "a/.x.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    for start in ("", f"{tmp_path}/"):
        expected = {path for path in glob.glob(start + pattern, recursive=True) if os.path.isfile(path)}
        found = set(map(str, sources._glob(Path(start + pattern))))
        assert {path for path in found if os.path.isfile(path)} == expected


def test_documents_of_linked_folders_are_trained_on(tmp_path):
    write_sources(tmp_path / "elsewhere")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "linked").symlink_to(tmp_path / "elsewhere")
    corpus = load_corpus(settings(tmp_path / "src"), tmp_path / "cache", QUIET)
    assert corpus.summary["train"]["documents"] + corpus.summary["validation"]["documents"] == 60
    assert corpus.summary["left_out"] == {}


def test_nothing_leaks_and_nothing_moves(tmp_path):
    """Each document's side depends on its text alone: adding and renaming files moves nothing."""
    a = write_sources(tmp_path / "a")
    first = load_corpus(settings(a), tmp_path / "cache", QUIET)
    b = tmp_path / "b"
    b.mkdir()
    for path in a.rglob("*.py"):
        (b / f"renamed_{path.name}").write_text(path.read_text())
    (b / "another.py").write_text("def another():\n    return 'something else entirely'\n" * 30)
    second = load_corpus(settings(b), tmp_path / "cache", QUIET)
    one, two = set(first.validation["text"]), set(second.validation["text"])
    assert one <= two
    assert len(two - one) <= 1
    train_text = first.tokenizer.decode(np.concatenate([row["input_ids"] for row in first.train]), skip_special_tokens=True)
    for text in one:
        assert text[:200] not in train_text


def test_the_tokenizer_has_seen_the_train_split_only(tmp_path, monkeypatch):
    from parloop.corpus import corpus as module

    seen = []

    def spy(texts, vocab_size):
        seen.extend(texts)
        return train_tokenizer(seen, vocab_size)

    monkeypatch.setattr(module, "train_tokenizer", spy)
    corpus = load_corpus(settings(write_sources(tmp_path / "src")), tmp_path / "cache", QUIET)
    assert len(seen) == corpus.summary["train"]["documents"]
    assert not set(seen) & set(corpus.validation["text"])


def test_the_cache_is_used_and_notices_changes(tmp_path, monkeypatch):
    from parloop.corpus import corpus as module

    folder = write_sources(tmp_path / "src")
    made = []
    original = module._make
    monkeypatch.setattr(module, "_make", lambda *a: made.append(1) or original(*a))
    first = load_corpus(settings(folder), tmp_path / "cache", QUIET)
    again = load_corpus(settings(folder), tmp_path / "cache", QUIET)
    assert len(made) == 1
    assert first.folder == again.folder
    load_corpus(settings(folder, length=64), tmp_path / "cache", QUIET)
    assert len(made) == 2
    (folder / "new.py").write_text("x = 1\n" * 100)
    load_corpus(settings(folder), tmp_path / "cache", QUIET)
    assert len(made) == 3
    assert sorted(path.name for path in (tmp_path / "cache" / "corpus").iterdir()) == sorted(
        {path.name for path in (tmp_path / "cache" / "corpus").iterdir() if (path / "summary.json").exists()}
    )


def test_an_interrupted_preparation_leaves_no_half_corpus(tmp_path, monkeypatch):
    from parloop.corpus import corpus as module

    folder = write_sources(tmp_path / "src")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_store", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_corpus(settings(folder), tmp_path / "cache", QUIET)
    assert list((tmp_path / "cache" / "corpus").iterdir()) == []
    monkeypatch.undo()
    assert len(load_corpus(settings(folder), tmp_path / "cache", QUIET).train) > 0


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "glob", "file list"])
def test_other_sources(tmp_path, kind):
    from datasets import Dataset

    folder = write_sources(tmp_path / "src")
    texts = sorted(path.read_text() for path in folder.rglob("*.py"))
    source, column = None, "text"
    if kind == "jsonl":
        source, column = tmp_path / "rows.jsonl", "code"
        rows = [{"code": text, "n": i} for i, text in enumerate(texts)] + [{"code": "", "n": -1}, {"code": None, "n": -2}]
        source.write_text("\n".join(json.dumps(row) for row in rows))
    elif kind == "parquet":
        source = tmp_path / "rows.parquet"
        Dataset.from_dict({"text": texts}).to_parquet(str(source))
    elif kind == "glob":
        source = f"{folder}/**/*.py"
    else:
        source = f"{folder}/package_*/*"
    corpus = load_corpus(settings(source, text_column=column), tmp_path / "cache", QUIET)
    assert corpus.summary["train"]["documents"] + corpus.summary["validation"]["documents"] == 60
    assert set(corpus.validation["text"]) <= set(texts)
    if kind == "jsonl":
        assert corpus.summary["left_out"] == {"empty": 1, "not text": 1}


def test_a_hub_data_set_is_streamed(tmp_path):
    """The Hub's code path, on a local data set folder: streaming, split and column by name."""
    from datasets import Dataset

    folder = write_sources(tmp_path / "src")
    texts = sorted(path.read_text() for path in folder.rglob("*.py"))
    (tmp_path / "dataset").mkdir()
    Dataset.from_dict({"content": texts}).to_parquet(str(tmp_path / "dataset" / "train-00000.parquet"))
    Dataset.from_dict({"content": texts[:3]}).to_parquet(str(tmp_path / "dataset" / "test-00000.parquet"))
    name = f"hub:{tmp_path / 'dataset'}"
    corpus = load_corpus(settings(name, text_column="content"), tmp_path / "cache", QUIET)
    assert corpus.summary["train"]["documents"] + corpus.summary["validation"]["documents"] == 60
    assert len(list(read(f"{name}@test", (), "content", 10**6))) == 3
    half = load_corpus(settings(name, text_column="content", max_bytes=90_000), tmp_path / "cache", QUIET)
    assert half.summary["train"]["documents"] < corpus.summary["train"]["documents"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "no such file or folder"),
        ("/no/such/*.py", "no file matches this glob"),
        ("/no/such/**/*.py", "no file matches this glob"),
        ("~nobody-of-this-name/src", "no such file or folder"),
        ("hub:owner/there-is-no-such-data-set", "of the Hub cannot be opened"),
    ],
)
def test_sources_that_are_not_there(tmp_path, source, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it tries for long
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=message):
        load_corpus(settings(source), tmp_path / "cache", QUIET)


def test_a_column_that_is_not_there(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": "text"}))
    with pytest.raises(SourceError, match=r"no column 'text': choose text_column among \['body'\]"):
        load_corpus(settings(tmp_path / "rows.jsonl"), tmp_path / "cache", QUIET)


def test_broken_jsonl(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{not json\n")
    with pytest.raises(SourceError, match="Left out: 1 not JSON"):
        load_corpus(settings(tmp_path / "rows.jsonl"), tmp_path / "cache", QUIET)


def test_a_broken_row_and_broken_files_are_left_out(tmp_path):
    from datasets import Dataset

    rows = ['{"text": "one"}', "{not json", '{"other": 1}', "[1]", "", '{"text": "\\ud800"}', '{"text": "two"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "b.jsonl").write_text("")
    items = list(read(f"{tmp_path}/*.jsonl", (), "text", 10**6))
    assert [text for _, text, _ in items if text] == ["one", "two"]
    lines = {name.removeprefix(f"{tmp_path}/"): reason for name, text, reason in items if text is None}
    assert lines == {
        "a.jsonl, line 2": "not JSON",
        "a.jsonl, line 3": "not text",
        "a.jsonl, line 4": "not a row with columns",
        "a.jsonl, line 6": "not UTF-8",
        "b.jsonl": "empty",
    }
    Dataset.from_dict({"text": ["three"]}).to_parquet(str(tmp_path / "c.parquet"))
    (tmp_path / "d.parquet").write_bytes(b"")
    (tmp_path / "e.parquet").write_bytes(b"PAR1 and no more")
    items = list(read(f"{tmp_path}/*.parquet", (), "text", 10**6))
    assert [(text, reason) for _, text, reason in items] == [
        ("three", ""),
        (None, "empty"),
        (None, "unreadable as parquet"),
    ]


def test_special_tokens_written_in_a_text_are_text(tmp_path):
    folder = write_sources(tmp_path / "src", 40)
    for i, path in enumerate(folder.rglob("*.py")):
        path.write_text(path.read_text() + f"EOS, BOS, PAD = '<|eos|>', '<|bos|>', '<|pad|>'  # {i}\n")
    corpus = load_corpus(settings(folder), tmp_path / "cache", QUIET)
    ids = np.concatenate([row["input_ids"] for row in corpus.train])
    assert 0 < (ids == corpus.tokenizer.eos_token_id).sum() <= corpus.summary["train"]["documents"]
    assert not (ids == corpus.tokenizer.pad_token_id).any()
    assert text_ids(corpus.tokenizer, "<|eos|>") != [2]
    assert corpus.tokenizer("<|eos|>")["input_ids"] == [1, 2]  # prompts may still use them
    samples = samples_of(settings(folder), corpus.tokenizer, 2000, 8, held_out=False)
    assert not any({0, 2} & set(sample.ids) for sample in samples)


def test_the_digest_is_that_of_the_documents(tmp_path):
    folder = write_sources(tmp_path / "src", 40)
    one = load_corpus(settings(folder), tmp_path / "cache", QUIET)
    other_rows = load_corpus(settings(folder, length=16), tmp_path / "cache", QUIET)
    assert one.summary["digest"] == other_rows.summary["digest"]
    (folder / "package_0" / "module_0.py").write_text("changed = True\n")
    assert load_corpus(settings(folder), tmp_path / "cache", QUIET).summary["digest"] != one.summary["digest"]


def test_the_key_notices_what_links_lead_to_and_the_tokenizer(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "target.py").write_text("x = 1\n")
    (tmp_path / "src" / "link.py").symlink_to(tmp_path / "target.py")
    before = settings(tmp_path / "src").key()
    (tmp_path / "target.py").write_text("x = 100\n")
    assert settings(tmp_path / "src").key() != before
    keys = set()
    for size in (262, 266):
        train_tokenizer(["def f(x):\n\treturn x + 100\n", "for name in range(10)"] * 5, size).save_pretrained(
            tmp_path / "tokenizer"
        )
        keys.add(settings(tmp_path / "src", tokenizer=str(tmp_path / "tokenizer")).key())
    assert len(keys) == 2


def test_a_tokenizer_that_cannot_be_used(tmp_path):
    folder = write_sources(tmp_path / "src", 40)
    with pytest.raises(SourceError, match=r"tokenizer '.*nothing' cannot be loaded .*or leave it out to train one"):
        load_corpus(settings(folder, tokenizer=str(tmp_path / "nothing")), tmp_path / "cache", QUIET)


def test_extensions_without_their_dot():
    assert settings("stdlib", extensions=("py", ".md", "*.txt", "")).extensions == (".py", ".md", ".txt", "")


def test_a_folder_of_tables_names_the_glob(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}')
    with pytest.raises(SourceError, match=r"for the tables in this folder, give a glob as the source: '.*\*\*/\*.jsonl'"):
        load_corpus(settings(tmp_path), tmp_path / "cache", QUIET)


def test_a_folder_of_pictures(tmp_path):
    for i in range(5):
        (tmp_path / f"picture_{i}.png").write_bytes(b"\x89PNG\0")
    with pytest.raises(SourceError, match=r"too little text.*Needed are about 4,096 bytes.*5 not .py.*--extensions"):
        load_corpus(settings(tmp_path), tmp_path / "cache", QUIET)


def test_too_little_text_says_how_much_is_needed(tmp_path):
    (tmp_path / "one.py").write_text("x = 1\n")
    with pytest.raises(SourceError, match="Needed are about"):
        load_corpus(settings(tmp_path), tmp_path / "cache", QUIET)


def test_the_standard_library_is_the_default():
    items = read("stdlib", (".py",), "text", 10**6)
    name, text, _reason = next(item for item in items if item[1] is not None)
    assert name.endswith(".py")
    assert text


def test_pack():
    """Position ids restart with every document and every row; an incomplete last row is left out."""
    documents = [np.arange(10, 13), np.arange(20, 27), np.arange(30, 32)]
    rows = pack(documents, 4)
    assert rows["input_ids"].tolist() == [[10, 11, 12, 20], [21, 22, 23, 24], [25, 26, 30, 31]]
    assert rows["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 0, 1]]
    for nothing in (pack([], 1), pack([np.arange(3)], 4)):
        assert {len(column) for column in nothing.values()} == {0}
    for length, some in ((1, pack([], 1)), (4, rows)):
        assert {name: (column.dtype, column.shape[1]) for name, column in some.items()} == {
            "input_ids": (np.int32, length),
            "position_ids": (np.int32, length),
        }


def test_a_first_token_is_never_a_target():
    rows = pack([np.arange(10, 13), np.arange(20, 27)], 5)
    batch = collate([{name: rows[name][i] for name in rows} for i in range(2)])
    assert {name: column.tolist() for name, column in batch.items()} == {
        "input_ids": [[10, 11, 12, 20, 21], [22, 23, 24, 25, 26]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]],
        "labels": [[-100, 11, 12, -100, 21], [-100, 23, 24, 25, 26]],
    }
    assert {column.dtype for column in batch.values()} == {torch.int64}


def test_tokenizer_round_trip(tmp_path):
    tokenizer = train_tokenizer(["def f(x):\n\treturn x  # é\n"] * 5, 300)
    text = "class Ünïcode:\r\n    '''🙂'''\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer(text)["input_ids"][0] == tokenizer.bos_token_id == 1
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]
    with pytest.raises(ValueError, match="at least 259"):
        train_tokenizer(["x"], 100)
