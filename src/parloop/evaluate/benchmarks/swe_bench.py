"""SWE-bench: real issues of real repositories, solved by an agent. mini-swe-agent works, swebench grades, both in containers.

Verified has 500 Python tasks, Multilingual 300 tasks in nine languages. The latter may be the paper's column "Multi-SWE", see
docs/evaluation.md.
"""

import json

from ..agents import SETTINGS, agent_step, cut_short, forget_failed, leaks, predictions, unfinished, write_config
from ..benchmark import Benchmark, Environment, Job, Needs, Outcome, Step, digest, reading

AGENT, GRADER = Environment("mini-swe-agent"), Environment("swebench")
DATASETS = {"verified": "SWE-bench/SWE-bench_Verified", "multilingual": "SWE-bench/SWE-bench_Multilingual"}


def steps(job: Job) -> list[Step]:
    """Return the steps: the agent and its grades."""
    # The agent knows short names, for copies elsewhere; the grader's module knows none.
    subset = str(job.data) if job.data else DATASETS.get(job.settings["subset"], job.settings["subset"])
    agent = agent_step(job, subset)
    if job.settings["environment"] != "docker":
        return [agent]  # only tests of the agent set it: work on this machine cannot be graded in swebench's containers
    command = [
        job.python("swebench"),
        "-m",
        "swebench.harness.run_evaluation",
        "-d",
        subset,
        "-p",
        str(job.work / "agent" / "preds.json"),
        "-id",
        job.key,
        "--max_workers",
        str(job.settings["workers"]),
        "--report_dir",
        str(job.work / "report"),
    ]
    return [agent, Step("grades", command, server=False, folder=job.work)]


def prepare(job: Job) -> None:
    """Prepare the agent, and a folder for the grader's report."""
    forget_failed(job)
    write_config(job)
    (job.work / "report").mkdir(exist_ok=True)


def parse(job: Job) -> Outcome:
    """Read which instances are resolved, and the leaks."""
    predicted, failed, looked = predictions(job), unfinished(job), leaks(job)
    parts = {
        "leaks": {name: [hit.to_dict() for hit in hits] for name, hits in looked.items()},
        "instances with a leak": len(looked),
    }
    if failed:
        return Outcome({}, parts=parts, problems=[cut_short(failed, len(predicted))])
    reports = list((job.work / "report").glob(f"*.{job.key}.json"))
    if not reports:
        return Outcome({}, parts=parts, problems=["swebench left no report: see grades.log"])
    problems = []
    with reading(reports[0]):
        report = json.loads(reports[0].read_text(encoding="utf-8"))
        resolved = set(report["resolved_ids"])
        # swebench grades the whole data set, and calls instances beyond the limit "incomplete".
        missing = [] if job.limit else report["incomplete_ids"]
        items = {name: float(name in resolved) for name in sorted({*predicted, *report["submitted_ids"], *missing})}
        total = min(job.limit or report["total_instances"], report["total_instances"])
        if report.get("infra_failure_ids"):
            problems.append(
                f"{len(report['infra_failure_ids'])} instances could not be graded (infrastructure): run it again"
            )
        honest = sum(name in resolved and name not in looked for name in items)
        parts |= {
            "resolved without a leak": 100 * honest / total,
            "empty patches": report["empty_patch_instances"],
            "errors": report["error_instances"],
        }
    return Outcome(
        items,
        value=100 * len(resolved) / total,
        parts=parts,
        problems=problems,
        data=digest(*sorted(path for path in job.data.iterdir() if path.is_file())) if job.data else job.settings["subset"],
    )


def _benchmark(subset: str, title: str, measures: str, paper: dict[int, float], disk: float, hours: float) -> Benchmark:
    return Benchmark(
        name=f"swe_bench_{subset}",
        title=title,
        measures=measures,
        metric="resolved",
        tool="mini-swe-agent 2.4.6, graded by swebench 5.0.2",
        paper=paper,
        environments=(AGENT, GRADER),
        needs=Needs(
            docker=True,
            disk_gb=disk,
            memory_gb=16,
            network=("huggingface.co",),
            registries=("registry-1.docker.io",),
            hours=hours,
        ),
        settings={"subset": subset, **SETTINGS},
        silent="the scaffold: the same lab used a fork of R2E-Gym, which is another agent, so no match can be claimed",
        run_here="the agent on a toy repository, without containers; swebench's grades of a log written by hand; with Docker: not run",
        steps=steps,
        parse=parse,
        prepare=prepare,
        fixed=("environment",),
    )


SWE_BENCH_VERIFIED = _benchmark(
    "verified",
    "SWE-bench Verified",
    "500 issues of Python repositories, by an agent",
    {1: 43.0, 2: 64.4, 3: 27.6, 4: 22.4},
    130,
    20,
)
SWE_BENCH_MULTILINGUAL = _benchmark(
    "multilingual",
    "SWE-bench Multilingual",
    "300 issues in nine languages, by an agent",
    {1: 14.0, 2: 31.0, 3: 11.0, 4: 9.3},
    130,
    14,
)
