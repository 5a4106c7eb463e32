"""A study that sweeps over fields of the recipe beside the loop count."""

import pytest
from rich.console import Console

from parloop.checkpoints import load_model
from parloop.errors import RecipeError
from parloop.study import Arm, StudyResult, run_study
from parloop.study.arms import Change, columns, combinations, lines
from parloop.study.runs import plan
from parloop.study.study import default_folder
from parloop.study.task import TaskCorpus
from parloop.train import Recipe

QUIET = Console(quiet=True)
RECIPE = Recipe(
    source="task:hops", length=40, hidden_size=32, num_hidden_layers=1, intermediate_size=48, window_tokens=4, tokens=4 * 2 * 40,
    batch_size=2, log_every=4, eval_every=0, save_every=100, device="cpu",
)  # fmt: skip


def test_every_value_is_trained_and_named_by_what_differs(tmp_path, monkeypatch):
    monkeypatch.setattr("parloop.study.runs.INSTANCES", 8)
    result = run_study(RECIPE, tmp_path, loops=[2], sweep=["offset=0,1"], console=QUIET)
    assert {row.arm.name for row in result.rows} == {"r2-offset=0", "r2-offset=1"}
    for row in result.rows:
        kept = Recipe.load(tmp_path / row.runs[0] / "recipe.yaml")
        assert [Change("offset", kept.offset)] == list(row.arm.changes)
        assert load_model(tmp_path / row.runs[0], "cpu").config.plt_offset == kept.offset
    assert result == StudyResult.from_json(result.to_json())
    assert "offset" in result.format()
    assert "R = 2, offset 0" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_several_fields_make_every_combination():
    found = combinations(["learning-rate=1e-3,3e-3", "branch_scaling=none,loops"], RECIPE)
    assert [Arm(loops=2, changes=changes).name for changes in found] == [
        f"r2-learning_rate={rate}-branch_scaling={scaling}" for rate in (0.001, 0.003) for scaling in ("none", "loops")
    ]


def test_a_swept_number_of_layers_is_multiplied_by_the_control():
    arm = Arm(loops=1, layers=3, changes=(Change("num_hidden_layers", 2),))
    assert arm.recipe(RECIPE).num_hidden_layers == 6


def test_controls_are_of_their_own_combination():
    cheap, dear = ((Change("num_hidden_layers", n),) for n in (1, 4))
    arms = [Arm(loops=2, changes=cheap), Arm(loops=2, changes=dear), Arm(loops=1, compute_of=2, changes=dear)]
    runs = plan(RECIPE, TaskCorpus.of(RECIPE), arms, 1, "tokens")
    flops = {run.arm: run.flops for run in runs}
    assert flops[arms[2]] == pytest.approx(flops[arms[1]], rel=0.2)  # whole steps
    assert flops[arms[2]] > 2 * flops[arms[0]]


def test_swept_tokens_are_those_of_each_arm():
    arms = [Arm(loops=1, changes=(Change("tokens", n),)) for n in (800, 1600)]
    runs = plan(RECIPE, TaskCorpus.of(RECIPE), arms, 1, "tokens")
    assert {run.recipe.tokens for run in runs} == {800, 1600}


def test_figures_draw_a_line_and_tables_have_a_column_for_what_is_swept():
    slow, fast = ((Change("learning_rate", rate),) for rate in (1e-3, 3e-3))
    arms = [Arm(loops=1, changes=slow), Arm(loops=2, changes=slow), Arm(loops=1, changes=fast), Arm(loops=2, changes=fast)]
    assert lines(arms) == {"learning_rate 0.001": [0, 1], "learning_rate 0.003": [2, 3]}
    assert columns(arms) == {"R": list("1212"), "learning\nrate": ["0.001", "0.001", "0.003", "0.003"]}


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        (["learning_rate"], "must be FIELD=VALUE,VALUE"),
        (["learning_rate=1e-3", "learning-rate=2e-3"], "each field once"),
        (["learning_rat=1e-3"], "did you mean 'learning_rate'"),
        (["learning_rate=fast"], "must be of type float"),
        (["learning_rate=-1"], "must be above 0"),
        (["branch_scaling=none,some"], "unknown: use one of none, loops"),
        (["seed=0,1"], "all models of a study have the same seed"),
        (["length=64"], "all models of a study have the same length"),
        (["weight_decay=[0"], "must be of type float"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_trained(sweep, said, tmp_path):
    with pytest.raises(RecipeError, match=said.replace("[", r"\[")):
        run_study(RECIPE, tmp_path / "study", sweep=sweep, console=QUIET)
    assert not (tmp_path / "study").exists()


def test_values_that_are_the_same_are_trained_once():
    assert combinations(["learning_rate=0.001,1e-3"], RECIPE) == [(Change("learning_rate", 0.001),)]
    assert combinations([], RECIPE) == [()]


def test_the_default_folder_names_the_fields():
    assert default_folder("quick", "tokens", None, ["learning_rate"]).name == "study-quick-learning_rate"
