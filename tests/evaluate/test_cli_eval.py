"""`parloop eval` in this process: what is shown, asked for and refused."""

import dataclasses
import sys
from pathlib import Path

import pytest

from parloop import cli
from parloop.errors import EvaluationError
from parloop.evaluate import run
from parloop.evaluate.benchmark import Job, Outcome, benchmarks
from parloop.evaluate.needs import Check
from parloop.evaluate.results import BenchmarkResult, EvaluationResult, Model, save, settings_of
from tests.helpers.models import tiny_model

SERVER = ["--endpoint", "http://127.0.0.1:9/v1", "--model", "toy@2"]


@pytest.fixture
def parloop(monkeypatch, capsys, tmp_path):
    """Run the command in a folder with a checkpoint, tiny; return its exit code, and its output on both channels."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(
        run, "check", lambda *_: [Check("50 GB of disk", True), Check("Docker, running", False, "install [Docker]")]
    )
    tiny_model(plt_num_loops=2).save_pretrained("tiny")
    Path("empty").mkdir()

    def parloop(*arguments):
        monkeypatch.setattr(sys, "argv", ["parloop", "eval", *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main()
        said = capsys.readouterr()
        return done.value.code, said.out + said.err

    return parloop


@pytest.fixture
def asked(monkeypatch):
    """Requests that would have been run."""
    asked = []
    about = {"metric": "", "weights": None, "parts": {}, "data": "", "settings": {}, "settings_hash": "", "date": ""}
    score = BenchmarkResult(
        benchmark="bfcl_v3", title="BFCL v3", unit="%", value=37.1234, items={"a": 1.0, "b": 0.0}, model=Model("toy[/]@2", 2), **about
    )  # fmt: skip
    loss = dataclasses.replace(score, title="held-out code", unit="bits per byte", value=1.23456)
    monkeypatch.setattr(run, "evaluate", lambda request, console: asked.append(request) or EvaluationResult([score, loss]))
    return asked


def result(folder, loops, items):
    """One of BFCL v3, below the folder."""
    benchmark = benchmarks()["bfcl_v3"]
    job = Job(
        folder=Path(folder) / f"toy@{loops}", endpoint="", model=f"toy@{loops}", loops=loops, settings=benchmark.settings
    )
    about = {"name": job.model, "loops": loops, "checkpoint": None, "hash": None, "engine": "unknown"}
    save(benchmark, job, Outcome(items, data="made"), settings_of(benchmark, job), about, {"cost": {}})


def test_list_in_a_narrow_window(parloop, monkeypatch):
    """Names are what one types: never cut."""
    monkeypatch.setenv("COLUMNS", "60")
    _, said = parloop("--list")
    assert [name for name in benchmarks() if f" {name} " not in said] == []


def test_list(parloop):
    code, said = parloop("--list")
    assert code == 0
    for name, benchmark in benchmarks().items():
        (line,) = [line for line in said.splitlines() if f" {name} " in line]
        assert benchmark.measures in line
        assert ("Docker" in line) is benchmark.needs.docker
        assert ("bubblewrap" in line) is benchmark.needs.sandbox
        assert all(f"{value:g}" in line for value in benchmark.paper.values())


def test_help(parloop):
    code, said = parloop("--help")
    assert code == 0
    for option in (
        "--loops",
        "--endpoint",
        "--model",
        "--limit",
        "--data",
        "--set",
        "--serve-options",
        "--plan",
        "--report",
        "--fresh",
    ):
        assert option in said
    assert "--no-" not in said
    lines = said.splitlines()
    assert "Example: parloop eval humaneval_plus bfcl_v3 CHECKPOINT --loops 1 2" in map(str.strip, lines)


def test_plan(parloop, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, said = parloop("terminal_bench_v2", "bigcodebench", "tiny", "--loops", "3", "1", "--limit", "7", "--plan")
    assert code == 0
    assert "Terminal-Bench 2.0, harbor 0.25.0, about 6 hours for each loop count\n" in said
    assert "BigCodeBench, bigcodebench 0.2.5, about 1 hour for each loop count\n" in said
    assert said.count("  with R = 3 (for 1 alike):\n  $ ") == 2
    assert "  there 50 GB of disk\n  not there Docker, running: install [Docker]\n" in said
    assert "--job-name tiny-3 -y -l 7\n" in said
    assert "tiny@1" not in said  # the first loop count stands for all
    assert said.count("  $ ") == 4
    assert sorted(tmp_path.rglob("*")) == before


def test_plan_for_a_server(parloop):
    code, said = parloop("terminal_bench_v1", *SERVER, "--plan")
    assert code == 0
    assert "--model openai/toy@2 -k api_base=http://127.0.0.1:9/v1" in said


def test_plan_without_the_data_says_what_is_missing(parloop):
    code, said = parloop("livecodebench", "tiny", "--plan")
    assert code == 0
    assert "(not before: livecodebench needs its repository and problems: --data livecodebench=FOLDER" in said


def test_loops_beyond_those_of_the_training_can_be_measured(parloop):
    """Like parloop serve, which warns of it."""
    code, said = parloop("bfcl_v3", "tiny", "--loops", "5", "--plan")
    assert code == 0
    assert "PARLOOP_MODEL=tiny@5" in said
    assert "# in the sandbox, offline" in said


def test_a_run(parloop, asked):
    code, said = parloop(
        "bfcl_v3", "held_out", "tiny", "--loops", "1", "2", "--limit", "9", "--output", "out", "--data", "held_out=texts.jsonl", "bfcl_v3=x=y",
        "--set", "bfcl_v3.seed=7", "bfcl_v3.mode=prompt", 'bfcl_v3.categories=["simple"]', "held_out.device=cpu",
        "--serve-options=--engine vllm --max-model-len 32768", "--fresh",
    )  # fmt: skip
    assert code == 0
    (request,) = asked
    assert (request.benchmarks, request.checkpoint, request.loops, request.limit) == (
        ["bfcl_v3", "held_out"],
        "tiny",
        [1, 2],
        9,
    )
    assert request.data == {"held_out": Path("texts.jsonl"), "bfcl_v3": Path("x=y")}
    assert request.settings == {
        "bfcl_v3": {"seed": 7, "mode": "prompt", "categories": ["simple"]},
        "held_out": {"device": "cpu"},
    }
    assert request.serve_options == ["--engine", "vllm", "--max-model-len", "32768"]
    assert (request.output, request.fresh, request.endpoint) == (Path("out"), True, None)
    assert "BFCL v3, toy[/]@2: 37.12%, 2 items\n" in said
    assert "held-out code, toy[/]@2: 1.235 bits per byte, 2 items\n" in said
    assert "next:  parloop eval --report out\n" in said


def test_a_run_against_a_server(parloop, asked):
    assert parloop("bfcl_v3", *SERVER)[0] == 0
    (request,) = asked
    assert (request.endpoint, request.model, request.checkpoint) == ("http://127.0.0.1:9/v1", "toy@2", None)
    assert (request.loops, request.fresh, request.output) == (None, False, Path("runs/eval"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name at least one benchmark: parloop eval --list shows them"),
        (["tiny"], "name at least one benchmark"),
        (["humanevil_plus", "tiny"], "'humanevil_plus' is not a benchmark, and not a folder: did you mean humaneval_plus?"),
        (["humanevil_plus", *SERVER], "'humanevil_plus' is not a benchmark, and not a folder: did you mean humaneval_plus?"),
        (["bfcl_v3", "nowhere"], "'nowhere' is not a benchmark, and not a folder: parloop eval --list shows them (held_out, humaneval_plus"),
        (["bfcl_v3", "tiny", "empty"], "tiny, empty: give one checkpoint"),
        (["bfcl_v3", "no/where", "--loops", "1", "2"], "checkpoint 'no/where' cannot be loaded"),
        (["bfcl_v3"], "give a checkpoint, or --endpoint URL with --model NAME"),
        (["bfcl_v3", "tiny", *SERVER], "give the checkpoint 'tiny' or --endpoint http://127.0.0.1:9/v1: one of both"),
        (["bfcl_v3", "tiny", "--limit", "3"], "bfcl_v3 has no --limit"),
        (["bfcl_v3", *SERVER[:2]], "--endpoint http://127.0.0.1:9/v1 needs --model NAME"),
        (["bfcl_v3", *SERVER, "--loops", "1", "2"], "a server that runs has one loop count"),
        (["bfcl_v3", *SERVER, "--limit", "0"], "limit=0 must be at least 1"),
        (["bfcl_v3", "tiny", "--loops", "0"], "loops=0 must be at least 1"),
        (["bfcl_v3", *SERVER, "--set", "seed"], "--set 'seed' must be BENCHMARK.NAME=VALUE"),
        (["bfcl_v3", *SERVER, "--set", "seed=1"], "--set 'seed=1' must be BENCHMARK.NAME=VALUE"),
        (["bfcl_v3", *SERVER, "--set", "bfcl_v3.sed=1"], "bfcl_v3 has no setting 'sed': it has mode, temperature"),
        (["bfcl_v3", *SERVER, "--set", "bfcl.seed=1"], "'bfcl' is not a benchmark"),
        (["bigcodebench", *SERVER, "--set", "bigcodebench.temperature=0.5"], "bigcodebench.temperature is 0.0 with bigcodebench 0.2.5"),
        (["bfcl_v3", *SERVER, "--data", "x"], "--data 'x' must be BENCHMARK=PATH"),
        (["bigcodebench", *SERVER, "--data", "bigcodebench=no/[/y]"], "--data bigcodebench=no/[/y]: there is no such file or folder"),
        (["bfcl_v3", "empty"], "checkpoint 'empty' cannot be loaded: the folder has no usable config.json"),
        (["--report"], "'runs/eval' does not exist: give folders with results of parloop eval"),
        (["--report", "tiny"], "no result below tiny: run parloop eval first"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("plan", [[], ["--plan"]])
def test_what_cannot_be(parloop, monkeypatch, arguments, message, plan):
    """An exit code of 2, a line that says why, and no traceback; of a plan as of a run."""
    monkeypatch.setattr(run, "check", lambda *_: [])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it asks the Hub for long
    code, said = parloop(*arguments, *plan)
    assert code == 2
    assert said.startswith("error: ")
    assert message in said


def test_needs_that_are_not_met(parloop):
    code, said = parloop("bfcl_v3", "tiny")
    assert code == 2
    assert said == "error: bfcl_v3 cannot run here: Docker, running: install [Docker].\n"


def test_options_of_the_server_as_the_help_writes_them(parloop, asked):
    assert parloop("bfcl_v3", "tiny", "--serve-options", "--engine vllm --max-model-len 32768")[0] == 0
    assert asked[0].serve_options == ["--engine", "vllm", "--max-model-len", "32768"]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (EvaluationError("bfcl_v3, toy@2: [/y] failed"), 2, "error: bfcl_v3, toy@2: [/y] failed\n"),
        (KeyboardInterrupt(), 130, "interrupted. Run the same command again to continue.\n"),
    ],
)
def test_how_runs_end(parloop, monkeypatch, error, code, said):
    def fails(request, console):
        raise error

    monkeypatch.setattr(run, "evaluate", fails)
    assert parloop("bfcl_v3", *SERVER) == (code, said)


@pytest.mark.parametrize(
    "where", [["--output", "out"], ["out", "--output", "out"], ["out/toy@1", "out/toy@2", "--output", "out"]]
)
def test_report(parloop, tmp_path, where):
    for loops, right in ((1, 1.0), (2, 0.0)):
        result("out", loops, {"a": right, "b": 1.0})
    code, said = parloop("--report", *where)
    assert code == 0
    assert "results: ours, and the paper's" in said
    assert "toy@2 - toy@1" in said
    assert said.endswith("report: out/report.html\n")
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_file()} == {
        "report.html",
        "evaluation.png",
        "evaluation.json",
        "parloop.json",
    }
    assert f"parloop eval --report {' '.join(where)}" in (tmp_path / "out/report.html").read_text()


def test_a_report_of_something_else(parloop, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/result.json").write_text('{"accuracy": 1}')
    code, said = parloop("--report", "out")
    assert code == 2
    assert "'out/result.json' is not a result of parloop eval (it has no benchmark): remove it" in said


@pytest.mark.parametrize("name", ["report.html", "evaluation.png", "evaluation.json"])
def test_a_report_is_not_written_over_somebody_elses_files(parloop, tmp_path, name):
    result("out", 1, {"a": 1.0})
    (tmp_path / "out" / name).write_text("mine")
    code, said = parloop("--report", "out", "--output", "out")
    assert code == 2
    assert f"output 'out' holds {name}, which parloop did not write" in said
    assert (tmp_path / "out" / name).read_text() == "mine"
    assert parloop("--report", "out", "--output", "elsewhere")[0] == 0
    assert parloop("--report", "out", "--output", "elsewhere")[0] == 0  # its own it writes again
