"""Mind2Web: the next action on a web page, chosen among candidate elements, by inspect-evals' task."""

import json
from pathlib import Path

from ..benchmark import Benchmark, Environment, Job, Needs, Outcome, Step, reading


def steps(job: Job) -> list[Step]:
    """Return the step that runs inspect, or continues its last log."""
    s = job.settings
    command = [
        str(job.bins["inspect"] / "inspect"),
        "eval",
        s["task"],
        "--model",
        f"openai-api/plt/{job.model}",
        "-T",
        f"split={s['split']}",
        "--temperature",
        str(s["temperature"]),
        "--max-tokens",
        str(s["max_tokens"]),
        "--max-retries",
        "3",
        "--attempt-timeout",
        "600",
        "--max-connections",
        str(s["connections"]),
        "--no-fail-on-error",
        "--log-format",
        "json",
        "--log-dir",
        str(job.work / "logs"),
    ]
    own = {
        "INSPECT_DISPLAY": "plain",
        "PLT_BASE_URL": job.endpoint,
        "PLT_API_KEY": "none",
        "HOME": str(job.work),
        "INSPECT_EVALS_CACHE_DIR": str(job.work / "cache"),
        "XDG_DATA_HOME": str(job.work / "share"),
    }
    folder = None
    if (
        s["task"] != TASK
    ):  # a task file of our own has no split, and inspect needs its name relative to the working directory
        folder, name = Path(s["task"]).absolute().parent, Path(s["task"]).name
        command[2] = name
        command = command[: command.index("-T")] + command[command.index("-T") + 2 :]
    before = newest(job)
    if before is not None and json.loads(before.read_text(encoding="utf-8"))["samples"]:
        retry = [
            str(job.bins["inspect"] / "inspect"),
            "eval-retry",
            str(before),
            "--log-dir",
            str(job.work / "logs"),
            "--max-retries",
            "3",
        ]
        return [Step("answers", retry, environment=own, folder=folder)]
    return [Step("answers", [*command, *(["--limit", str(job.limit)] if job.limit else [])], environment=own, folder=folder)]


def newest(job: Job) -> Path | None:
    """Return the last readable log."""
    for path in sorted((job.work / "logs").glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            if "samples" in json.loads(path.read_text(encoding="utf-8")):
                return path
        except (ValueError, TypeError):
            continue
    return None


def parse(job: Job) -> Outcome:
    """Read the scores of the samples."""
    path = newest(job)
    if path is None:
        return Outcome({}, problems=["inspect left no log: see answers.log"])
    with reading(path):
        return _outcome(json.loads(path.read_text(encoding="utf-8")))


def _outcome(log: dict) -> Outcome:
    scored = [sample for sample in log.get("samples") or [] if sample.get("scores")]
    total = (log.get("results") or {}).get("total_samples") or len(log.get("samples") or [])
    problems = []
    if log["status"] != "success":
        problems.append(f"inspect's status is {log['status']!r}: {(log.get('error') or {}).get('message', '')[:300]}")
    if len(scored) < total:
        problems.append(f"{total - len(scored)} of {total} samples have no score, since the server failed: run it again")
    items: dict[str, float] = {}
    parts: dict[str, float] = {}
    for sample in scored:
        (score,) = sample["scores"].values()
        value = score["value"]
        items[str(sample["id"])] = float(value["element_acc"] if isinstance(value, dict) else value == "C")
    for score in (log.get("results") or {}).get("scores", []):
        parts |= {
            name: 100 * metric["value"] for name, metric in score["metrics"].items() if isinstance(metric["value"], float)
        }
    return Outcome(
        items, parts=parts, problems=problems, data=f"{log['eval']['dataset'].get('name') or log['eval']['task']}"
    )


TASK = "inspect_evals/mind2web"
BENCHMARK = Benchmark(
    name="mind2web",
    title="Mind2Web",
    measures="the next action on a web page, among candidate elements",
    metric="element accuracy; step success rate and action F1 beside it",
    tool="inspect-evals 0.26.0 on inspect-ai 0.3.285",
    paper={1: 35.3, 2: 34.5, 3: 35.1, 4: 41.4},
    environments=(Environment("inspect"),),
    needs=Needs(disk_gb=20, network=("huggingface.co",), hours=3),
    settings={"task": TASK, "split": "test_domain", "temperature": 0.0, "max_tokens": 100, "connections": 8},
    silent="split, candidates and metric: no match with the paper's number can be claimed",
    run_here="inspect on a task of our own, against our server and against a scripted one; Mind2Web's data need the Hub: not run",
    steps=steps,
    parse=parse,
    reads_data=False,
)
