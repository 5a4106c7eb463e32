"""The client that asks for benchmarks whose own scripts cannot: what it asks, what it keeps, and what it takes from an answer."""

import gzip
import json

import pytest
from openai import BadRequestError

from parloop.evaluate.benchmark import read_lines
from parloop.evaluate.benchmarks import livecodebench, multipl_e
from parloop.evaluate.client import ask_all, code_of
from tests.helpers.scripted import Scripted

SETTINGS = {"temperature": 0.5, "top_p": 0.9, "max_tokens": None, "samples": 2, "workers": 1}
CODE = "Here:\n```python\nprint(1)\n```\nDone."


def place(folder, *names):
    tasks = [{"id": name, "messages": [{"role": "user", "content": name}]} for name in names]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return folder / "tasks.jsonl", folder / "answers.jsonl"


def test_every_sample_is_asked_once(tmp_path):
    """With its own seed; what is there, but for a torn line, is not asked again."""
    tasks, answers = place(tmp_path, "a", "b")
    answers.write_text('{"id": "a", "sample": 1, "text": "old", "finish_reason": "stop"}\n{"id": "b", "sam\n')
    with Scripted(lambda request: {"text": CODE}) as server:
        ask_all(tasks, answers, server.url, "toy@2", SETTINGS)
        asked = [(request["messages"][0]["content"], request["seed"]) for request in server.requests]
        ask_all(tasks, answers, server.url, "toy@2", SETTINGS)
    assert asked == [("a", 0), ("b", 0), ("b", 1)]
    assert len(server.requests) == 3
    assert {name: server.requests[0].get(name) for name in ("model", "temperature", "top_p", "max_tokens")} == {
        "model": "toy@2", "temperature": 0.5, "top_p": 0.9, "max_tokens": None,
    }  # fmt: skip
    assert sorted((row["id"], row["sample"], row["text"]) for row in read_lines(answers)) == [
        ("a", 0, CODE), ("a", 1, "old"), ("b", 0, CODE), ("b", 1, CODE),
    ]  # fmt: skip


def test_a_refusal_ends_it_and_keeps_what_was_answered(tmp_path):
    tasks, answers = place(tmp_path, "a", "b", "c")
    with (
        Scripted(lambda request: {"status": 400} if request["messages"][0]["content"] == "b" else {"text": "yes"}) as server,
        pytest.raises(BadRequestError),
    ):
        ask_all(tasks, answers, server.url, "toy@2", SETTINGS | {"samples": 1})
    assert [row["id"] for row in read_lines(answers)] == ["a"]
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (CODE, "print(1)"),
        ("```\na\n```\nor better\n```python\nb\nc\n```", "b\nc"),
        ("print(1)", ""),
        ("```python\nprint(1)", ""),
        ("", ""),
    ],
)
def test_the_last_block_is_the_program(text, code):
    assert code_of(text) == code


def test_answers_become_livecodebenchs_programs(tmp_path):
    """By problem and sample, whatever order they came in; too few are refused."""
    _, answers = place(tmp_path, "a", "b")
    rows = [("b", 1, "4"), ("a", 1, "2"), ("b", 0, "3"), ("a", 0, "1")]
    answers.write_text(
        "".join(json.dumps({"id": i, "sample": n, "text": f"```\n{code}\n```"}) + "\n" for i, n, code in rows)
    )
    livecodebench.collect(tmp_path, 2)
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"question_id": "a", "code_list": ["1", "2"]}, {"question_id": "b", "code_list": ["3", "4"]},
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="2 problems have fewer than 3 answers, for instance a"):
        livecodebench.collect(tmp_path, 3)


def test_answers_become_multipl_es_programs(tmp_path):
    problem = {"id": "js/add", "language": "js", "name": "add", "prompt": "x", "tests": "t()"}
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem) + "\n")
    (tmp_path / "answers.jsonl").write_text(json.dumps({"id": "js/add", "sample": 0, "text": CODE}) + "\n")
    multipl_e.collect(tmp_path)
    with gzip.open(tmp_path / "programs/js/add.json.gz", "rt") as file:
        assert json.load(file) == {
            "name": "add", "language": "js", "prompt": "", "tests": "t()", "completions": ["print(1)"], "stop_tokens": [],
        }  # fmt: skip
