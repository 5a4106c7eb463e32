"""Terminal-Bench v1: tasks in a terminal, in containers, by the agent terminus-2."""

import json

from ..benchmark import Benchmark, Environment, Job, Needs, Outcome, Step, reading
from ..meter import move

NO_TRIAL = {
    "unknown_agent_error",
    "agent_installation_failed",
    "unset",
}  # failures of the server or the machine, not of the model


def steps(job: Job) -> list[Step]:
    """Return the step that runs the trials."""
    s = job.settings
    command = [
        str(job.bins["terminal-bench"] / "tb"),
        "run",
        "--dataset",
        s["dataset"],
        "--agent",
        s["agent"],
        "--model",
        f"openai/{job.model}",
        "-k",
        f"api_base={job.endpoint}",
        "-k",
        f"temperature={s['temperature']}",
        "--n-concurrent",
        str(s["workers"]),
        "--n-attempts",
        "1",
        "--run-id",
        job.key,
        "--output-path",
        str(job.work / "runs"),
        *(["--n-tasks", str(job.limit)] if job.limit else []),
    ]
    return [Step("trials", command, environment={"OPENAI_API_KEY": "none"})]


def parse(job: Job) -> Outcome:
    """Read which tasks are resolved."""
    path = job.work / "runs" / job.key / "results.json"
    if not path.exists():
        return Outcome({}, problems=["tb left no results: see trials.log"])
    with reading(path):
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        failed = [row["task_id"] for row in results if row["is_resolved"] is None or row.get("failure_mode") in NO_TRIAL]
    problems = (
        [
            f"{len(failed)} of {len(results)} trials did not take place, for instance {failed[0]}: see trials.log, and run it again"
        ]
        if failed
        else []
    )
    return Outcome(
        {row["task_id"]: float(bool(row["is_resolved"])) for row in results}, problems=problems, data=job.settings["dataset"]
    )


def prepare(job: Job) -> None:
    """Delete results of trials that never took place, since tb would not repeat them, and write the endpoint into tb.lock."""
    folder = job.work / "runs" / job.key
    move(folder.glob("tb.lock"), job.endpoint)
    for path in folder.glob("*/*/results.json"):
        try:
            failed = json.loads(path.read_text(encoding="utf-8")).get("failure_mode") in NO_TRIAL
        except ValueError:
            failed = True
        if failed:
            path.unlink()


BENCHMARK = Benchmark(
    name="terminal_bench_v1",
    title="Terminal-Bench v1",
    measures="tasks in a terminal, by an agent",
    metric="resolved",
    tool="terminal-bench 0.2.18",
    paper={1: 26.3, 2: 34.2, 3: 30.0, 4: 26.3},
    environments=(Environment("terminal-bench", python=(3, 12)),),
    needs=Needs(
        docker=True, disk_gb=50, memory_gb=16, network=("github.com",), registries=("registry-1.docker.io",), hours=4
    ),
    settings={"dataset": "terminal-bench-core==0.1.1", "agent": "terminus-2", "temperature": 0.0, "workers": 4},
    silent="data set, agent and sampling; the same lab's earlier model at temperature 0",
    run_here="its parser on recorded output; trials need Docker: not run",
    steps=steps,
    parse=parse,
    prepare=prepare,
    reads_data=False,
)
