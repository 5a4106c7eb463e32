"""The study from end to end at tiny size: runs, resumption, results, report, terminal, command line."""

import copy
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from html.parser import HTMLParser

import pytest
from rich.console import Console

from parloop.corpus import load_corpus, sources
from parloop.diagnosis.checkpoint import diagnose_checkpoint
from parloop.diagnosis.figures import CAPTIONS
from parloop.diagnosis.results import CheckpointDiagnosis
from parloop.errors import OutputError, RecipeError, SourceError
from parloop.folder import STUDY, claimed, locked
from parloop.model.flops import forward_flops_per_token, training_flops_per_token
from parloop.study import Arm, StudyResult, arms, figures, run_study, runs
from parloop.study.arms import columns, lines
from parloop.study.measure import cache_bytes_of, peak_training_bytes
from parloop.study.report import write_report
from parloop.study.runs import look_at, plan
from parloop.study.study import default_folder
from parloop.train import Recipe
from parloop.train.training import train
from tests.helpers.sources import write_sources

QUIET = Console(quiet=True)
TINY = {
    "vocab_size": 300,
    "length": 32,
    "validation_share": 0.2,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "window_tokens": 8,
    "tokens": 20 * 4 * 32,
    "log_every": 5,
    "eval_every": 10,
    "eval_rows": 4,
    "save_every": 7,
    "device": "cpu",
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("PARLOOP_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return Recipe(source=str(write_sources(tmp_path_factory.mktemp("source"))), **TINY)


@pytest.fixture(scope="module")
def study(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies") / "tokens"
    results = run_study(recipe, folder, loops=[1, 2, 3], seeds=2, console=QUIET, command="parloop study")
    return folder, results


def test_results_are_complete(study):
    folder, result = study
    assert [row.arm for row in result.rows] == [Arm(1), Arm(2), Arm(3)]
    for row in result.rows:
        n = row.arm.loops
        value, low, high = row.bits_per_byte
        assert low <= value <= high
        assert len(row.bits_per_byte_after_loop) == n
        assert row.bits_per_byte_after_loop[-1] == pytest.approx(value)
        assert row.training_tokens == 20 * 4 * 32
        assert 0 < row.next_token_accuracy < 1
        assert row.training_tokens_per_second > 0
        assert row.training_seconds > 0
        costs = row.costs
        for time in (costs.prefill_ms, costs.decode_ms, costs.decode_pass_per_loop_ms):
            assert 0 < time.low <= time.median <= time.high
        assert costs.cache_bytes.per_token == 2 * 2 * 2 * 8 * 4  # keys and values, layers, key heads, head size, float32
        assert costs.cache_bytes.fixed == (n - 1) * (2 * 2 * 8 * 2 * 8 * 4 + 32 * 4)
        assert len(row.loss_curves) == 2
        assert row.runs == [f"r{n}-seed0", f"r{n}-seed1"]
        assert (folder / row.diagnosis).exists()
    assert result.rows[0].difference_to_base == (0, 0, 0)
    assert result.row(result.best).difference_to_best == (0, 0, 0)
    assert result.base == "r1"
    assert result.chosen in ("r1", "r2", "r3")
    assert result.verdict.headline == f"Take R = {result.chosen[1:]}."
    assert result.environment["torch"]
    peaks = [row.costs.peak_training_bytes for row in result.rows]
    assert peaks == sorted(peaks)


def test_the_result_is_in_the_folder_as_it_was_returned(study):
    folder, result = study
    assert StudyResult.load(folder) == result
    assert StudyResult.load(folder).folder == result.folder == folder
    assert StudyResult.from_json(result.to_json()) == result
    assert "diagnoses" not in json.loads(result.to_json())  # the runs have them


def test_the_report_is_there_without_the_command_line(study):
    folder, result = study
    made = {path.name for path in folder.iterdir() if path.is_file()}
    assert {"results.json", "report.html", "README.md", "loss.png", "curves.png", "cost.png"} <= made
    assert f"parloop generate {folder}/r2-seed0" in (folder / "README.md").read_text()
    assert str(result.verdict) in (folder / "README.md").read_text()


def test_running_again_keeps_what_is_done_and_continues_what_is_not(study, recipe, monkeypatch):
    folder, result = study
    (folder / "r2-seed1" / "training.json").unlink()  # as if interrupted before its end
    built = []
    from parloop.train import pretrain

    original = pretrain.build_model
    monkeypatch.setattr(pretrain, "build_model", lambda *a: built.append(a[0].num_loops) or original(*a))
    again = run_study(recipe, folder, loops=[1, 2, 3], seeds=2, console=QUIET)
    assert built == [2]
    for one, two in zip(result.rows, again.rows):
        assert one.bits_per_byte == pytest.approx(two.bits_per_byte, abs=1e-6)


def test_seeds_differ_and_loops_share_their_data(study):
    row = study[1].rows[0]
    assert row.loss_curves[0] != row.loss_curves[1]


def test_equal_compute(recipe, tmp_path):
    result = run_study(recipe, tmp_path, loops=[1, 3], match="compute", console=QUIET)
    flops = [row.training_flops for row in result.rows]
    assert flops[0] == pytest.approx(flops[1], rel=0.05)
    tokens = [row.training_tokens for row in result.rows]
    assert tokens[0] > 2 * tokens[1]
    assert "the same training compute" in result.verdict.evidence


def test_a_study_of_another_recipe_is_refused(study, recipe):
    with pytest.raises(RecipeError, match="another recipe"):
        run_study(Recipe(**(vars(recipe) | {"learning_rate": 1e-4})), study[0], loops=[1], console=QUIET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loops": [0]}, "at least 1"),
        ({"seeds": 0}, "at least 1"),
        ({"match": "time"}, "tokens, compute"),
        ({"document_chars": -1}, "document_chars=-1 must be at least 0"),
    ],
)
def test_impossible_settings(recipe, tmp_path, change, message):
    with pytest.raises(RecipeError, match=message):
        run_study(recipe, tmp_path, console=QUIET, **change)


class Links(HTMLParser):
    """Return the addresses that a page would fetch."""

    def __init__(self):
        super().__init__()
        self.fetched, self.text, self.svgs = [], [], 0

    def handle_starttag(self, tag, attributes):
        self.svgs += tag == "svg"
        for name, value in attributes:
            if name in ("src", "srcset") or (name == "href" and tag == "link"):
                self.fetched.append(value)

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_is_one_file_that_fetches_nothing(study):
    folder, result = study
    html = (folder / "report.html").read_text()
    parser = Links()
    parser.feed(html)
    assert parser.fetched == []
    assert "@import" not in html
    assert parser.svgs == 3 + len(CAPTIONS)
    text = " ".join(parser.text)
    assert result.verdict.headline in text
    for row in result.rows:
        assert f"{row.bits_per_byte.value:.3f}" in text
    assert {path.name for path in folder.glob("*.png")} == {"loss.png", "curves.png", "cost.png"} | {
        f"lenses-{name}.png" for name in CAPTIONS
    }


def test_the_report_says_what_to_type_from_where_it_was_written(study):
    folder, result = study
    html = write_report(result, folder).read_text()
    for name in ("r1-seed0", "r2-seed0", "r3-seed0"):
        assert f"parloop generate {folder}/{name}" in html


def test_changed_text_is_not_compared_with_old(recipe, study, tmp_path):
    """Runs of the old text are not mixed with those of the new one."""
    source = tmp_path / "source"
    shutil.copytree(recipe.source, source)
    small = Recipe(**(vars(recipe) | {"source": str(source), "tokens": 2 * 8 * 32, "eval_every": 0}))
    run_study(small, tmp_path / "study", loops=[1], console=QUIET)
    (source / "new.py").write_text("x = 1\n" * 100)
    with pytest.raises(RecipeError, match=r"has changed since the run in .*r1-seed0"):
        run_study(small, tmp_path / "study", loops=[1, 2], console=QUIET)


def test_one_loop_count_is_no_comparison(recipe, tmp_path):
    """And without validation while training, no figure complains."""
    small = Recipe(**(vars(recipe) | {"tokens": 4 * 8 * 32, "eval_every": 0}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = run_study(small, tmp_path, loops=[2], console=QUIET)
    html = (tmp_path / "report.html").read_text()
    assert result.verdict.headline == "Nothing was compared."
    assert result.verdict.evidence.startswith("R = 2 is the only loop count")
    assert "--loops 1 2 3" in result.verdict.evidence
    assert "<strong>Nothing was compared.</strong> R = 2 is" in html
    assert "cheaper" not in html


def test_figures_of_many_loops(study):
    result = copy.deepcopy(study[1])
    result.rows[-1].arm = Arm(12)
    result.rows[-1].bits_per_byte_after_loop = [2.0] * 12
    top, bottom = figures.loss_against_loops(result).axes
    assert bottom.get_xticks().tolist() == [1, 2, 12]
    assert len([line for line in top.get_lines() if line.get_label().startswith("read out after loop")]) == 11
    labels = [line.get_label() for line in figures.loss_curves(result).axes[0].get_lines()]
    assert "R = 12" in labels


def test_legends_lie_on_no_data(study):
    """They are the figure's, above the axes."""
    for draw in (figures.loss_against_loops, figures.loss_curves, figures.cost_against_loops):
        figure = draw(study[1])
        figure.draw_without_rendering()
        (legend,) = figure.legends
        assert all(axes.get_legend() is None for axes in figure.axes)
        assert legend.get_window_extent().y0 >= max(axes.get_window_extent().y1 for axes in figure.axes)


def test_figures_leave_pyplot_alone(study):
    import matplotlib.pyplot as plt

    before = plt.get_fignums(), plt.rcParams["axes.grid"]
    write_report(study[1], study[0])
    assert (plt.get_fignums(), plt.rcParams["axes.grid"]) == before


@pytest.mark.parametrize("width", [80, 100])
def test_the_tables_fit_the_terminal(study, width):
    text = study[1].format(width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert f"{study[1].rows[1].bits_per_byte.value:.3f}" in text
    assert study[1].verdict.headline in text


# Arms


@pytest.fixture
def schemes(monkeypatch):
    """Arms with a further field, as a study of more than loop counts has: which part of the recipe it changes, it says itself."""

    @dataclasses.dataclass(frozen=True)
    class Schemes(Arm):
        scheme: str = arms._differs("scheme", "{}", "{}", default="paper")

        def recipe(self, recipe, **changes):
            scale = {} if self.scheme == "paper" else {"hidden_scale": 0.0}
            return dataclasses.replace(recipe, loops=self.loops, **scale, **changes)

    monkeypatch.setattr(arms, "Arm", Schemes)
    return [Schemes(n, scheme=scheme) for n in (1, 2) for scheme in ("paper", "none")]


def test_a_further_field_of_an_arm_is_a_column_a_label_and_a_folder(schemes, recipe):
    assert [arm.name for arm in schemes] == ["r1", "r1-none", "r2", "r2-none"]
    assert [arm.label for arm in schemes] == ["R = 1", "R = 1, none", "R = 2", "R = 2, none"]
    assert columns(schemes) == {"R": ["1", "1", "2", "2"], "scheme": ["paper", "none", "paper", "none"]}
    assert columns(schemes[::2]) == {"R": ["1", "2"]}
    assert lines(schemes) == {"": [0, 2], "none": [1, 3]}
    runs = plan(recipe, load_corpus(recipe.corpus_settings(), console=QUIET), schemes, 2, "tokens")
    assert [run.name for run in runs[:4]] == ["r1-seed0", "r1-none-seed0", "r2-seed0", "r2-none-seed0"]
    assert [run.recipe.hidden_scale for run in runs[:4]] == [recipe.hidden_scale, 0.0] * 2
    assert [run.first for run in runs] == [True] * 4 + [False] * 4
    assert all(re.fullmatch(STUDY.made, run.name) for run in runs)


def test_arms_are_compared_and_drawn_whatever_they_differ_in(study, schemes):
    result = copy.deepcopy(study[1])
    for row, arm in zip(result.rows, schemes[1:]):
        row.arm = arm
    result.base = result.best = result.chosen = "r1-none"
    assert "scheme" in result.format()
    assert [axes.get_title() for axes in figures.cost_against_loops(result).axes] == ["none", ""]
    lines = figures.loss_against_loops(result).axes[0].containers
    assert [line.get_label() for line in lines] == ["none, 95% interval", "last loop, 95% interval"]


def test_the_command_line(recipe, tmp_path):
    """parloop study, generate, and their errors, as a user meets them."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "100"}

    def parloop(*arguments):
        command = [sys.executable, "-m", "parloop", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=240)

    options = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    done = parloop("study", recipe.source, "--loops", "1", "2", "--output", "out", *options)
    assert done.returncode == 0, done.stderr
    assert "Take R = " in done.stdout
    assert "report: out/report.html" in done.stdout
    assert "run 2 of 2: R = 2" in done.stdout
    done = parloop("generate", "out/r2-seed0", "def alpha", "--max-new-tokens", "5", "--loops", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def alpha")

    for arguments, message in (
        (["study", "no/such/folder"], "no such file or folder"),
        (
            ["study", "--preset", "huge"],
            "neither a file nor one of the shipped recipes (chat, chat-lora, gpu, laptop, loopcoder-v2-7b, quick, task, think)",
        ),
        (["train", "quick", "--loops", "0"], "loops=0 must be at least 1"),
        (["generate", "no/such/checkpoint"], "checkpoint 'no/such/checkpoint' cannot be loaded"),
    ):
        done = parloop(*arguments)
        assert done.returncode == 2
        assert message in " ".join(done.stderr.split()), done.stderr
        assert "Traceback" not in done.stderr


def test_flops_against_counted_matrix_products(recipe):
    """The formula against what torch's counter sees, with every token's whole row of keys counted by both."""
    from torch.utils.flop_counter import FlopCounterMode

    from parloop.train.build import build_model

    for n in (1, 2, 3):
        model = build_model(Recipe(**(vars(recipe) | {"loops": n, "attention": "eager"})))
        T = 64
        with FlopCounterMode(display=False) as counter:
            import torch

            model(torch.full((1, T), 3), use_cache=False)
        config = model.config
        H, K, w, block = config.num_attention_heads, config.head_dim, config.window_tokens, 32
        per_token = forward_flops_per_token(config, T)
        # Eager attention computes all T keys, the formula counts those that are seen; bands compute w + block of w + 1.
        unseen = config.num_hidden_layers * 4 * H * K * (n * (T - (T + 1) / 2) + (n - 1) * (w + block - (w + 1)))
        assert counter.get_total_flops() / T == pytest.approx(per_token + unseen, rel=1e-6)
        assert training_flops_per_token(config, T) == 3 * per_token


def test_cache_and_memory_of_a_model(recipe):
    from parloop.train.build import build_model

    one, two = (build_model(Recipe(**(vars(recipe) | {"loops": n}))) for n in (1, 2))
    assert cache_bytes_of(one, 32).fixed == 0
    assert peak_training_bytes(two, 2, 32) > 1.5 * peak_training_bytes(one, 2, 32)
    assert math.isfinite(peak_training_bytes(one, 2, 32))


@pytest.mark.parametrize("name", ["results.json", "README.md", "report.html", "loss.png", "thesis.tex"])
def test_a_folder_of_somebody_else_is_refused_before_anything_is_read(recipe, tmp_path, monkeypatch, name):
    monkeypatch.setattr("parloop.study.study.load_corpus", None)
    (tmp_path / name).write_text("mine")
    for fresh in (False, True):
        with pytest.raises(OutputError, match=rf"is not empty and holds no study \({name}\): choose another folder"):
            run_study(recipe, tmp_path, loops=[1], console=QUIET, fresh=fresh)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_a_readme_that_was_edited_is_not_written_over(recipe, study, monkeypatch):
    folder, result = study
    with claimed(folder, STUDY) as out:
        out.write("README.md", "ours")
    (folder / "README.md").write_text("ours, and my notes")
    for write in (lambda: run_study(recipe, folder, console=QUIET), lambda: write_report(result, folder)):
        with pytest.raises(OutputError, match=r"holds README.md, which .* was changed since.* move it away"):
            write()
    assert (folder / "README.md").read_text() == "ours, and my notes"
    (folder / "README.md").unlink()


def test_starting_over_deletes_nothing_of_others(recipe, study, tmp_path):
    shutil.copytree(study[0], tmp_path / "study")
    (tmp_path / "study" / "r1-seed0" / ".git").mkdir()
    with pytest.raises(OutputError, match=r"r1-seed0' holds more than a run \(.git\), so it is not deleted"):
        run_study(recipe, tmp_path / "study", loops=[1], console=QUIET, fresh=True)
    assert (tmp_path / "study" / "r1-seed0" / "model.safetensors").exists()


def test_two_studies_in_one_folder(recipe, study, monkeypatch):
    """And a training in a run of it."""
    with (
        claimed(study[0], STUDY),
        pytest.raises(OutputError, match=rf"another run works in .* \(parloop: process {os.getpid()}\)"),
    ):
        run_study(recipe, study[0], loops=[1], console=QUIET)
    (study[0] / "r1-seed0" / "training.json").rename(study[0] / "training.json")  # it trains
    try:
        with locked(study[0] / "r1-seed0"), pytest.raises(OutputError, match=r"another run works in .*r1-seed0'"):
            train(Recipe(**(vars(recipe) | {"loops": 1})), study[0] / "r1-seed0", console=QUIET)
    finally:
        (study[0] / "training.json").rename(study[0] / "r1-seed0" / "training.json")


def test_a_run_is_loaded_once_and_its_source_is_not_read_again(recipe, study, monkeypatch):
    """To evaluate and to diagnose it; the samples are those that `parloop diagnose` draws of the source."""
    corpus = load_corpus(recipe.corpus_settings(), console=QUIET)
    folder = study[0] / "r1-seed0"
    kept = CheckpointDiagnosis.load(folder)
    (run,) = plan(recipe, corpus, [Arm(1)], 1, "tokens")
    for name in ("diagnosis.json", "evaluation-3000.npz"):
        (folder / name).unlink()
    monkeypatch.setattr(sources, "read", None)
    monkeypatch.setattr(sources, "read_all", None)
    loaded, load = [], runs.load_model
    monkeypatch.setattr(runs, "load_model", lambda *a: loaded.append(a) or load(*a))
    look_at(run, folder, corpus, 3000, QUIET)
    look_at(run, folder, corpus, 3000, QUIET)
    assert len(loaded) == 1
    again = CheckpointDiagnosis.load(folder)
    monkeypatch.undo()
    assert again.sample_hash == kept.sample_hash
    assert diagnose_checkpoint(folder, samples=32, batch_size=8, device="cpu", console=QUIET).sample_hash == kept.sample_hash
    assert again.settings["trained_on_this_text"].startswith("no: only documents that training held out")


def test_held_out_documents_that_give_no_sample_are_not_sought_in_the_source(recipe, study, monkeypatch):
    monkeypatch.setattr(sources, "read_all", None)
    with pytest.raises(SourceError, match=r"has no document of at least 16 tokens among the 20% held out.*recipe.yaml"):
        diagnose_checkpoint(study[0] / "r1-seed0", device="cpu", held_out=[("a", "x")], console=QUIET)


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (("quick", "tokens", None), "runs/study-quick"),
        (("quick", "tokens", "stdlib"), "runs/study-quick"),
        (("a/mine.yaml", "compute", "src/"), "runs/study-mine-compute-src"),
        ((None, "tokens", "hub:owner/name"), "runs/study-hub-owner-name"),
    ],
)
def test_the_default_folder_follows_recipe_match_and_source(arguments, folder):
    assert str(default_folder(*arguments)) == folder


def test_a_source_that_cannot_be_read_names_the_recipe_that_has_it(tmp_path):
    Recipe(source="no/such/folder").save(tmp_path / "mine.yaml")
    with pytest.raises(SourceError, match=r"no/such/folder.*\(recipe '.*mine.yaml'\)"):
        run_study(str(tmp_path / "mine.yaml"), tmp_path / "out", console=QUIET)
    with pytest.raises(SourceError, match=r"elsewhere.*(?<!yaml'\))$"):
        run_study(str(tmp_path / "mine.yaml"), tmp_path / "out", changes={"source": "elsewhere"}, console=QUIET)
