"""Mixtures: shares by tokens, every document once, the same rows for any number of processes, and a place to go on from."""

import errno
import json
import os
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from parloop.corpus import CorpusSettings, Mixture, Part, StreamLoader, train_tokenizer
from parloop.corpus.sources import read_all
from parloop.corpus.stream import Stream, _held_out, what_was_read
from parloop.errors import CheckpointError, SourceError
from tests.helpers.sources import write_sources

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 7) for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The same documents as files, as lines, as lines of several files, and as a table."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "files").mkdir()
    for i, text in enumerate(TEXTS):
        (folder / "files" / f"{i:02}.py").write_text(text)
    rows = [json.dumps({"text": text}) for text in TEXTS]
    (folder / "one.jsonl").write_text("\n".join(rows))
    (folder / "many").mkdir()
    for n in range(5):
        (folder / "many" / f"{n}.jsonl").write_text("\n".join(rows[n::5]))
    from datasets import Dataset

    Dataset.from_dict({"text": TEXTS}).to_parquet(folder / "table.parquet")
    return folder


def part(source, weight=1.0, share=0.2, **more):
    return Part(CorpusSettings(source=str(source), validation_share=share, **more), weight)


def held_out_of(mixture):
    (one,) = mixture.parts
    return [text for _, text, _ in read_all(one.settings) if text is not None and _held_out(text, one.settings)]


SOURCES = ["files", "one.jsonl", "many/*.jsonl", "table.parquet"]


def texts_given(mixture, tokenizer, stream, rows):
    """Rows of a stream and, from each, which documents."""
    one = Stream(mixture, tokenizer, stream)
    return [one.row() for _ in range(rows)], one


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("streams", [1, 3])
def test_every_document_once_and_none_that_is_held_out(made, tokenizer, source, streams):
    mixture = Mixture([part(made / source)], length=16, streams=streams, shuffle_documents=7, seed=1)
    given = Counter()
    for number in range(streams):
        source = Stream(mixture, tokenizer, number).parts[0]
        while True:
            _, text = source.next()
            if source.epoch == 1:
                break
            given[text] += 1
    held_out = held_out_of(mixture)
    assert set(given) | set(held_out) == set(TEXTS)
    assert not set(given) & set(held_out)
    assert set(given.values()) == {1}
    assert len(held_out) > 3


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("stop", [1, 2, 13, 57])
def test_a_restored_stream_gives_the_very_next_row(made, tokenizer, source, stop):
    parts = [part(made / source), part(made / "files", 0.5)]
    mixture = Mixture(parts, length=24, streams=2, shuffle_documents=9, seed=2)
    for number in range(2):
        whole, _ = texts_given(mixture, tokenizer, number, 90)
        _, stopped = texts_given(mixture, tokenizer, number, stop)
        state = json.loads(json.dumps(stopped.state()))
        again = Stream(mixture, tokenizer, number)
        again.restore(state)
        for expected in whole[stop:]:
            row = again.row()
            assert row["documents"] == expected["documents"]
            assert np.array_equal(row["input_ids"], expected["input_ids"])
            assert np.array_equal(row["position_ids"], expected["position_ids"])
        uninterrupted = Stream(mixture, tokenizer, number)
        for _ in range(90):
            uninterrupted.row()
        assert again.state() == uninterrupted.state()


def test_rows_are_documents_between_their_borders(made, tokenizer):
    mixture = Mixture([part(made / "files")], length=64, streams=1, shuffle_documents=100, seed=0)
    rows, _ = texts_given(mixture, tokenizer, 0, 40)
    ids = np.concatenate([row["input_ids"] for row in rows])
    documents = tokenizer.decode(ids).replace("<|eos|>", "").split("<|bos|>")[1:-1]
    assert len(documents) > 20
    assert set(documents) <= set(TEXTS)
    for row in rows:
        starts = np.flatnonzero(row["position_ids"] == 0)
        assert starts[0] == 0
        assert all(row["input_ids"][s] == tokenizer.bos_token_id for s in starts[1:])


def test_epochs_are_shuffled_anew(made, tokenizer):
    mixture = Mixture([part(made / "files")], length=16, streams=1, shuffle_documents=100, seed=0)
    source = Stream(mixture, tokenizer, 0).parts[0]
    epochs: dict[int, list[str]] = {0: [], 1: [], 2: []}
    while True:
        name, _ = source.next()
        if source.epoch > 2:
            break
        epochs[source.epoch].append(name)
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    other = Stream(Mixture(mixture.parts, 16, 1, 100, seed=9), tokenizer, 0).parts[0]
    assert [other.next()[0] for _ in range(20)] != epochs[0][:20]


def test_shares_are_of_tokens(made, tokenizer):
    """Whatever the documents' lengths: never off by more than one document."""
    parts = [part(made / "files", 3.0), part(made / "one.jsonl", 2.0), part(made / "table.parquet", 1.0)]
    stream = Stream(Mixture(parts, length=16, streams=1, shuffle_documents=10), tokenizer, 0)
    longest = max(len(tokenizer(text)["input_ids"]) for text in TEXTS) + 1
    for _ in range(400):
        stream.row()
        total = sum(stream.tokens)
        for tokens, weight in zip(stream.tokens, (3, 2, 1)):
            assert abs(tokens - total * weight / 6) <= longest
    assert sum(stream.tokens) > 6000


@pytest.mark.parametrize("accumulation", [1, 2])
def test_any_number_of_processes_reads_the_same_rows(made, tokenizer, accumulation):
    mixture = Mixture([part(made / "files"), part(made / "one.jsonl", 2.0)], length=32, streams=4, shuffle_documents=10)
    B, steps = 16, 5

    def rows_of(processes):
        loaders = [StreamLoader(mixture, tokenizer, B, accumulation, i, processes, prefetch=0) for i in range(processes)]
        per_process = [[rows for rows, _ in islice(loader.steps(), steps)] for loader in loaders]
        return [[row["input_ids"].tolist() for rows in step for row in rows] for step in zip(*per_process)]

    alone = rows_of(1)
    assert [len(step) for step in alone] == [B] * steps
    for processes in (2, 4, 8):  # fewer, as many, and more than streams
        assert rows_of(processes) == alone


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (8, 2), (1, 8)])
def test_another_number_of_processes_goes_on(made, tokenizer, tmp_path, before, after, prefetch):
    mixture = Mixture([part(made / "files"), part(made / "one.jsonl", 2.0)], length=32, streams=4, shuffle_documents=10)
    B, steps = 8, 6

    def read(processes, folder, first, count):
        """Batches of some steps, all processes' rows in order, and save the place."""
        taken = []
        for i in range(processes):
            loader = StreamLoader(mixture, tokenizer, B, 1, i, processes, prefetch=prefetch)
            if first:
                loader.restore(tmp_path / "place")
            taken.append([batch["input_ids"].tolist() for batch in islice(loader, count)])
            loader.save(folder)
        return [[row for rows in step for row in rows] for step in zip(*taken)]

    whole = read(1, tmp_path / "whole", 0, steps)
    assert read(before, tmp_path / "place", 0, 2) == whole[:2]
    assert read(after, tmp_path / "end", 2, steps - 2) == whole[2:]
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == [f"stream-000{n}.json" for n in range(4)]
    for name in files:
        assert json.loads((tmp_path / "end" / name).read_text()) == json.loads((tmp_path / "whole" / name).read_text())


def test_bad_rows_are_counted_once(tokenizer, tmp_path):
    lines = [json.dumps({"text": text}) for text in TEXTS[:30]]
    lines[3:3] = ["{", "[1]", json.dumps({"other": "x"}), json.dumps({"text": ""}), json.dumps({"text": 5})]
    lines[20:20] = [b"\xff\xfe".decode("latin1"), json.dumps({"text": "y" * 5000})]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    mixture = Mixture(
        [part(tmp_path / "bad.jsonl", share=0.01, max_file_bytes=1000)], length=16, streams=2, shuffle_documents=4
    )
    loader = StreamLoader(mixture, tokenizer, 2, prefetch=0)
    steps = loader.steps()
    for _ in range(60):
        _, loader.states = next(steps)
        loader.save(tmp_path / "place")
        read = what_was_read(tmp_path / "place")[0]
        if read["epochs"] == 2:
            break
        # A restored loader counts nothing twice.
        again = StreamLoader(mixture, tokenizer, 2, prefetch=0)
        again.restore(tmp_path / "place")
        _, states = next(again.steps())
        for number, state in states.items():
            one = Stream(mixture, tokenizer, number)
            one.restore(loader.states[number])
            one.row()
            assert state == one.state()
    once = {
        "not JSON": 2, "not a row with columns": 1, "no column 'text'": 1, "empty": 1, "not text": 1, "over 1,000 bytes": 1,
    }  # fmt: skip
    for reason, count in once.items():
        assert count <= read["left_out"][reason] <= 2 * count
    assert read["documents"] > 25


def test_a_torn_table_is_counted_and_the_others_are_read(made, tokenizer, tmp_path):
    (tmp_path / "a-good.parquet").write_bytes((made / "table.parquet").read_bytes())
    (tmp_path / "b-torn.parquet").write_bytes((made / "table.parquet").read_bytes()[:200])
    source = Stream(Mixture([part(tmp_path / "*.parquet")], 32, 1, 10), tokenizer, 0).parts[0]
    names = []
    while source.epoch == 0:
        names.append(source.next()[0])
    assert len(names) > 40
    assert all("a-good" in name for name in names)
    assert source.left_out == {"unreadable as parquet from some row on": 1}


def test_what_cannot_be(made, tokenizer, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    (few / "a.py").write_text(TEXTS[1])
    mixture = Mixture([part(few, share=0.001)], length=16, streams=4, shuffle_documents=10)
    with pytest.raises(SourceError, match=r"no document for stream 2 of 4: lower data_streams"):
        Stream(mixture, tokenizer, 1).row()
    with pytest.raises(SourceError, match="no document for stream"):
        list(islice(StreamLoader(mixture, tokenizer, 4, prefetch=2), 1))  # a worker process's error, as it is
    with pytest.raises(SourceError, match="data_streams=4 and 6 processes: one must be a multiple"):
        StreamLoader(mixture, tokenizer, 12, processes=6)
    with pytest.raises(SourceError, match="there is no column 'text': choose text_column among"):
        from datasets import Dataset

        Dataset.from_dict({"content": TEXTS}).to_parquet(tmp_path / "c.parquet")
        Stream(Mixture([part(tmp_path / "c.parquet")], 16, 1, 10), tokenizer, 0).row()
    loader = StreamLoader(Mixture([part(made / "files")], 16, 2, 10), tokenizer, 4)
    with pytest.raises(CheckpointError, match="cursors of 0 streams, but data_streams=2"):
        loader.restore(tmp_path)


def test_changed_files_change_the_digest(tmp_path):
    write_sources(tmp_path / "s", 4)
    mixture = Mixture([part(tmp_path / "s")], 16, 1, 10)
    before = mixture.digest()
    assert mixture.digest() == before
    next((tmp_path / "s").rglob("*.py")).write_text("x = 1\n")
    assert mixture.digest() != before


def test_the_library_streams_of_the_hub(made, tokenizer, monkeypatch):
    """A data set of the Hub is the same kind of object as a local table's; only its opening is not tested."""
    from datasets import load_dataset

    from parloop.corpus import sources

    table = str(made / "table.parquet")
    monkeypatch.setattr(
        sources, "open_hub", lambda name: load_dataset("parquet", data_files=table, split="train", streaming=True)
    )
    mixture = Mixture([part("hub:some/code")], length=24, streams=3, shuffle_documents=9)
    for number in range(3):
        whole, _ = texts_given(mixture, tokenizer, number, 40)
        _, stopped = texts_given(mixture, tokenizer, number, 11)
        again = Stream(mixture, tokenizer, number)
        again.restore(json.loads(json.dumps(stopped.state())))
        assert [again.row()["documents"] for _ in range(29)] == [row["documents"] for row in whole[11:]]
    texts = set(held_out_of(mixture))
    assert 3 < len(texts) < 30


def test_samples_and_validation_are_mixed_as_the_weights_say(made, tokenizer, tmp_path):
    """A tokenizer's texts by bytes, validation documents by tokens."""
    rows = [json.dumps({"text": f"words {i} " * 9}) for i in range(300)]
    (tmp_path / "words.jsonl").write_text("\n".join(rows))
    parts = [part(tmp_path / "words.jsonl", 3.0, share=0.5), part(made / "files", 1.0, share=0.5)]
    mixture = Mixture(parts, length=32, streams=1, shuffle_documents=10)
    texts = list(mixture.sample_texts(4000))
    words = sum(len(text) for text in texts if text.startswith("words"))
    assert words == pytest.approx(3000, abs=300)
    assert sum(map(len, texts)) == pytest.approx(4000, abs=300)
    documents = mixture.validation_documents(tokenizer, 400)
    words = sum(len(ids) for ids in documents if "words" in tokenizer.decode(ids))
    assert (words, sum(map(len, documents))) == (300, 400)
    # A source that is read to its end gives no more, and the others go on.
    assert len(list(mixture.sample_texts(10**9))) == sum(
        not _held_out(json.loads(row)["text"], parts[0].settings) for row in rows
    ) + sum(not _held_out(text, parts[1].settings) for text in TEXTS)


def test_tables_are_dealt_by_file_only_if_shares_come_out_about_as_large(made, tokenizer, tmp_path):
    """With three files for two streams, one would get twice as much, so rows are assigned; with two or sixteen files, files are."""
    for count, by_file in ((2, True), (3, False), (16, True), (15, False)):
        folder = tmp_path / str(count)
        folder.mkdir()
        for i in range(count):
            rows = [json.dumps({"text": f"{count} {i} {n}"}) for n in range(6)]
            (folder / f"{i:02}.jsonl").write_text("\n".join(rows))
        mixture = Mixture([part(folder / "*.jsonl", share=1e-9)], 32, 2, 10)
        given = []
        for stream in range(2):
            source, names = Stream(mixture, tokenizer, stream).parts[0], []
            while True:
                name, _ = source.next()
                if source.epoch:
                    break
                names.append(name)
            given.append(names)
        assert sorted(given[0] + given[1]) == sorted(set(given[0] + given[1]))
        assert len(given[0]) == len(given[1]) == 3 * count
        files = [{name.split(",")[0] for name in names} for names in given]
        assert files[0].isdisjoint(files[1]) == by_file


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EIO, "Once it is readable again, the same command continues"),
        (errno.EMFILE, "raise the limit .*, or lower data_streams"),
    ],
)
def test_a_machine_that_fails_ends_the_reading(made, tokenizer, monkeypatch, code, message):
    """And is not counted as a bad file, which later runs would read."""

    def fails(self, *_):
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr("pathlib.Path.read_bytes", fails)
    with pytest.raises(SourceError, match=message):
        Stream(Mixture([part(made / "files")], 32, 1, 10), tokenizer, 0).row()


def test_a_file_that_may_not_be_read_is_left_out(made, tokenizer, monkeypatch):
    read = Path.read_bytes

    def denied(self):
        if self.name.endswith("1.py"):
            raise PermissionError(errno.EACCES, "denied", str(self))
        return read(self)

    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    source = Stream(Mixture([part(made / "files")], 32, 1, 10), tokenizer, 0).parts[0]
    while not source.epoch:
        source.next()
    assert source.left_out["unreadable"] == len(list((made / "files").rglob("*1.py"))) > 0


def test_what_cannot_be_a_table(made, tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(SourceError, match=r"has tables and other files \(a.jsonl, b.txt\): name them separately"):
        Stream(Mixture([part(tmp_path / "*", share=1e-9)], 16, 1, 10), tokenizer, 0).row()
    (tmp_path / "late.jsonl").write_text("\n".join(['{"content": "x"}'] * 1500 + ['{"text": "x"}']))
    with pytest.raises(SourceError, match=r"there is no column 'text': choose text_column among .'content'"):
        Stream(Mixture([part(tmp_path / "late.jsonl", share=1e-9)], 16, 1, 10), tokenizer, 0).row()


def test_places_are_small_and_handed_on_as_they_are(tokenizer, tmp_path, monkeypatch):
    """They come with every step, so what is left of a long document must not be in them, and nothing may walk through them."""
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps({"text": f"x{i} = {i}\n" * 3000}) for i in range(4)))
    mixture = Mixture([part(tmp_path / "long.jsonl", share=1e-9)], 32, 1, 10)
    one, two = Stream(mixture, tokenizer, 0), Stream(mixture, tokenizer, 0)
    for _ in range(5):
        one.row()
    assert len(one.rest) > 5000
    assert len(json.dumps(one.state())) < 1000
    two.restore(json.loads(json.dumps(one.state())))
    for _ in range(1000):
        a, b = one.row(), two.row()
        assert np.array_equal(a["input_ids"], b["input_ids"])
        assert a["documents"] == b["documents"]
    monkeypatch.setattr("torch.utils.data._utils.collate.default_convert", None)
    list(islice(StreamLoader(mixture, tokenizer, 1, prefetch=0), 2))
