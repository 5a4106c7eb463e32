"""The parsers on each tool's output. recorded/README.md says which of these files are real."""

import gzip
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from parloop.errors import EvaluationError
from parloop.evaluate.benchmark import Job, benchmarks
from parloop.evaluate.benchmarks import bfcl_v3

RECORDED = Path(__file__).parent / "recorded"
CATEGORIES = ["live_parallel", "live_relevance"]


def copy(tool, folder):
    shutil.copytree(RECORDED / tool, folder, dirs_exist_ok=True)


def agent(job, names, trajectory="tools-fix", patch="diff --git a/calc.py b/calc.py\n"):
    """Write mini-swe-agent's output for these instances."""
    entries = {name: {"model_name_or_path": "openai/toy@2", "instance_id": name, "model_patch": patch} for name in names}
    for name in names:
        folder = job.work / "agent" / name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(RECORDED / "mini-swe-agent" / f"{trajectory}.traj.json", folder / f"{name}.traj.json")
    (job.work / "agent" / "preds.json").write_text(json.dumps(entries))


def change(path, *keys, to):
    """Set a field of a JSON file."""
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    path.write_text(json.dumps(content))


# Each puts a tool's files where its parser looks; returns the file that the number comes from.


def evalplus(job):
    copy("evalplus", job.work)
    return job.work / "answers/humaneval/toy-2_openai_temp_0.0_eval_results.json"


def multipl_e(job):
    copy("multipl-e", job.work)
    plain = job.work / "programs/js/HumanEval_53_add.results.json"
    packed = plain.with_suffix(".json.gz")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    return packed


def bigcodebench(job):
    copy("bigcodebench", job.work)
    return next(job.work.glob("answers/*_eval_results.json"))


def livecodebench(job):
    copy("livecodebench", job.work)
    job.data = job.folder / "data"
    (job.data / "LiveCodeBench" / "lcb_runner").mkdir(parents=True)
    for path in (job.data / "data.jsonl", job.work / "window.jsonl"):
        path.write_text('{"question_id": "1873_A"}\n{"question_id": "2777"}\n')
    return job.work / "out_codegeneration_output_eval_all.json"


def swebench(job):
    agent(job, [f"toy__calc-{n}" for n in (1, 2, 3, 4)])
    shutil.copy(RECORDED / "swebench/preds.json", job.work / "agent")
    (job.work / "report").mkdir()
    report = job.work / "report/openai__toy@2.toy-2.json"
    shutil.copy(RECORDED / "swebench/report.json", report)
    change(report, "infra_failure_ids", to=[])
    return report


def multi_swe_bench(job):
    job.data = job.folder / "data"
    job.data.mkdir()
    (job.data / "dataset.jsonl").write_text("{}\n")
    agent(job, ["clap-rs__clap-1", "clap-rs__clap-3", "clap-rs__clap-12", "cli__cli-2"])
    copy("multi-swe-bench", job.work / "report")
    return job.work / "report/final_report.json"


def terminal_bench(job):
    folder = job.work / "runs/toy-2"
    copy("terminal-bench", folder)
    path = folder / "results.json"
    rows = json.loads(path.read_text())["results"]
    change(path, "results", to=[rows[0], rows[2]])  # one attempt each
    return path


def harbor(job):
    folder = job.work / "jobs/toy-2"
    for name in ("aaa", "bbb", "ccc"):
        (folder / name).mkdir(parents=True)
        shutil.copy(RECORDED / "harbor/trial.json", folder / name / "result.json")
        change(folder / name / "result.json", "task_name", to=name)
    change(folder / "aaa/result.json", "verifier_result", "rewards", "reward", to=1.0)
    change(folder / "bbb/result.json", "verifier_result", to=None)  # a timeout without a verdict
    shutil.copy(RECORDED / "harbor/job.json", folder / "result.json")
    change(folder / "result.json", "n_total_trials", to=3)
    return folder / "aaa/result.json"


def inspect(job, name="mind2web"):
    (job.work / "logs").mkdir(parents=True)
    return Path(shutil.copy(RECORDED / f"inspect/{name}.json", job.work / "logs"))


def bfcl(job):
    copy("bfcl", job.work)
    return job.work / "score/m-toy-2-FC/BFCL_v3_live_parallel_score.json"


def lm_eval(job):
    copy("lm-eval", job.work)
    return next(job.work.glob("out/*/samples_*.jsonl"))


PLACED = {
    "held_out": lm_eval, "humaneval_plus": evalplus, "multipl_e": multipl_e, "bigcodebench": bigcodebench, "livecodebench": livecodebench,
    "swe_bench_verified": swebench, "swe_bench_multilingual": swebench, "multi_swe_bench": multi_swe_bench, "terminal_bench_v1": terminal_bench,
    "terminal_bench_v2": harbor, "mind2web": inspect, "bfcl_v3": bfcl,
}  # fmt: skip
EXPECTED = {
    "humaneval_plus": {"HumanEval/0": 2 / 3, "HumanEval/1": 1.0},
    "multipl_e": {"js/HumanEval_53_add": 0.25},
    "bigcodebench": {"BigCodeBench/0": 1.0, "BigCodeBench/1": 0.0},
    "livecodebench": {"1873_A": 0.5, "2777": 0.5},
    # Without a patch, with one that was not graded, and never tried: all count.
    "swe_bench_verified": {
        "toy__calc-1": 1.0,
        "toy__calc-2": 0.0,
        "toy__calc-3": 0.0,
        "toy__calc-4": 0.0,
        "toy__calc-5": 0.0,
    },
    "multi_swe_bench": {"clap-rs__clap-1": 1.0, "clap-rs__clap-3": 0.0, "clap-rs__clap-12": 0.0, "cli__cli-2": 0.0},
    "terminal_bench_v1": {"hello-world": 1.0, "fix-git": 0.0},
    "terminal_bench_v2": {"aaa": 1.0, "bbb": 0.0, "ccc": 0.0},
    "mind2web": {"task1_a0": 1.0, "task1_a1": 1.0},
}


@pytest.fixture
def job(tmp_path, request):
    """Return a job of the benchmark that the test has as its parameter `name`."""
    benchmark = benchmarks()[request.getfixturevalue("name")]
    settings = benchmark.settings | ({"categories": CATEGORIES} if benchmark.name == "bfcl_v3" else {})
    job = Job(folder=tmp_path / "job", endpoint="", model="toy@2", loops=2, settings=settings)
    job.work.mkdir(parents=True)
    return job


@pytest.fixture(params=PLACED)
def name(request):
    return request.param


def test_every_benchmark_has_recorded_output():
    assert PLACED.keys() == benchmarks().keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_items(name, job):
    PLACED[name](job)
    outcome = benchmarks()[name].parse(job)
    assert outcome.problems == []
    assert outcome.items == pytest.approx(EXPECTED[name])
    assert outcome.value == pytest.approx(100 * sum(EXPECTED[name].values()) / len(EXPECTED[name]))
    assert outcome.data


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("humaneval_plus", {"HumanEval (without the added tests)": 100 * 5 / 6}),
        ("multipl_e", {"js": 25.0}),
        ("bigcodebench", {"its own solutions": 100.0}),
        ("livecodebench", {"easy": 50.0, "medium": 50.0}),
        (
            "swe_bench_verified",
            {"leaks": {}, "instances with a leak": 0, "resolved without a leak": 20.0, "empty patches": 1, "errors": 1},
        ),
        ("multi_swe_bench", {"leaks": {}, "instances with a leak": 0, "errors": 2}),
        (
            "mind2web",
            {"element_accuracy": 100.0, "action_f1": 100.0, "step_success_rate": 100.0, "task_success_rate": 100.0},
        ),
        ("bfcl_v3", {"accuracy": {"live_parallel": 0.5, "live_relevance": 0.5}}),
    ],
)
def test_parts(name, job, parts):
    PLACED[name](job)
    close = {part: pytest.approx(value) if isinstance(value, float) else value for part, value in parts.items()}
    assert benchmarks()[name].parse(job).parts == close


@pytest.mark.parametrize("name", ["held_out"])
def test_the_loss_is_lm_evals(name, job):
    PLACED[name](job)
    (path,) = job.work.glob("out/*/results_*.json")
    outcome = benchmarks()[name].parse(job)
    assert outcome.value == pytest.approx(
        json.loads(path.read_text())["results"]["held_out"]["bits_per_byte,none"], rel=1e-9
    )
    assert len(outcome.items) == 5
    texts = [json.loads(line)["text"] for line in (job.work / "held_out.jsonl").read_text().splitlines()]
    assert list(outcome.weights.values()) == [len(text.encode()) for text in texts]


@pytest.mark.parametrize("name", ["bfcl_v3"])
def test_wrong_calls_are_those_with_a_row_in_the_scores(name, job):
    path = PLACED[name](job)
    outcome = benchmarks()[name].parse(job)
    assert outcome.problems == []
    wrong = [json.loads(line)["id"] for line in path.read_text().splitlines()[1:]]
    assert len(wrong) == 8
    assert {item for item, right in outcome.items.items() if not right and item.startswith("live_parallel")} == set(wrong)
    assert len(outcome.items) == 16 + 18


# Made-up accuracies (percent) and numbers of items, whose table bfcl-eval 2025.8.6.2 wrote: 58.54, 35.45 and 63.65, and 52.55 over all.
TABLE = {
    "simple": (48.79, 147), "java": (89.33, 592), "javascript": (38.98, 877), "multiple": (60.74, 831), "parallel": (76.72, 792),
    "parallel_multiple": (69.58, 74), "irrelevance": (26.63, 271), "live_simple": (80.18, 130), "live_multiple": (59.12, 517),
    "live_parallel": (10.22, 789), "live_parallel_multiple": (31.74, 470), "live_irrelevance": (2.23, 493),
    "live_relevance": (64.95, 677), "multi_turn_base": (0.92, 398), "multi_turn_miss_func": (88.12, 817),
    "multi_turn_miss_param": (68.65, 224), "multi_turn_long_context": (96.9, 106),
}  # fmt: skip


def test_the_overall_of_bfcl_v3():
    found = bfcl_v3.overall({name: row[0] for name, row in TABLE.items()}, {name: row[1] for name, row in TABLE.items()})
    assert found == pytest.approx({"non_live": 58.54, "live": 35.45, "multi_turn": 63.65, "overall": 52.55}, abs=0.006)


@pytest.mark.parametrize("name", ["bfcl_v3"])
def test_all_categories_give_version_3s_number(name, job):
    job.settings["categories"] = []
    for category, (accuracy, count) in TABLE.items():
        for kind, rows in (("score", [{"accuracy": accuracy / 100, "total_count": count}]), ("result", [{"id": category}])):
            path = job.work / kind / "m-toy-2-FC" / f"BFCL_v3_{category}_{kind}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = benchmarks()[name].parse(job)
    assert outcome.value == pytest.approx(52.55, abs=0.006)
    assert outcome.parts["live"] == pytest.approx(0.3545, abs=1e-4)


# What is no result


def _torn_answers(job, row):
    path = next(job.work.glob("result/*/BFCL_v3_live_parallel_result.json"))
    path.write_text(
        path.read_text() + json.dumps({"id": "x", "result": "Error during inference", "traceback": "..."} | row) + "\n"
    )


def _status(job, instance, status):
    change(job.work / "agent" / instance / f"{instance}.traj.json", "info", "exit_status", to=status)


def _all_failed(job, path):
    for field in ("completed_ids", "resolved_ids"):
        change(path, field, to=[])


NO_RESULT = [
    ("humaneval_plus", lambda job, path: (job.work / "problems.jsonl").open("a").write("{}\n"), "2 of 3 problems have a score"),
    ("humaneval_plus", lambda job, path: path.unlink(), "evalplus left no scores: see scores.log"),
    ("multipl_e", lambda job, path: (job.work / "problems.jsonl").open("a").write("{}\n"), "1 of 2 problems were run"),
    ("bigcodebench", lambda job, path: path.unlink(), "bigcodebench left no scores"),
    (
        "bigcodebench",
        lambda job, path: change(Path(str(path).replace("_eval_results", "_pass_at_k")), "gt_pass_rate", to=0.5),
        "only 50% of its own solutions pass their tests",
    ),
    ("livecodebench", lambda job, path: path.unlink(), "the scorer left nothing: see scores.log"),
    ("held_out", lambda job, path: path.unlink(), "lm-eval left no samples: see losses.log"),
    ("held_out", lambda job, path: path.write_text(path.read_text()[:-100]), "4 of 5 documents have a loss"),
    ("bfcl_v3", lambda job, path: path.unlink(), "no score of live_parallel: run it again"),
    ("bfcl_v3", lambda job, path: _torn_answers(job, {}), "1 answers of live_parallel are errors of the server"),
    ("mind2web", lambda job, path: path.unlink(), "inspect left no log: see answers.log"),
    ("mind2web", lambda job, path: path.write_text("{"), "inspect left no log"),
    ("terminal_bench_v1", lambda job, path: path.unlink(), "tb left no results: see trials.log"),
    (
        "terminal_bench_v1",
        lambda job, path: shutil.copy(RECORDED / "terminal-bench/no-docker.json", path),
        "1 of 1 trials did not take place, for instance hello",
    ),
    ("terminal_bench_v2", lambda job, path: shutil.rmtree(job.work), "harbor left no trials: see trials.log"),
    ("terminal_bench_v2", lambda job, path: shutil.rmtree(path.parent), "2 of 3 trials have a result"),
    (
        "terminal_bench_v2",
        lambda job, path: (change(path, "verifier_result", to=None), change(path, "exception_info", "exception_type", to="RuntimeError")),
        r"1 trials did not take place, for instance aaa \(RuntimeError\)",
    ),
    (  # graded all the same
        "terminal_bench_v2",
        lambda job, path: change(path, "exception_info", "exception_type", to="ApiConnectionError"),
        r"1 trials did not take place, for instance aaa \(ApiConnectionError\)",
    ),
    ("swe_bench_verified", lambda job, path: path.unlink(), "swebench left no report: see grades.log"),
    (
        "swe_bench_verified",
        lambda job, path: shutil.copy(RECORDED / "swebench/report.json", path),
        r"1 instances could not be graded \(infrastructure\)",
    ),
    (
        "swe_bench_verified",
        lambda job, path: _status(job, "toy__calc-2", "RateLimitError"),
        r"1 of 4 instances were cut short by the server or their container, toy__calc-2 for one \(RateLimitError\)",
    ),
    ("multi_swe_bench", lambda job, path: path.unlink(), "multi-swe-bench left no report: see grades.log"),
    ("multi_swe_bench", _all_failed, "none of 4 instances was graded: see grades.log"),
    ("multi_swe_bench", lambda job, path: _status(job, "cli__cli-2", "InternalServerError"), r"1 of 4 instances were cut short .* \(InternalServerError\)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fault", "message"), NO_RESULT, ids=[f"{row[0]}-{row[2][:30]}" for row in NO_RESULT])
def test_what_is_incomplete_is_no_result(name, job, fault, message):
    path = PLACED[name](job)
    fault(job, path)
    problems = benchmarks()[name].parse(job).problems
    assert len(problems) == 1
    assert re.search(message, problems[0])


@pytest.mark.parametrize("name", ["mind2web"])
@pytest.mark.parametrize(
    ("log", "messages"),
    [
        ("one-failed", ["1 of 3 samples have no score"]),
        ("stopped", ["inspect's status is 'error': Error code: 400", "1 of 3 samples have no score"]),
    ],
)
def test_samples_that_failed_in_inspect(name, job, log, messages):
    """Its exit code is 0 for both."""
    inspect(job, log)
    outcome = benchmarks()[name].parse(job)
    assert [problem.startswith(message) for problem, message in zip(outcome.problems, messages, strict=True)] == [
        True
    ] * len(messages)
    assert outcome.items == {"s1": 1.0, "s3": 0.0}


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[1]", '{"eval": {"x": []}, "results": [{}], "items": 1}'])
def test_a_file_of_another_form(name, job, content):
    """Torn, empty, or of another version of the tool: the message names the file and what to do, or takes it for missing."""
    path = PLACED[name](job)
    path.write_bytes(gzip.compress(content.encode())) if path.suffix == ".gz" else path.write_text(content)
    try:
        outcome = benchmarks()[name].parse(job)
        refused = bool(outcome.problems) or not outcome.items
    except EvaluationError as error:
        refused = str(path) in str(error) and "run the same command again" in str(error)
    assert refused


@pytest.mark.parametrize("name", ["multipl_e"])
def test_a_packed_file_that_was_torn(name, job):
    path = PLACED[name](job)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(EvaluationError, match=rf"{path.name}.*the same command again"):
        benchmarks()[name].parse(job)


# Agents


@pytest.mark.parametrize("name", ["swe_bench_verified", "multi_swe_bench"])
@pytest.mark.parametrize("how", ["tools", "text"])
def test_leaks_are_beside_the_score(name, job, how):
    """The patch of the agent that looked is the honest one to the letter: it counts, and the score without it is beside."""
    PLACED[name](job)
    first = "toy__calc-1" if name == "swe_bench_verified" else "clap-rs__clap-1"
    shutil.copy(RECORDED / f"mini-swe-agent/{how}-cheat.traj.json", job.work / "agent" / first / f"{first}.traj.json")
    outcome = benchmarks()[name].parse(job)
    assert outcome.items[first] == 1.0
    assert outcome.parts["instances with a leak"] == 1
    assert [hit["command"].split()[1] for hit in outcome.parts["leaks"][first]] == ["log", "show", "checkout"]
    assert json.dumps(outcome.parts)
    if name == "swe_bench_verified":
        assert outcome.parts["resolved without a leak"] == 0.0


@pytest.mark.parametrize("name", ["swe_bench_verified"])
def test_a_limit_counts_what_was_asked_for(name, job):
    """swebench grades the whole data set, and calls the rest of it incomplete."""
    path = PLACED[name](job)
    agent(job, ["toy__calc-1", "toy__calc-2"])
    change(path, "submitted_ids", to=["toy__calc-1", "toy__calc-2"])
    change(path, "incomplete_ids", to=["toy__calc-3", "toy__calc-4", "toy__calc-5"])
    job.limit = 2
    for folder in ("toy__calc-3", "toy__calc-4"):
        shutil.rmtree(job.work / "agent" / folder)
    outcome = benchmarks()[name].parse(job)
    assert outcome.items == {"toy__calc-1": 1.0, "toy__calc-2": 0.0}
    assert outcome.value == 50.0
    job.limit = 100
    assert benchmarks()[name].parse(job).value == 20.0  # of five that there are


@pytest.mark.parametrize("name", ["swe_bench_verified"])
def test_answers_without_an_action_are_the_models(name, job):
    PLACED[name](job)
    agent(job, ["toy__calc-1", "toy__calc-2", "toy__calc-3", "toy__calc-4"], "no-action", patch="")
    assert benchmarks()[name].parse(job).problems == []


@pytest.mark.parametrize("name", ["swe_bench_verified"])
def test_what_the_server_failed_is_asked_again(name, job):
    PLACED[name](job)
    agent(job, ["toy__calc-1", "toy__calc-2", "toy__calc-3", "toy__calc-4"])
    shutil.copy(RECORDED / "mini-swe-agent/server-failed.traj.json", job.work / "agent/toy__calc-2/toy__calc-2.traj.json")
    (job.work / "agent/toy__calc-3/toy__calc-3.traj.json").write_text('{"info": ')  # written while the disk was full
    (problem,) = benchmarks()[name].parse(job).problems
    assert problem.startswith(
        "2 of 4 instances were cut short by the server or their container, toy__calc-2 for one (RateLimitError)"
    )
    benchmarks()[name].prepare(job)
    kept = json.loads((job.work / "agent/preds.json").read_text())
    assert list(kept) == ["toy__calc-1", "toy__calc-4"]


@pytest.mark.parametrize("name", ["swe_bench_verified", "multi_swe_bench"])
def test_a_container_that_did_not_start_is_told(name, job):
    """There is no trajectory; the last list of statuses has it."""
    PLACED[name](job)
    first = min(json.loads((job.work / "agent/preds.json").read_text()))
    shutil.rmtree(job.work / "agent" / first)
    for number, status in ((1, "TimeoutExpired"), (2, "CalledProcessError")):
        path = job.work / f"agent/exit_statuses_{number}.yaml"
        path.write_text(f"instances_by_exit_status:\n    {status}:\n    - {first}\n")
        os.utime(path, (number, number))
    (problem,) = benchmarks()[name].parse(job).problems
    assert f"{first} for one (CalledProcessError)" in problem


@pytest.mark.parametrize("name", ["bfcl_v3"])
def test_answers_that_are_errors_are_asked_again(name, job):
    PLACED[name](job)
    _torn_answers(job, {})
    benchmarks()[name].prepare(job)
    outcome = benchmarks()[name].parse(job)
    assert outcome.problems == []
    assert "x" not in outcome.items


@pytest.mark.parametrize("name", ["terminal_bench_v1"])
def test_trials_that_did_not_take_place_are_done_again(name, job):
    folder = job.work / "runs/toy-2"
    for trial, mode in (("a", "unknown_agent_error"), ("b", "none"), ("c", "agent_timeout"), ("d", None)):
        (folder / trial / "1").mkdir(parents=True)
        (folder / trial / "1/results.json").write_text(json.dumps({"failure_mode": mode}) if mode else "{")
    benchmarks()[name].prepare(job)
    assert sorted(path.parts[-3] for path in folder.glob("*/*/results.json")) == ["b", "c"]


@pytest.mark.parametrize("name", ["terminal_bench_v2"])
def test_harbors_trials_that_did_not_take_place_are_done_again(name, job):
    """Their folders go, as with its -f; timeouts, and what is under way, stay."""
    path = PLACED[name](job)
    change(path, "exception_info", "exception_type", to="ApiConnectionError")
    folder = path.parents[1]
    for trial in ("torn", "running"):
        (folder / trial).mkdir()
    (folder / "torn/result.json").write_text("{")
    benchmarks()[name].prepare(job)
    assert sorted(trial.name for trial in folder.iterdir() if trial.is_dir()) == ["bbb", "ccc", "running"]
    assert (folder / "result.json").exists()


@pytest.mark.parametrize("name", ["terminal_bench_v1", "terminal_bench_v2"])
def test_a_run_goes_on_at_another_address(name, job):
    """Both tools compare, or replay, the address that they began with."""
    files = {
        "terminal_bench_v1": ["runs/toy-2/tb.lock"],
        "terminal_bench_v2": ["jobs/toy-2/config.json", "jobs/toy-2/aaa/config.json"],
    }[name]
    for file in files:
        (job.work / file).parent.mkdir(parents=True, exist_ok=True)
        (job.work / file).write_text('{"base_url": "http://127.0.0.1:4001/v1", "n": 1}')
    job.endpoint = "http://127.0.0.1:4002/v1"
    benchmarks()[name].prepare(job)
    assert {(job.work / file).read_text() for file in files} == {'{"base_url": "http://127.0.0.1:4002/v1", "n": 1}'}


@pytest.mark.parametrize("name", ["bigcodebench"])
def test_the_hard_subset_has_files_of_its_own(name, job):
    PLACED[name](job)
    job.settings["subset"] = "hard"
    assert benchmarks()[name].parse(job).problems == ["bigcodebench left no scores: see scores.log"]
    for path in (job.work / "answers").iterdir():
        path.rename(path.with_name(path.name.replace("--bigcodebench-", "--bigcodebench-hard-")))
    assert benchmarks()[name].parse(job).items == EXPECTED[name]


# Which data


def test_other_problems_are_other_data(name, job):
    """For benchmarks whose data are passed, or not pinned."""
    PLACED[name](job)
    if name.startswith("swe_bench"):
        job.data = job.folder / "data"
        job.data.mkdir()
        (job.data / "test.jsonl").write_text("{}\n")
    files = {
        "livecodebench": "work/window.jsonl",
        "multi_swe_bench": "data/dataset.jsonl",
        "multipl_e": "work/problems.jsonl",
    }
    file = job.folder / files.get(name, "data/test.jsonl" if name.startswith("swe_bench") else "none")
    before = benchmarks()[name].parse(job).data
    if file.exists():
        file.write_text(file.read_text().replace("{", "{ "))
        assert "sha256" in before
        assert benchmarks()[name].parse(job).data != before


@pytest.mark.parametrize("name", ["livecodebench"])
def test_the_checkouts_commit_is_told(name, job):
    PLACED[name](job)
    assert benchmarks()[name].parse(job).data.endswith("LiveCodeBench at an unknown commit")
    git = ["git", "-C", str(job.data / "LiveCodeBench"), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    assert re.search("LiveCodeBench at [0-9a-f]{40}$", benchmarks()[name].parse(job).data)


@pytest.mark.parametrize("name", ["humaneval_plus", "bigcodebench"])
def test_an_old_score_is_not_read_again(name, job):
    """Both tools would give it again, also of other answers."""
    path = PLACED[name](job)
    benchmarks()[name].prepare(job)
    assert not path.exists()
