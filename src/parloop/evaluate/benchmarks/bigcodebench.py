"""BigCodeBench: Python tasks that call many libraries. Its own scripts generate, and score in its image, which holds the libraries."""

import json
from pathlib import Path

from ..benchmark import Benchmark, Environment, Job, Needs, Outcome, Step, digest, reading

IMAGE = "bigcodebench/bigcodebench-evaluate:latest"


def steps(job: Job) -> list[Step]:
    """Return the steps: problems, answers and scores."""
    s, tool = job.settings, job.bins["bigcodebench"]
    own = {"HOME": str(job.work), "OPENAI_API_KEY": "none"}
    given = {"BIGCODEBENCH_OVERRIDE_PATH": str(job.data)} if job.data else {}
    problems = [
        job.python("bigcodebench"),
        str(job.drivers / "bigcodebench_driver.py"),
        str(job.work / "problems.jsonl"),
        s["subset"],
    ]
    which = ["--split", s["split"], "--subset", s["subset"]]
    generate = [
        str(tool / "bigcodebench.generate"),
        "--model",
        job.model,
        *which,
        "--backend",
        "openai",
        "--base_url",
        job.endpoint,
        "--greedy",
        "--bs",
        "1",
        "--root",
        str(job.work / "answers"),
    ]
    image = [
        "docker",
        "run",
        "--rm",
        "--network",
        "none",
        "-v",
        f"{job.work.absolute()}:/app",
        "-e",
        "BIGCODEBENCH_OVERRIDE_PATH=/app/problems.jsonl",
        IMAGE,
        "--execution",
        "local",
        *which,
        "--samples",
        f"/app/answers/{samples(job).name}",
    ]
    override = {"BIGCODEBENCH_OVERRIDE_PATH": str(job.work / "problems.jsonl")}
    limit = [str(job.limit)] if job.limit else []
    return [
        Step("problems", [*problems, *limit], server=False, environment=own | given),
        Step("answers", generate, environment=own | override),
        Step("scores", image, server=False),
    ]


def samples(job: Job) -> Path:
    """Return the file of answers that bigcodebench writes."""
    name, split, subset = job.model.replace("/", "--"), job.settings["split"], job.settings["subset"]
    which = split if subset == "full" else f"{subset}-{split}"
    return job.work / "answers" / f"{name}--main--bigcodebench-{which}--openai-0-1-sanitized_calibrated.jsonl"


def _result(job: Job, ending: str) -> Path:
    return samples(job).with_name(samples(job).stem + ending)


def prepare(job: Job) -> None:
    """Delete earlier scores."""
    for ending in ("_eval_results.json", "_pass_at_k.json"):  # bigcodebench would ask on the terminal what to do with them
        _result(job, ending).unlink(missing_ok=True)


def parse(job: Job) -> Outcome:
    """Read which tasks pass, and how many of its own solutions do."""
    path = _result(job, "_eval_results.json")
    if not path.exists():
        return Outcome({}, problems=["bigcodebench left no scores: see scores.log"])
    with reading(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        items = {
            task: sum(s["status"] == "pass" for s in samples) / len(samples) for task, samples in content["eval"].items()
        }
    with reading(rates := _result(job, "_pass_at_k.json")):
        own = json.loads(rates.read_text(encoding="utf-8"))["gt_pass_rate"]
    problems = []
    if own < 0.99:
        problems.append(
            f"only {own:.0%} of its own solutions pass their tests, so libraries are missing: pull {IMAGE} again"
        )
    return Outcome(
        items,
        parts={"its own solutions": 100 * own},
        problems=problems,
        data=f"BigCodeBench, {digest(job.work / 'problems.jsonl')}",
    )


BENCHMARK = Benchmark(
    name="bigcodebench",
    title="BigCodeBench",
    measures="Python tasks that call many libraries",
    metric="pass@1, calibrated",
    tool="bigcodebench 0.2.5",
    paper={1: 40.1, 2: 46.1, 3: 43.3, 4: 40.8},
    environments=(Environment("bigcodebench"),),
    needs=Needs(
        docker=True, disk_gb=20, memory_gb=16, network=("huggingface.co",), registries=("registry-1.docker.io",), hours=1
    ),
    settings={"split": "instruct", "subset": "full", "temperature": 0.0, "top_p": 0.95, "max_tokens": 1280, "samples": 1},
    fixed=("temperature", "top_p", "max_tokens", "samples"),
    silent="split, subset and sampling; the same lab's earlier model was measured greedily",
    run_here="its parser on recorded output; generation and scoring ran by hand on tasks of our own, not in the tests",
    steps=steps,
    parse=parse,
    prepare=prepare,
)
