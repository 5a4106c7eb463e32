"""held_out of a checkpoint that was trained on a task: which questions are asked, and what becomes of lm-eval's samples."""

import json
import math

import pytest

from parloop.corpus.tasks import HELD_OUT, task_of
from parloop.evaluate.benchmark import Job, benchmarks
from parloop.evaluate.benchmarks.held_out import questions
from parloop.train import Recipe

BENCHMARK = benchmarks()["held_out"]


@pytest.mark.parametrize("source", ["task:parity,length=16", "task:s5,length=8", "task:hops", "task:run"])
def test_the_last_answer_of_each_group_is_asked(source):
    task = task_of(source)
    rows = questions(task, 2)
    assert [row["group"] for row in rows] == [*task.groups, *task.groups]
    tokenizer = task.tokenizer()
    for n, row in enumerate(rows):
        number, group = divmod(n, len(task.groups))
        group = task.groups[group]
        document = task.document(number, HELD_OUT, group=None if task.asks_every_group else group)
        last = max(i for i, g in enumerate(document.groups) if g == group)
        assert tokenizer(row["question"], add_special_tokens=False)["input_ids"] == list(document.ids[: last + 1])
        assert tokenizer(row["answer"], add_special_tokens=False)["input_ids"] == [document.targets[last]]
        assert row["answer"].startswith(" ")
        assert row["chance"] == task.chance(group)


@pytest.mark.parametrize("source", ["task:hops,trace", "task:run,trace"])
def test_worked_steps_are_part_of_a_written_answer(source):
    task = task_of(source)
    for row, group in zip(questions(task, 1), task.groups):
        document = task.document(0, HELD_OUT, group=group)
        assert row["question"] + row["answer"] == task.text(document)
        assert row["question"].endswith((":", "#"))


@pytest.fixture
def job(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    Recipe(source="task:hops", length=40).save(tmp_path / "checkpoint" / "recipe.yaml")
    settings = BENCHMARK.settings | {"documents": 2, "length": 40, "device": "cpu"}
    folder = tmp_path / "job"
    made = Job(folder, "", "m", 1, settings, checkpoint=str(tmp_path / "checkpoint"), bins={"lm-eval": tmp_path})
    BENCHMARK.prepare(made)
    return made


def test_samples_become_bits_per_byte_of_answers_and_exact_matches_beside_chance(job):
    asked = [json.loads(line) for line in (job.work / "held_out.jsonl").read_text().splitlines()]
    assert len(asked) == 2 * 6
    assert "output_type: loglikelihood\n" in (job.work / "task" / "held_out.yaml").read_text()
    (step,) = BENCHMARK.steps(job)
    assert "add_bos_token=True" in " ".join(step.command)
    samples = [
        {"doc_id": i, "doc": doc, "filtered_resps": [[-0.1 * (i + 1), i % 6 < 3]], "acc": i % 6 < 3}
        for i, doc in enumerate(asked)
    ]
    (job.work / "out").mkdir()
    file = job.work / "out" / "samples_held_out_x.jsonl"
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    outcome = BENCHMARK.parse(job)
    assert not outcome.problems
    assert outcome.items["3"] == pytest.approx(0.4 / math.log(2) / 2)  # an answer has two bytes: a space and a letter
    assert outcome.value == pytest.approx(0.65 / math.log(2) / 2)
    assert outcome.parts == {f"exact match, hops {h} (chance 9.1)": 100.0 if h <= 3 else 0.0 for h in range(1, 7)}
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples[:-1]))
    assert BENCHMARK.parse(job).problems == ["11 of 12 documents have a loss: run it again"]


def test_a_text_that_is_given_is_read_as_text(job, tmp_path):
    job.data, job.folder = tmp_path / "text.jsonl", tmp_path / "other"
    job.data.write_text('{"text": "x = 1"}\n')
    BENCHMARK.prepare(job)
    assert "loglikelihood_rolling" in (job.work / "task" / "held_out.yaml").read_text()
    (step,) = BENCHMARK.steps(job)
    assert "add_bos_token=False" in " ".join(step.command)
