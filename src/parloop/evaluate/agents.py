"""mini-swe-agent on SWE-bench-like tasks: its command, its predictions, which of them to repeat, and conversion to other formats."""

import contextlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from ..errors import EvaluationError
from .benchmark import Job, Step, reading
from .leak_scan import Hit, scan

# The agent ended by itself. Every other status is a failure of the server, and the instance is asked again.
ENDED = {"Submitted", "LimitsExceeded", "TimeExceeded", "ContextWindowExceededError", "RepeatedFormatError"}
SETTINGS: dict[str, Any] = {  # defaults of every benchmark that this agent runs
    "tools": True, "temperature": 0.0, "top_p": 1.0, "max_tokens": None, "step_limit": 250, "workers": 4, "environment": "docker",
    "agent_config": {},
}  # fmt: skip
INSTANCE = re.compile(r"(?P<org>[^_].*?)__(?P<repo>.+)-(?P<number>\d+)")


def agent_step(job: Job, subset: str, name: str = "agent", more: tuple[str, ...] = ()) -> Step:
    """Return the step that runs the agent on every instance of a data set.

    Args:
        job: the job.
        subset: the data set: a name that mini-swe-agent knows, or a folder with test.jsonl.
        name: name of the step.
        more: further options, to select a part of the instances.
    """
    s = job.settings
    command = [
        str(job.bins["mini-swe-agent"] / "mini-extra"), "swebench", "--subset", subset, "--split", "test", "-o", str(job.work / "agent"),
        "-m", f"openai/{job.model}", "-w", str(s["workers"]),
        "-c", "swebench.yaml" if s["tools"] else "swebench_backticks.yaml", "-c", str(job.work / "agent.yaml"),
        *(["--slice", f"0:{job.limit}"] if job.limit else []), *more,
    ]  # fmt: skip
    own = {
        "MSWEA_SILENT_STARTUP": "1", "MSWEA_CONFIGURED": "true", "MSWEA_GLOBAL_CONFIG_DIR": str(job.work / "mswea"), "OPENAI_API_KEY": "none",
        "MSWEA_MODEL_RETRY_STOP_AFTER_ATTEMPT": "3", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False",
    }  # fmt: skip
    if s["environment"] != "docker":
        own["PATH"] = f"{sys.base_prefix}/bin:/usr/local/bin:/usr/bin:/bin"
    # With Docker, the tool isolates the agent; an agent that works on this machine's files runs in the sandbox.
    sandbox = "" if s["environment"] == "docker" else "online"
    return Step(name, command, sandbox=sandbox, environment=own)


def write_config(job: Job) -> None:
    """Write the settings that differ from mini-swe-agent's own, as YAML (JSON is a subset of it)."""
    s = job.settings
    kwargs = {"api_base": job.endpoint, "temperature": s["temperature"], "top_p": s["top_p"], "timeout": 600}
    if s["max_tokens"]:
        kwargs["max_tokens"] = s["max_tokens"]
    model: dict[str, Any] = {"model_kwargs": kwargs, "cost_tracking": "ignore_errors"}
    if not s["tools"]:
        model["model_class"] = "litellm_textbased"
    environment: dict[str, Any]
    if s["environment"] == "docker":
        environment = {"run_args": ["--rm", "--network", "none"], "pull_timeout": 3600}
    else:
        environment = {"environment_class": "local", "cwd": s["environment"], "env": {"BASH_ENV": ""}}
    config = {"model": model, "environment": environment, "agent": {"step_limit": s["step_limit"], "cost_limit": 0}}
    job.work.mkdir(parents=True, exist_ok=True)
    (job.work / "agent.yaml").write_text(json.dumps(_merged(config, s["agent_config"]), indent=1), encoding="utf-8")


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Merge changes at any depth, as mini-swe-agent merges its own files."""
    deep = {
        name: _merged(base[name], value)
        for name, value in changes.items()
        if isinstance(value, dict) and isinstance(base.get(name), dict)
    }
    return base | changes | deep


def forget_failed(job: Job) -> None:
    """Remove the entries of failed instances from preds.json, since mini-swe-agent never repeats an instance that has
    one."""
    path = job.work / "agent" / "preds.json"
    if not path.exists():
        return
    with reading(path):
        predictions = dict(json.loads(path.read_text(encoding="utf-8")))
    status = statuses(job)
    kept = {name: entry for name, entry in predictions.items() if status.get(name) in ENDED}
    if len(kept) < len(predictions):
        path.write_text(json.dumps(kept, indent=2), encoding="utf-8")


def predictions(job: Job) -> dict[str, dict[str, Any]]:
    """Return the agent's predictions: instance -> entry of preds.json."""
    path = job.work / "agent" / "preds.json"
    if not path.exists():
        return {}
    with reading(path):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def trajectories(job: Job) -> dict[str, dict[str, Any]]:
    """Return instance -> the agent's trajectory."""
    found = {}
    for path in sorted((job.work / "agent").glob("*/*.traj.json")):
        try:
            found[path.parent.name] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # written while the disk was full
            continue
    return found


def statuses(job: Job) -> dict[str, str]:
    """Return instance -> exit status of its run. If a container did not start there is no trajectory, only an entry in
    mini-swe-agent's list."""
    found: dict[str, str] = {}
    for path in sorted((job.work / "agent").glob("exit_statuses_*.yaml"), key=lambda path: path.stat().st_mtime):
        with contextlib.suppress(yaml.YAMLError, LookupError, TypeError, AttributeError):
            by_status = yaml.safe_load(path.read_text(encoding="utf-8"))["instances_by_exit_status"]
            found |= {name: status for status, names in by_status.items() for name in names if status not in ENDED}
    return found | {name: trajectory["info"].get("exit_status") for name, trajectory in trajectories(job).items()}


def unfinished(job: Job) -> dict[str, str]:
    """Return instance -> exit status, for runs that the server or the container ended, or that left no status."""
    status = statuses(job)
    return {
        name: status.get(name) or "nothing left"
        for name in sorted({*status, *predictions(job)})
        if status.get(name) not in ENDED
    }


def cut_short(failed: dict[str, str], asked: int) -> str:
    """Return the message for runs that the agent did not end itself, out of `asked` instances."""
    name, how = next(iter(failed.items()))
    return f"{len(failed)} of {asked} instances were cut short by the server or their container, {name} for one ({how}): see agent*.log, and run it again"


def leaks(job: Job) -> dict[str, list[Hit]]:
    """Return instance -> commands that read where the answer may be."""
    found = {name: scan(trajectory) for name, trajectory in trajectories(job).items()}
    return {name: hits for name, hits in found.items() if hits}


def to_multi_swe_bench(predicted: dict[str, dict[str, Any]], out: Path) -> int:
    """Write predictions in Multi-SWE-bench's format, a JSON object per line. Return their number.

    Raises:
        EvaluationError: an instance's name is not ORG__REPO-NUMBER.
    """
    rows = []
    for name, entry in predicted.items():
        match = INSTANCE.fullmatch(name)
        if match is None:
            raise EvaluationError(f"instance {name!r} is not ORG__REPO-NUMBER, as Multi-SWE-bench requires.")
        patch = entry.get("model_patch") or ""
        rows.append({"org": match["org"], "repo": match["repo"], "number": int(match["number"]), "fix_patch": patch})
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


if __name__ == "__main__":  # agents.py PREDS.json OUT.jsonl
    to_multi_swe_bench(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
