"""HumanEval+: 164 Python functions from their docstrings, with many more tests than HumanEval's. evalplus generates and scores."""

import json

from ..benchmark import Benchmark, Environment, Job, Needs, Outcome, Step, digest, reading

ENVIRONMENT = Environment("evalplus")


def steps(job: Job) -> list[Step]:
    """Return the steps: problems, answers and scores."""
    driver = [job.python("evalplus"), str(job.drivers / "evalplus_driver.py")]
    root = ["--model", job.key, "--dataset", "humaneval", "--root", str(job.work / "answers")]
    own = {"XDG_CACHE_HOME": str(job.work / "cache"), "OPENAI_API_KEY": "none", "PARLOOP_MODEL": job.model}
    problems = {"HUMANEVAL_OVERRIDE_PATH": str(job.work / "problems.jsonl")}
    given = {"HUMANEVAL_OVERRIDE_PATH": str(job.data)} if job.data else {}
    limit = ["--limit", str(job.limit)] if job.limit else []
    return [
        Step(
            "problems",
            [*driver, "problems", str(job.work / "problems.jsonl"), *limit],
            server=False,
            environment=own | given,
        ),
        Step(
            "answers",
            [*driver, "codegen", *root, "--backend", "openai", "--base-url", job.endpoint, "--greedy"],
            environment=own | problems,
        ),
        Step(
            "scores",
            [
                *driver,
                "evaluate",
                "--dataset",
                "humaneval",
                "--samples",
                str(answers(job)),
                "--parallel",
                str(job.settings["parallel"]),
            ],
            sandbox="offline",
            server=False,
            environment=own | problems,
        ),
    ]


def answers(job: Job):
    """Return the file of answers that evalplus writes."""
    return job.work / "answers" / "humaneval" / f"{job.key}_openai_temp_0.0.jsonl"


def prepare(job: Job) -> None:
    """Delete earlier scores, which evalplus would return again, even for other problems."""
    scores(job).unlink(missing_ok=True)


def scores(job: Job):
    """Return the file of scores that evalplus writes."""
    return answers(job).with_name(answers(job).stem + "_eval_results.json")


def parse(job: Job) -> Outcome:
    """Read which problems pass all tests, and which pass HumanEval's."""
    if not scores(job).exists():
        return Outcome({}, problems=["evalplus left no scores: see scores.log"])
    items, base = {}, {}
    with reading(scores(job)):
        content = json.loads(scores(job).read_text(encoding="utf-8"))
        for task, samples in content["eval"].items():
            base[task] = sum(s["base_status"] == "pass" for s in samples) / len(samples)
            items[task] = sum(s["base_status"] == s["plus_status"] == "pass" for s in samples) / len(samples)
    problems = job.work / "problems.jsonl"
    asked = len(problems.read_bytes().splitlines())
    missing = [] if len(items) == asked else [f"{len(items)} of {asked} problems have a score: run it again"]
    return Outcome(
        items,
        parts={"HumanEval (without the added tests)": 100 * sum(base.values()) / max(len(base), 1)},
        problems=missing,
        data=f"HumanEval+ of evalplus 0.3.1, {digest(problems)}",
    )


BENCHMARK = Benchmark(
    name="humaneval_plus",
    title="HumanEval+",
    measures="Python functions from their docstrings, with 80 times HumanEval's tests",
    metric="pass@1",
    tool="evalplus 0.3.1",
    paper={1: 81.1, 2: 84.1, 3: 75.0, 4: 76.8},
    environments=(ENVIRONMENT,),
    needs=Needs(sandbox=True, disk_gb=1, network=("github.com",), hours=0.2),
    settings={"temperature": 0.0, "top_p": 0.95, "max_tokens": 768, "samples": 1, "prompt": "evalplus chat", "parallel": 2},
    fixed=("temperature", "top_p", "max_tokens", "samples", "prompt"),
    silent="sampling; the same lab's earlier model was measured greedily. evalplus fixes top_p 0.95 and 768 tokens",
    run_here="end to end on a problem of our own, against our server and against a scripted one",
    steps=steps,
    parse=parse,
    prepare=prepare,
)
