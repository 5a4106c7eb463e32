"""Tasks as sources: what they ask, that training and held-out documents share none, and how tokenizers spell them."""

import hashlib
import itertools
import json
import random
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from parloop.corpus import CorpusSettings, train_tokenizer
from parloop.corpus.packing import collate
from parloop.corpus.samples import samples_of
from parloop.corpus.tasks import HELD_OUT, TASKS, TRAIN, Encoder, TaskRows, is_task, task_of
from parloop.corpus.tasks.encode import IGNORED
from parloop.corpus.tasks.interpreter import ProgramError, run_program
from parloop.corpus.tasks.programs import LEVELS, MAX_ASSIGNED, draw_program, measures, symbols_of
from parloop.corpus.tasks.task import EOS_ID, NO_TARGET
from parloop.errors import SourceError

SOURCES = ("task:parity", "task:s5", "task:s5,form=all", "task:hops", "task:hops,trace", "task:run", "task:run,trace")


@pytest.fixture(scope="module", params=SOURCES)
def task(request):
    return task_of(request.param)


def content(task, document) -> str:
    """Return the part of a document's text that decides its split."""
    symbols = task.symbols_of(document)
    match task.name:
        case "hops":
            return " ".join(sorted(symbols[: task.facts]))
        case "run":
            return task.text(document).partition("print")[0]
        case _:
            return " ".join(symbols[: task.length])


def answers(task, document) -> list[tuple[str, int]]:
    """The answers of a document and their groups."""
    symbols = (None, None, "<eos>", *task.symbols)
    return [(symbols[t], int(g)) for t, g in zip(document.targets, document.groups) if g > 0]


# The source


def test_a_source_names_a_task_and_its_options():
    assert is_task("task:s5,form=all")
    assert not is_task("tasks/")
    task = task_of("task:s5,form=all,length=24")
    assert (task.form, task.length) == ("all", 24)
    assert task_of(task.source) == task
    assert (
        task_of("task:hops,trace")
        == task_of("task:hops,trace=true")
        != task_of("task:hops,trace=false")
        == task_of("task:hops")
    )
    for name in TASKS:
        assert task_of(f"task:{name}").source == f"task:{name}"


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("task:sudoku", ["sudoku", "task:parity, task:s5, task:hops, task:run"]),
        ("task:", ["''", "task:parity"]),
        ("task:s5,depth=3", ["depth", "length", "form"]),
        ("task:parity,length=many", ["length", "'many'", "whole number"]),
        ("task:parity,length=4", ["length=4", "from 16 to 4096"]),
        ("task:s5,form=none", ["'none'", "swaps, all"]),
        ("task:hops,facts=11,hops=6", ["hops=6", "half of facts=11"]),
        ("task:hops,facts=27", ["facts=27", "from 4 to 26"]),
        ("task:hops,trace=maybe", ["'maybe'", "true or false"]),
        ("task:run,levels=7", ["levels=7", "from 1 to 6"]),
    ],
)
def test_what_is_wrong_with_a_source_is_named(source, named):
    with pytest.raises(SourceError) as error:
        task_of(source)
    for part in named:
        assert part in str(error.value)


# Documents


def test_documents_depend_on_number_split_and_seed_alone(task):
    one = task_of(task.source)
    for number, split, seed in itertools.product((0, 7), (TRAIN, HELD_OUT), (0, 1)):
        a, b = task.document(number, split, seed), one.document(number, split, seed)
        assert all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("ids", "targets", "groups"))
    texts = {
        task.text(task.document(number, split, seed))
        for number, split, seed in itertools.product((0, 7), (TRAIN, HELD_OUT), (0, 1))
    }
    assert len(texts) == 8


def test_documents_are_those_of_other_machines_and_versions(task):
    digest = hashlib.sha256("\n".join(task.text(task.document(number)) for number in range(20)).encode()).hexdigest()[:8]
    assert digest == DIGESTS[task.source]


DIGESTS = {
    "task:parity": "90cee89b",
    "task:s5": "c8c2c6eb",
    "task:s5,form=all": "6736c625",
    "task:hops": "4ed9e924",
    "task:hops,trace": "f1b9311a",
    "task:run": "6d0c0f17",
    "task:run,trace": "b2263d16",
}


@pytest.mark.parametrize(
    ("source", "contents"),
    [
        ("task:parity,length=16", 2**16),
        ("task:s5,length=8", 4**8),
        ("task:hops,facts=8,hops=4", 7 * 6 * 5 * 4 * 3 * 2),
        ("task:hops,facts=8,hops=4,trace", 7 * 6 * 5 * 4 * 3 * 2),
        ("task:run,levels=1", 3500),  # about
    ],
)
def test_training_and_held_out_documents_share_none(source, contents):
    task = task_of(source)
    trained, held_out = ({content(task, task.document(n, split)) for n in range(1200)} for split in (TRAIN, HELD_OUT))
    assert len(trained) * len(held_out) / contents > 15  # as many would be in both if they were drawn alike
    assert not trained & held_out


def test_a_task_without_enough_different_documents_is_refused(monkeypatch):
    task = task_of("task:parity")
    monkeypatch.setattr(type(task), "draw", lambda self, rng, split, group: ("always the same", [0]))
    with pytest.raises(SourceError, match="too few different documents"):
        for split in (TRAIN, HELD_OUT):
            task.document(0, split)


def test_parity_is_that_of_the_bits_so_far():
    task = task_of("task:parity,length=16")
    for split, length in ((TRAIN, 16), (HELD_OUT, 128)):
        document = task.document(3, split)
        bits = [int(symbol) for symbol in task.symbols_of(document)]
        assert len(bits) == length
        assert 0 < sum(bits) < length
        assert [answer for answer, _ in answers(task, document)] == [str(sum(bits[: n + 1]) % 2) for n in range(length)]
        assert [group for _, group in answers(task, document)] == [
            next(g for g in task.groups if n < g) for n in range(length)
        ]
    assert task.groups == (4, 8, 12, 16, 32, 64, 128)


@pytest.mark.parametrize("source", ["task:s5,length=8", "task:s5,form=all,length=8"])
def test_s5_moves_five_items(source):
    task = task_of(source)
    document = task.document(5, HELD_OUT)
    items, told = "12345", task.symbols_of(document)
    assert len(told) == 64
    for symbol, (answer, _) in zip(told, answers(task, document)):
        items = "".join(items[int(place) - 1] for place in symbol)
        assert answer == items
    if task.form == "swaps":
        assert set(told) == {"21345", "13245", "12435", "12354"}
    else:
        assert len(set(told)) > 40


def facts_of(task, symbols) -> dict[str, str]:
    return {symbol[0]: symbol[1] for symbol in symbols[: task.facts]}


def test_hops_are_look_ups_in_the_table():
    task = task_of("task:hops")
    orders, starts = set(), []
    for number in range(50):
        document = task.document(number)
        symbols = task.symbols_of(document)
        facts = facts_of(task, symbols)
        assert len(facts) == 12 == len(set(facts.values()))
        asked = iter(answers(task, document))
        for at in range(12, len(symbols), 6):
            start, *dots = symbols[at : at + 6]
            assert dots == ["."] * 5
            met = start
            for count in range(1, 7):
                met = facts[met]
                assert met != start
                assert next(asked) == (met, count)
            starts.append(start)
        assert next(asked, None) is None
        orders.add(tuple(symbols[:12]))
    assert len(orders) == 50
    assert len(starts) == 200
    assert len(set(starts)) == 12


def test_traced_hops_write_what_is_met():
    task = task_of("task:hops,trace")
    for number in range(10):
        document = task.document(number, HELD_OUT, group=4)
        symbols = task.symbols_of(document)
        facts = facts_of(task, symbols)
        assert symbols[13:17] == [".", ".", ".", ":"]
        assert document.prompt == 17
        met = symbols[12]
        for symbol in symbols[17:]:
            met = facts[met]
            assert symbol == met
        assert answers(task, document) == [(met, 4)]
        assert list(document.targets[16:]) == [*document.ids[17:], EOS_ID]
    counts = [group for number in range(20) for _, group in answers(task, task.document(number))]
    assert [counts.count(count) for count in range(1, 7)] == [20] * 6


# Programs


def run_for_real(programs: list[str]) -> list[list[str]]:
    """Return what Python prints, in a separate process."""
    script = (
        "import contextlib, io, json, sys\n"
        "for program in json.load(sys.stdin):\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out):\n"
        "        try:\n"
        "            exec(program, {})\n"
        "        except Exception:\n"
        "            print('error')\n"
        "    print(json.dumps(out.getvalue().split()))\n"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", script],
        input=json.dumps(programs),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_programs_print_what_python_prints():
    task = task_of("task:run")
    documents = [task.document(number, split) for number in range(300) for split in (TRAIN, HELD_OUT)]
    printed = run_for_real([task.text(document) for document in documents])
    assert [[answer for answer, _ in answers(task, document)] for document in documents] == printed
    assert {int(number) for numbers in printed for number in numbers} == set(range(10))


HAND_WRITTEN = [
    "s = [1, 2, 3]\nt = s\nt[1] = 9\nprint(s[1])",
    "s = [1, 2, 3]\nfor a in s:\n    s[2] = 7\n    print(a)",
    "a = 3\nfor a in range(2):\n    print(a)\nprint(a)",
    "a = 3\nfor a in range(0):\n    print(a)\nprint(a)",
    "print(0 - 7 % 10)\nprint((0 - 7) % 10)\nprint((2 - 9) * 3 % 10)",
    "s = [4, 5]\nprint(s[0 - 1])\nprint(len(s))",
    "def f(x):\n    return (x + a) % 10\na = 8\nx = 1\nprint(f(5))\nprint(x)",
    "def f(x, y):\n    return x - y\ndef g(y):\n    return f(y, 1) * 2\nprint(g(6))",
    "a = 1\nif a < 2:\n    if a > 1:\n        a = 5\n    else:\n        a = 6\nprint(a)",
    "a = b\nprint(a)",
    "s = [1]\nprint(s[1])",
    "s = [1]\ns[3] = 2",
    "print(5 % 0)",
    "def f(x):\n    return x\nprint(f(1, 2))",
    "a = 1\nprint(a[0])",
]


def test_the_interpreter_does_what_python_does_with_programs_written_by_hand():
    ours = []
    for program in HAND_WRITTEN:
        try:
            ours.append([str(number) for number in run_program(program).printed])
        except ProgramError:
            ours.append(["error"])
    assert ours == run_for_real(HAND_WRITTEN)
    assert ours.count(["error"]) == 6


@pytest.mark.parametrize(
    "program",
    [
        "import os",
        "print(open('x'))",
        "print(__import__('os').system('true'))",
        "a = 1\nprint(a.__class__)",
        "print('text')",
        "print(True)",
        "print(2 ** 9)",
        "a = [0] * 9",
        "a = [[1]]",
        "a = [x for x in range(3)]",
        "a = (lambda x: x)(1)",
        "a += 1",
        "a = b = 1",
        "print(1, 2)",
        "print(1, sep='')",
        "len = 3",
        "def len(x):\n    return x",
        "def f(x=1):\n    return x",
        "def f(x: print(1)):\n    return x",
        "def f(x, x):\n    return x",
        "def f(*x):\n    return x",
        "@f\ndef f(x):\n    return x",
        "def f(x):\n    a = x\n    return a",
        "def f(x):\n    return x\nf = 3",
        "a = 1\ndef a(x):\n    return x",
        "class A: pass",
        "while 1 < 2:\n    a = 1",
        "if 1 < 2 < 3:\n    a = 1",
        "a = 1 if 1 < 2 else 3",
        "for i in range(2):\n    a = i\nelse:\n    a = 3",
        "a =",
        "(" * 1000,
        "a = " + "-" * 3000 + "1",
        "a = " + "(" * 150 + "1" + ")" * 150 + " + x" * 900,
        "a = 1" + "0" * 3990,
        "a = 1\n" * 1000,
    ],
)
def test_the_interpreter_refuses_what_it_does_not_know(program):
    with pytest.raises(ProgramError):
        run_program(program)


@pytest.mark.parametrize(
    "program",
    [
        "for i in range(1000000000):\n    a = i",
        "a = 0\nfor i in range(80):\n    for j in range(80):\n        a = (a + j) % 10",
        "def f(x):\n    return f(x)\nprint(f(1))",
        "def f(x):\n    return f(x) + f(x)\nprint(f(1))",
        "a = 9\nfor i in range(100):\n    a = a * a",
        "s = [" + "1, " * 200 + "1]",
    ],
)
def test_programs_that_take_long_or_grow_are_stopped(program):
    with pytest.raises(ProgramError):
        run_program(program)


def test_steps_are_limited_where_it_is_said():
    program = "a = 1\nb = (a + 2) % 10\nprint(b)\n"
    steps = run_program(program).steps
    assert run_program(program, max_steps=steps).printed == [3]
    with pytest.raises(ProgramError, match="steps"):
        run_program(program, max_steps=steps - 1)


@pytest.mark.parametrize("level", LEVELS)
def test_levels_are_as_difficult_as_they_say(level):
    programs = [draw_program(random.Random(number), LEVELS[level]) for number in range(100)]
    found = [measures(program) for program, _, _ in programs]
    returns = 1 if "function" in LEVELS[level].parts else 0
    assert {measure["statements"] - returns for measure in found} == {LEVELS[level].statements - returns}
    assert {measure["nesting"] for measure in found} == {LEVELS[level].nesting}
    assert max(measure["assignments"] for measure in found) <= MAX_ASSIGNED
    symbols = {symbol for program, _, _ in programs for symbol in symbols_of(program)}
    for part, symbol in {"list": "[", "if": "if", "for": "for", "function": "def"}.items():
        assert (symbol in symbols) == (part in LEVELS[level].parts)


def test_levels_come_equally_often_in_training():
    task = task_of("task:run,levels=3")
    levels = [int(task.document(number).groups.max()) for number in range(600)]
    assert all(150 < levels.count(level) < 250 for level in (1, 2, 3))


def test_traced_programs_write_every_assignment_and_then_the_answer():
    task, plain = task_of("task:run,trace"), task_of("task:run")
    for number in range(30):
        document, same = task.document(number, HELD_OUT, group=5), plain.document(number, HELD_OUT, group=5)
        symbols = task.symbols_of(document)
        assert plain.symbols_of(same) == symbols[: document.prompt]
        assert symbols[document.prompt - 1] == "#"
        assert answers(plain, same) == answers(task, document) == [(symbols[-1], 5)]
        assert symbols[-2] == "->"
        assert list(document.targets[document.prompt - 1 :]) == [*document.ids[document.prompt :], EOS_ID]
        steps = run_program(task.text(same)).assigned
        written = [[name, *(value if isinstance(value, list) else [value])] for name, value in steps]
        assert symbols[document.prompt : -2] == [str(symbol) for step in written for symbol in step]


# Chance


@pytest.mark.parametrize("source", ["task:parity", "task:s5", "task:s5,form=all", "task:run"])
def test_chance_is_what_the_best_constant_answer_gets(source):
    task = task_of(source)
    for group in task.groups:
        documents = [
            task.document(number, HELD_OUT, group=None if task.asks_every_group else group) for number in range(250)
        ]
        asked = np.stack([document.targets[document.groups == group] for document in documents])  # [documents, answers]
        best = [np.unique(column, return_counts=True)[1].max() / len(column) for column in asked.T]
        # The most frequent one of few draws is more frequent than it is in all.
        assert task.chance(group) - 0.02 < np.mean(best) < task.chance(group) + 0.06


def test_the_answers_of_hops_are_all_entities_but_the_start_alike():
    task = task_of("task:hops")
    counts = np.zeros((6, 12))
    for number in range(300):
        for answer, group in answers(task, task.document(number, HELD_OUT)):
            counts[group - 1, "abcdefghijkl".index(answer)] += 1
    assert np.abs(counts / counts.sum(1, keepdims=True) - 1 / 12).max() < 0.03
    assert task.chance(3) == 1 / 11


# Tokenizers


def test_the_own_tokenizer_has_a_token_for_each_symbol(task):
    tokenizer = task.tokenizer()
    assert len(tokenizer) == 3 + len(task.symbols)
    for number in range(20):
        document = task.document(number)
        text = task.text(document)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == list(document.ids)
        assert tokenizer.decode(document.ids) == text


def test_the_own_tokenizer_survives_saving(task, tmp_path):
    task.tokenizer().save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    document = task.document(0)
    assert Encoder(task, tokenizer).is_own
    assert tokenizer.decode(document.ids) == task.text(document)


def test_labels_stand_after_what_they_answer(task):
    document = task.document(1)
    encoded = Encoder(task, task.tokenizer())(document)
    assert list(encoded.input_ids) == [1, *document.ids, 2]
    assert list(encoded.labels[:2]) == [IGNORED, IGNORED]  # nothing is asked at <bos>, before a symbol is read
    asked = document.targets != NO_TARGET
    assert list(encoded.labels[2:]) == list(np.where(asked, document.targets, IGNORED))
    assert list(encoded.groups[2:]) == list(document.groups)


@pytest.fixture(scope="module")
def bpe():
    """A byte-level tokenizer as text is trained with; it has no tokens of several symbols."""
    return train_tokenizer(["0 1 1 0 " + " ".join("abcdefghijkl.:")] * 3, 300)


@pytest.mark.parametrize("source", ["task:parity", "task:hops", "task:hops,trace", "task:run", "task:run,trace"])
def test_a_given_tokenizer_spells_a_task(source, bpe):
    task = task_of(source)
    own, given = Encoder(task, task.tokenizer()), Encoder(task, bpe)
    assert not given.is_own
    for number in range(10):
        document = task.document(number)
        a, b = own(document), given(document)
        text = task.text(document)
        assert bpe.decode(b.input_ids[1:-1]) == text
        said = [symbol for symbol, _ in answers(task, document)]
        assert [bpe.decode([label]).strip() for label in b.labels[b.groups > 0]] == said
        assert list(b.groups[b.groups > 0]) == list(a.groups[a.groups > 0])
        # What is read before each answer ends with the same text.
        for i, j in zip(np.flatnonzero(a.groups), np.flatnonzero(b.groups)):
            before = bpe.decode(b.input_ids[1:j]).rstrip()
            assert before == own.tokenizer.decode(a.input_ids[1:i]).rstrip()
        if task.is_written:
            assert (
                bpe.decode(b.input_ids[: b.prompt], skip_special_tokens=True)
                == text[: len(own.tokenizer.decode(a.input_ids[1 : a.prompt]))]
            )


@pytest.mark.parametrize(
    ("source", "text", "named"),
    [
        ("task:s5,form=all", "nothing of the kind " * 50, ["takes", "tokens for the answer"]),
        ("task:parity", " ".join("01" * 50), ["joins"]),
    ],
)
def test_a_tokenizer_that_cannot_spell_a_task_is_refused(source, text, named, bpe):
    task = task_of(source)
    tokenizer = bpe
    if named == ["joins"]:
        whole = Tokenizer(
            models.WordLevel({"<u>": 0, "<b>": 1, "<e>": 2, "0 1": 3, "1 0": 4, "0 0": 5, "1 1": 6, "0": 7, "1": 8}, "<u>")
        )
        whole.pre_tokenizer = pre_tokenizers.Split(Regex(r"[01] [01]|[01]"), "removed", invert=True)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<u>", bos_token="<b>", eos_token="<e>")
    with pytest.raises(SourceError) as error:
        Encoder(task, tokenizer)(task.document(0))
    for part in (*named, source, "leave the tokenizer out"):
        assert part in str(error.value)


def test_a_tokenizer_that_does_not_know_a_symbol_is_refused():
    task = task_of("task:hops")
    with pytest.raises(SourceError, match="does not know a symbol"):
        Encoder(task, task_of("task:parity").tokenizer())(task.document(0))


# Rows


def documents_in(row) -> list[tuple[int, int]]:
    """Return where the pieces of a row begin and end, padding included."""
    starts = np.flatnonzero(row["position_ids"] == 0)
    return list(zip(starts, [*starts[1:], len(row["position_ids"])]))


def test_rows_hold_whole_documents_and_padding(task):
    length, tokenizer = 192, task.tokenizer()
    encode, there = Encoder(task, tokenizer), TaskRows(task, tokenizer, length, 4, seed=3)
    assert len(there) == 4
    for i, row in enumerate(there):
        assert row["input_ids"].shape == row["labels"].shape == row["position_ids"].shape == (length,)
        pieces = documents_in(row)
        padded = row["input_ids"][pieces[-1][0]] == 0
        whole = pieces[: len(pieces) - padded]
        assert whole
        for k, (begin, end) in enumerate(whole):
            document = encode(task.document(i * length + k, seed=3))
            assert np.array_equal(row["input_ids"][begin:end], document.input_ids)
            assert np.array_equal(row["labels"][begin:end], document.labels)
            assert np.array_equal(row["position_ids"][begin:end], np.arange(end - begin))
        if padded:
            begin, end = pieces[-1]
            assert set(row["input_ids"][begin:end]) == {0}
            assert set(row["labels"][begin:end]) == {IGNORED}
            assert end - begin < len(encode(task.document(i * length + len(whole), seed=3)).input_ids)


def test_rows_share_no_document_and_do_not_depend_on_what_was_asked_before(task):
    there = TaskRows(task, task.tokenizer(), 192, 50)
    last = there[49]
    found = [row["input_ids"][begin:end].tobytes() for row in map(there.__getitem__, range(50)) for begin, end in documents_in(row)
             if row["input_ids"][begin]]  # fmt: skip
    assert len(set(found)) == len(found) > 50
    again = TaskRows(task, task.tokenizer(), 192, 50)[49]
    assert all(np.array_equal(again[name], last[name]) for name in last)


@pytest.mark.parametrize(("source", "length", "tokens"), [("task:parity", 33, 34), ("task:run", 120, None)])
def test_a_document_longer_than_a_row_is_refused_before_training_begins(source, length, tokens):
    task = task_of(source)
    with pytest.raises(SourceError, match=f"has {tokens or '1[0-9][0-9]'} tokens, and a row length={length}: raise length"):
        TaskRows(task, task.tokenizer(), length, 10)


def test_labels_of_rows_reach_the_batch():
    task = task_of("task:hops")
    row = TaskRows(task, task.tokenizer(), 64, 1)[0]
    batch = collate([row, row])
    assert batch["labels"].tolist() == [row["labels"].tolist()] * 2


def test_samples_of_a_task_are_held_out_documents():
    task = task_of("task:hops")
    found = samples_of(CorpusSettings(source="task:hops"), task.tokenizer(), 20, 5, held_out=False)
    assert [sample.ids for sample in found] == [[1, *task.document(number, HELD_OUT).ids[:19]] for number in range(5)]
    assert found[2].name == "task:hops 2 [0:20]"
