"""Runs of a study side by side; a whole study of that kind is in test_task_study.py."""

import io
import multiprocessing
import time

import pytest
from rich.console import Console

from parloop.errors import OutputError, RecipeError
from parloop.study import run_study
from parloop.study.jobs import MOST, default_jobs, side_by_side
from parloop.train import Recipe
from tests.helpers.jobs import die, double, fail_first

QUIET = Console(quiet=True)
RECIPE = Recipe(
    source="task:hops", length=40, hidden_size=32, num_hidden_layers=1, intermediate_size=48, window_tokens=4, tokens=4 * 2 * 40,
    batch_size=2, log_every=4, eval_every=0, save_every=100, device="cpu",
)  # fmt: skip


def test_results_come_in_order_with_what_was_reported_and_said():
    steps, console = [], Console(file=io.StringIO(), width=80)
    assert side_by_side(double, [3, 1, 2], 2, lambda *step: steps.append(step), console) == [6, 2, 4]
    assert sorted(steps) == [(0, 3, 3.0), (1, 1, 1.0), (2, 2, 2.0)]
    said = console.file.getvalue()
    assert sorted(said.splitlines()) == ["[1] has 1 thread", "[2] has 1 thread", "[3] has 1 thread"]


def test_an_error_of_a_run_ends_the_others():
    begin = time.monotonic()
    with pytest.raises(ValueError, match="run 0 failed"):
        side_by_side(fail_first, [0, 1], 2, print, QUIET)
    assert time.monotonic() - begin < 200
    deadline = time.monotonic() + 30
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not multiprocessing.active_children()


def test_a_killed_process_is_told_with_the_remedy():
    with pytest.raises(
        RecipeError, match="a training process was killed, perhaps for lack of memory with 2 concurrent runs"
    ):
        side_by_side(die, [0, 1], 2, print, QUIET)


def test_an_error_of_a_verb_comes_through(tmp_path):
    (tmp_path / "study" / "r1-seed0").mkdir(parents=True)
    (tmp_path / "study" / "parloop.json").write_text("{}", encoding="utf-8")
    (tmp_path / "study" / "r1-seed0" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="r1-seed0"):
        run_study(RECIPE, tmp_path / "study", loops=[1, 2], jobs=2, console=QUIET)


def test_jobs_are_as_many_as_threads_up_to_a_bound_and_one_on_a_gpu(monkeypatch):
    for threads, expected in ((1, 1), (2, 2), (64, MOST)):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        assert default_jobs("cpu") == expected
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert default_jobs("auto") == 1
    with pytest.raises(RecipeError, match="jobs=0 must be at least 1"):
        run_study(RECIPE, jobs=0, console=QUIET)
