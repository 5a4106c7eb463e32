"""The commands of every benchmark, as `parloop eval --plan` shows them, beside recorded ones in commands/.

After a change that is meant: PARLOOP_RECORD=1 pytest tests/evaluate/test_commands.py, and look at the difference.
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from parloop.errors import EvaluationError
from parloop.evaluate import agents, run
from parloop.evaluate.benchmark import benchmarks
from parloop.evaluate.environments import folder_of
from parloop.evaluate.run import Request, plan
from tests.helpers.models import tiny_model

RECORDED = Path(__file__).parent / "commands"
ENDPOINT = {"endpoint": "http://127.0.0.1:8000/v1", "model": "name@2"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to run in, with a checkpoint and data as each benchmark wants them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "check", lambda *_: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tiny_model(plt_num_loops=2).save_pretrained("tiny")
    for folder in ("swe", "contests/LiveCodeBench/lcb_runner"):
        Path(folder).mkdir(parents=True)
    for file in ("contests/data.jsonl", "held.jsonl"):
        Path(file).write_text("")
    rows = [{"org": "clap-rs", "repo": "clap", "number": 1}, {"org": "cli", "repo": "cli", "number": 2}]
    Path("swe/dataset.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def request(name, **more):
    if name == "held_out" and "endpoint" in more:
        more = {"data": {name: Path("held.jsonl")}, "settings": {name: {"tokenizer": "tiny"}}} | more
    data = {"livecodebench": {"livecodebench": Path("contests")}, "multi_swe_bench": {"multi_swe_bench": Path("swe")}}
    return Request([name], data=data.get(name, {}) | more.pop("data", {}), **more)


def commands(request, place):
    """Return the planned commands, one per line, without the parts that differ between machines."""
    (planned,) = plan(request)
    benchmark, lines = planned.benchmark, planned.commands
    folders = {str(place): "HERE", sys.executable: "PYTHON", str(Path(run.__file__).parent): "PARLOOP"}
    folders |= {str(folder_of(environment)): f"TOOLS/{environment.name}" for environment in benchmark.environments}
    text = "\n".join(lines)
    for folder, name in sorted(folders.items(), key=lambda pair: -len(pair[0])):
        text = text.replace(folder, name)
    return re.sub(r"(?<=127\.0\.0\.1:)\d+", "PORT", text) + "\n"


@pytest.mark.parametrize("name", benchmarks())
def test_commands(place, name):
    """For a checkpoint at three loops, of the first five items if that can be, and for a server."""
    limit = None if benchmarks()[name].no_limit else 5
    ours = commands(request(name, checkpoint="tiny", loops=[3], limit=limit), place)
    theirs = commands(request(name, **ENDPOINT, loops=[2]), place)
    now = f"# parloop eval {name} tiny --loops 3{f' --limit {limit}' if limit else ''}\n{ours}\n# parloop eval {name} --endpoint .. --model name@2 --loops 2\n{theirs}"
    path = RECORDED / f"{name}.txt"
    if os.environ.get("PARLOOP_RECORD"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(now)
    assert now == path.read_text()


def test_nothing_is_made_by_a_plan(place):
    before = sorted(place.rglob("*"))
    for name in benchmarks():
        plan(request(name, checkpoint="tiny"))
    assert sorted(place.rglob("*")) == before


# What a user sets must show: in the commands, in what is written for the tool, or in a refusal.

OTHER = {
    "documents": 3, "characters": 5, "length": 7, "dtype": "bfloat16", "device": "cuda", "tokenizer": "other", "languages": ["js"],
    "environment": "/repository", "agent_config": {"agent": {"step_limit": 7}}, "mode": "prompt", "categories": ["simple"], "task": "other.py",
    "tools": False, "start_date": "2024-11-01", "end_date": "2025-01-01",
}  # fmt: skip
ROWS = {"language": "js", "name": "x", "prompt": "y", "tests": "z", "resolved_issues": [], "title": ""}


def written(job, benchmark, monkeypatch):
    """Commands, and all that is written before the first of them."""
    module = sys.modules[benchmark.prepare.__module__]
    if benchmark.name == "held_out":
        monkeypatch.setattr(
            module, "held_out_texts", lambda job: [f"{job.settings['documents']}, {job.settings['characters']}"]
        )
    if benchmark.name == "multipl_e":
        monkeypatch.setattr(module, "problems_of", lambda job, language: [ROWS])
    benchmark.prepare(job)
    files = [path.read_text() for path in sorted(job.work.rglob("*")) if path.is_file()] if job.work.exists() else []
    return [run.shown(step, job) for step in benchmark.steps(job)], [step.sandbox for step in benchmark.steps(job)], files


SETTINGS = [(name, setting) for name, benchmark in benchmarks().items() for setting in benchmark.settings]


@pytest.mark.parametrize(("name", "setting"), SETTINGS, ids=[".".join(pair) for pair in SETTINGS])
def test_every_setting_reaches_the_tool_or_is_refused(place, monkeypatch, name, setting):
    benchmark = benchmarks()[name]
    default = benchmark.settings[setting]
    value = OTHER[setting] if setting in OTHER else default + 1 if isinstance(default, int | float) else f"{default or 5}0"
    days = [
        {"question_id": day, "contest_date": day, "question_content": ""}
        for day in ("2024-10-05", "2024-12-24", "2025-01-15")
    ]
    Path("contests/data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in days))
    rows = [
        json.loads(row) | {"resolved_issues": [], "title": ""} for row in Path("swe/dataset.jsonl").read_text().splitlines()
    ]
    Path("swe/dataset.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"checkpoint": "tiny"} if setting != "tokenizer" else ENDPOINT
    changed = request(name, **asked, settings={name: {setting: value}})
    if setting in benchmark.fixed:
        with pytest.raises(EvaluationError, match=rf"{name}\.{setting} is .* and cannot be set"):
            changed.check()
        return
    shown = []
    for asks, output in ((request(name, **asked), "one"), (changed, "two")):
        asks.check()
        job = asks.job(benchmark, 2, "http://127.0.0.1:1/v1", {e.name: Path("bin") for e in benchmark.environments})
        job.folder = place / "same" / "job"
        benchmark.resolve(job)
        shown.append(written(job, benchmark, monkeypatch))
        (place / "same").rename(place / output) if (place / "same").exists() else None
    assert shown[0] != shown[1]


@pytest.mark.parametrize("name", ["swe_bench_verified", "multi_swe_bench"])
def test_an_agents_configuration_is_changed_at_any_depth(place, name):
    """Beside what the agent needs to find the server."""
    changes = {
        "model": {"model_kwargs": {"top_p": 0.5, "extra_body": {"top_k": 7}}},
        "agent": {"step_limit": 3},
        "run": {"x": 1},
    }
    asks = request(name, checkpoint="tiny", settings={name: {"agent_config": changes}})
    job = asks.job(benchmarks()[name], 2, "http://x/v1", {})
    agents.write_config(job)
    config = json.loads((job.work / "agent.yaml").read_text())
    kwargs = config["model"]["model_kwargs"]
    assert (kwargs["api_base"], kwargs["top_p"], kwargs["extra_body"]) == ("http://x/v1", 0.5, {"top_k": 7})
    assert config["model"]["cost_tracking"] == "ignore_errors"
    assert config["agent"] == {"step_limit": 3, "cost_limit": 0}
    assert config["environment"]["run_args"] == ["--rm", "--network", "none"]
    assert config["run"] == {"x": 1}


@pytest.mark.parametrize("name", benchmarks())
def test_code_of_a_model_runs_in_a_container_or_the_sandbox(place, name):
    """Steps that judge what a model wrote."""
    asks = request(name, checkpoint="tiny")
    job = asks.job(benchmarks()[name], 2, "http://x/v1", {e.name: Path("bin") for e in benchmarks()[name].environments})
    needs = benchmarks()[name].needs
    judged = [
        step
        for step in benchmarks()[name].steps(job)
        if step.name in ("scores", "grades", "trials") or step.name.startswith("agent")
    ]
    if name in ("held_out", "mind2web"):  # nothing is executed
        assert judged == []
        return
    assert judged
    for step in judged:
        assert needs.docker or (needs.sandbox and step.sandbox == "offline")
        if "docker" in step.command[0]:
            assert step.command[step.command.index("--network") + 1] == "none"
