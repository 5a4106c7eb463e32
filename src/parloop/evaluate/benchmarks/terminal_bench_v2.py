"""Terminal-Bench 2.0, by its own harness, harbor, and the agent terminus-2."""

import json
import shutil

from ..benchmark import Benchmark, Environment, Job, Needs, Outcome, Step, reading
from ..meter import move

# The agent's own failures in harbor's table. After a failure of the server harbor may still grade, but that reward says nothing about the model.
AGENTS_OWN = {
    "AgentTimeoutError", "ContextWindowExceededError", "OutputTokenExceededError", "ContextLengthExceededError", "OutputLengthExceededError",
    "AgentSafetyRefusalError", "ContentPolicyViolationError",
}  # fmt: skip


def steps(job: Job) -> list[Step]:
    """Return the step that runs the trials, or continues them."""
    s = job.settings
    limits = json.dumps({"max_input_tokens": s["input_tokens"], "max_output_tokens": s["max_tokens"]})
    command = [
        str(job.bins["harbor"] / "harbor"),
        "run",
        "-d",
        s["dataset"],
        "-a",
        s["agent"],
        "-m",
        f"openai/{job.model}",
        "--base-url",
        job.endpoint,
        "--ak",
        f"temperature={s['temperature']}",
        "--ak",
        f"model_info={limits}",
        "-k",
        "1",
        "-n",
        str(s["workers"]),
        "-o",
        str(job.work / "jobs"),
        "--job-name",
        job.key,
        "-y",
        *(["-l", str(job.limit)] if job.limit else []),
    ]
    if (job.work / "jobs" / job.key / "config.json").exists():
        command = [str(job.bins["harbor"] / "harbor"), "job", "resume", "-p", str(job.work / "jobs" / job.key)]
    return [Step("trials", command, environment={"OPENAI_API_KEY": "none", "HARBOR_TELEMETRY": "0", "HOME": str(job.work)})]


def score(trial: dict) -> float | None:
    """Return a trial's reward; None if it did not take place."""
    rewards = (trial.get("verifier_result") or {}).get("rewards") or {}
    failure = exception(trial)
    if failure not in (None, *AGENTS_OWN) or not (rewards or failure):
        return None
    return float(rewards.get("reward", 0.0))


def exception(trial: dict) -> str | None:
    """Return the type of the exception that ended a trial, or None."""
    return (trial.get("exception_info") or {}).get("exception_type")


def prepare(job: Job) -> None:
    """Delete trials that did not take place, which harbor would not repeat (`job resume -f ERROR` deletes such folders
    too).

    The endpoint is written into harbor's files, since it continues only with the settings in them.
    """
    folder = job.work / "jobs" / job.key
    for path in folder.glob("*/result.json"):
        try:
            failed = score(json.loads(path.read_text(encoding="utf-8"))) is None
        except (ValueError, AttributeError, TypeError):
            failed = True
        if failed:
            shutil.rmtree(path.parent)
    move([*folder.rglob("config.json"), *folder.rglob("lock.json")], job.endpoint)


def parse(job: Job) -> Outcome:
    """Read the rewards of the trials."""
    items: dict[str, float] = {}
    failed = []
    for path in sorted((job.work / "jobs" / job.key).glob("*/result.json")):
        with reading(path):
            trial = json.loads(path.read_text(encoding="utf-8"))
            reward = score(trial)
            if reward is None:
                failed.append(f"{trial['task_name']} ({exception(trial) or 'no reward'})")
            else:
                items[trial["task_name"]] = reward
    problems = (
        [f"{len(failed)} trials did not take place, for instance {failed[0]}: see trials.log, and run it again"]
        if failed
        else []
    )
    whole = job.work / "jobs" / job.key / "result.json"
    if whole.exists():
        with reading(whole):
            asked = json.loads(whole.read_text(encoding="utf-8"))["n_total_trials"]
            if len(items) + len(failed) < asked:
                problems.append(
                    f"{len(items) + len(failed)} of {asked} trials have a result: see trials.log, and run it again"
                )
    if not items and not failed:
        problems = ["harbor left no trials: see trials.log"]
    return Outcome(items, problems=problems, data=job.settings["dataset"])


BENCHMARK = Benchmark(
    name="terminal_bench_v2",
    title="Terminal-Bench 2.0",
    measures="harder tasks in a terminal, by an agent",
    metric="mean reward",
    tool="harbor 0.25.0",
    paper={1: 11.2, 2: 21.0, 3: 12.2, 4: 9.0},
    environments=(Environment("harbor", python=(3, 12)),),
    needs=Needs(
        docker=True,
        disk_gb=100,
        memory_gb=16,
        network=("huggingface.co", "github.com"),
        registries=("registry-1.docker.io",),
        hours=6,
    ),
    settings={
        "dataset": "terminal-bench@2.0",
        "agent": "terminus-2",
        "temperature": 0.7,
        "max_tokens": 4096,
        "input_tokens": 32768,
        "workers": 4,
    },
    silent="agent and sampling; the same lab's earlier model at temperature 0.7",
    run_here="its parser on results that its own models wrote; trials need Docker: not run",
    steps=steps,
    parse=parse,
    prepare=prepare,
    reads_data=False,
)
