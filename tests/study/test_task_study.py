"""A study of a task: accuracy by group beside chance, controls, and what the verdict says of them."""

import copy
import dataclasses

import numpy as np
import pytest
from rich.console import Console

from parloop.checkpoints import load_model
from parloop.cli import app
from parloop.corpus.tasks import task_of
from parloop.errors import RecipeError, SourceError
from parloop.statistics import Interval
from parloop.study import Arm, StudyResult, run_study
from parloop.study.arms import columns, lines
from parloop.study.figures import answers_by_group
from parloop.study.summary import verdict
from parloop.study.task import Answers, answers_of, solved_up_to
from parloop.train import Recipe
from parloop.train.result import TrainingResult
from parloop.train.task_accuracy import task_accuracy
from parloop.train.training import train

QUIET = Console(quiet=True)
TINY = {
    "length": 40, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "window_tokens": 4, "tokens": 8 * 2 * 40,
    "batch_size": 2, "log_every": 4, "eval_every": 0, "save_every": 100, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe():
    return Recipe(source="task:hops", **TINY)


@pytest.fixture(scope="module")
def study(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    controls = ["deep", "compute"]
    result = run_study(
        recipe, folder, loops=[1, 2], controls=controls, seeds=2, console=QUIET, command="parloop study task:hops", jobs=2
    )
    return folder, result


def test_every_arm_has_its_accuracy_by_group(study):
    folder, result = study
    assert {row.arm.name for row in result.rows} == {"r1", "r2", "r1-x2", "r1-c2"}
    assert result.base == "r1"
    assert result.unit == "bits per answer"
    assert result.group_unit == "hops"
    task = task_of("task:hops")
    for row in result.rows:
        assert [group.group for group in row.answers] == [1, 2, 3, 4, 5, 6]
        outcomes = [task_accuracy(load_model(folder / name, "cpu"), task) for name in row.runs]
        for i, group in enumerate(row.answers):
            value, low, high = group.correct
            assert value == pytest.approx(np.mean([outcome.correct[:, i].mean() for outcome in outcomes]))
            assert low < value < high
            assert group.chance == pytest.approx(1 / 11)
        bits = np.mean(
            [outcome.evaluation.nll[:, -1].sum() / outcome.evaluation.tokens.sum() for outcome in outcomes]
        ) / np.log(2)
        assert row.bits_per_byte.value == pytest.approx(bits)
        assert row.next_token_accuracy == pytest.approx(np.mean([g.correct.value for g in row.answers]))
    assert result.documents == 256
    assert result.document_bytes == 256 * 4 * 6


def test_runs_side_by_side_are_what_each_is_alone(study, tmp_path):
    folder, result = study
    for name in ("r1-seed1", "r2-seed0"):
        alone = train(Recipe.load(folder / name / "recipe.yaml"), tmp_path / name, console=QUIET)
        assert alone.loss_curve == TrainingResult.load(folder / name).loss_curve
    curves = {run: curve for row in result.rows for run, curve in zip(row.runs, row.loss_curves)}
    assert curves["r2-seed0"] == [list(point) for point in alone.loss_curve]


def test_controls_spend_otherwise_what_loops_cost(study):
    rows = {row.arm.name: row for row in study[1].rows}
    assert rows["r1-x2"].parameters > rows["r1"].parameters + 7000  # one more layer
    assert rows["r1-x2"].training_tokens == rows["r2"].training_tokens
    assert rows["r1-c2"].parameters == rows["r1"].parameters
    assert rows["r1-c2"].training_flops == pytest.approx(rows["r2"].training_flops, rel=0.1)
    assert rows["r1-c2"].training_tokens > 1.5 * rows["r1"].training_tokens
    assert study[1].chosen in ("r1", "r2")
    assert study[1].best in ("r1", "r2")


def test_the_result_is_read_back_and_shown(study):
    folder, result = study
    assert StudyResult.load(folder) == result
    text = result.format()
    assert "held-out loss in bits per answer" in text
    assert "answers that are right (chance 9%, 9%" in text
    assert "solved" in text
    assert "deep 2" in text
    assert "compute 2" in text
    assert "…" not in text
    page = (folder / "report.html").read_text()
    assert "Which answers are right" in page
    assert 'id="figure-answers"' in page
    assert "bits per byte" not in page
    assert (folder / "answers.png").is_file()
    assert "2 times the layers" in page
    assert "the training compute of R = 2" in page
    prompt = (folder / "README.md").read_text().split("r1-seed0 ")[1].split('"')[1]
    assert len(prompt.split()) == 12


def test_running_again_trains_and_asks_nothing(study, recipe, monkeypatch):
    folder, result = study
    monkeypatch.setattr("parloop.study.runs.task_accuracy", None)
    monkeypatch.setattr("parloop.train.pretrain.build_model", None)
    again = run_study(recipe, folder, loops=[1, 2], controls=["deep", "compute"], seeds=2, console=QUIET)
    assert [row.answers for row in again.rows] == [row.answers for row in result.rows]


def test_what_cannot_be_studied_is_named(recipe, tmp_path):
    with pytest.raises(RecipeError, match="control='wide' is unknown: use deep or compute"):
        run_study(recipe, tmp_path, controls=["wide"], console=QUIET)
    with pytest.raises(RecipeError, match="leave the control compute out"):
        run_study(recipe, tmp_path / "a", loops=[1, 2], controls=["compute"], match="compute", console=QUIET)
    with pytest.raises(SourceError, match="there is no task 'sudoku'"):
        run_study("task", tmp_path / "b", changes={"source": "task:sudoku"}, console=QUIET)


def test_a_task_is_studied_with_its_preset(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "parloop.study.run_study", lambda preset, *a, **options: asked.append((preset, options)) or exit_now()
    )

    def exit_now():
        raise KeyboardInterrupt

    for source in ("task:s5", "stdlib"):
        with pytest.raises(KeyboardInterrupt):
            app(["study", source, "--control", "deep", "compute"])
    assert [preset for preset, _ in asked] == ["task", "quick"]
    assert asked[0][1]["controls"] == ["deep", "compute"]


# What the verdict says


def answers(*shares):
    return [
        Answers(i, 0.1, Interval(s, s - 0.01, s + 0.01), Interval(s, s, s), Interval(1, 1, 1), 0.0)
        for i, s in enumerate(shares, 1)
    ]


@pytest.mark.parametrize(
    ("shares", "solved"), [((0.99, 0.9, 0.5), 2), ((0.5, 0.99), None), ((0.95, 0.2, 0.99), 1), ((1.0, 1.0, 0.95), 3)]
)
def test_a_group_counts_as_solved_with_all_easier_ones(shares, solved):
    assert solved_up_to(answers(*shares)) == solved


def test_the_verdict_says_what_is_solved_and_how_many_layers_loops_are_worth(study):
    template = {row.arm.name: row for row in study[1].rows}
    losses = {
        Arm(1): 2.0, Arm(2): 1.5, Arm(3): 0.5, Arm(1, layers=2): 1.6, Arm(1, layers=3): 0.4, Arm(1, compute_of=2): 1.9,
        Arm(1, compute_of=3): 1.8,
    }  # fmt: skip
    rows = []
    for arm, loss in losses.items():
        row = dataclasses.replace(copy.copy(template["r1"]), arm=arm, bits_per_byte=Interval(loss, loss - 0.1, loss + 0.1))
        rows.append(dataclasses.replace(row, answers=answers(*[0.95] * (arm.loops if not arm.is_control else 1), 0.2)))
    said = verdict(rows, rows[0], rows[2], rows[2], "tokens", 3, "hops")
    assert said.headline == "Take R = 3."
    assert (
        "At least 90% of the answers are right with R = 1: up to hops 1; R = 2: up to hops 2; R = 3: up to hops 3."
        in said.evidence
    )
    assert "R = 2 does at least as well as 2 times the layers, each with its own weights, not as well as 3" in said.evidence
    assert "R = 3 does at least as well as 2 times the layers, each with its own weights, not as well as 3" in said.evidence
    assert "one loop with the training compute of R = 2 has 1.900 bits per answer, these loops 1.500" in said.evidence
    assert "bits per byte" not in said.evidence
    rows[1].answers[0] = answers(0.3)[0]
    assert "R = 2: nothing;" in verdict(rows, rows[0], rows[2], rows[2], "tokens", 3, "hops").evidence


def test_the_verdict_says_when_nothing_is_solved(study):
    assert "No loop count has 90% of even the easiest answers right: train longer" in study[1].verdict.evidence


def test_figures_put_controls_beside_the_loops_they_are_of(study):
    found = [Arm(1), Arm(2), Arm(1, layers=2), Arm(1, compute_of=2), Arm(3), Arm(1, layers=3)]
    assert lines(found) == {
        "": [0, 1, 4], "R times the layers instead": [2, 5], "one loop, as much training compute": [3],
    }  # fmt: skip
    assert [arm.place for arm in found] == [1, 2, 2, 2, 3, 3]
    assert columns(found) == {"R": list("121131"), "control": ["", "", "deep 2", "compute 2", "", "deep 3"]}
    assert columns([Arm(1), Arm(2)]) == {"R": ["1", "2"]}
    figure = answers_by_group(study[1])
    assert len(figure.axes) == 3
    assert [tick.get_text() for tick in figure.axes[-1].get_xticklabels()] == ["1", "2", "3", "4", "5", "6"]


def test_intervals_cover_seeds(study):
    folder, _ = study
    task = task_of("task:hops")
    one, other = (task_accuracy(load_model(folder / f"r1-seed{seed}", "cpu"), task, instances=40) for seed in (0, 1))
    other.correct[:] = 1 - one.correct  # two seeds that differ much
    alone, both = answers_of([one])[0].correct, answers_of([one, other])[0].correct
    assert both.high - both.low > 2 * (alone.high - alone.low)
