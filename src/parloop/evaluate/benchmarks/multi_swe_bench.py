"""Multi-SWE-bench: 1,632 issues in seven languages; the other interpretation of the paper's column "Multi-SWE".

The tool only grades. mini-swe-agent works in its images, one run per repository since the images hold each in a folder of its own, and its
predictions are converted. `--data multi_swe_bench=FOLDER` has the data set's rows in dataset.jsonl.
"""

import json
import sys

from ...errors import EvaluationError
from ..agents import SETTINGS, agent_step, cut_short, forget_failed, leaks, predictions, unfinished, write_config
from ..benchmark import Benchmark, Environment, Job, Needs, Outcome, Step, digest, read_lines, reading

AGENT, GRADER = Environment("mini-swe-agent"), Environment("multi-swe-bench")


def steps(job: Job) -> list[Step]:
    """Return the steps: the agent for each repository, patches and grades."""
    convert = [sys.executable, "-m", "parloop.evaluate.agents", str(job.work / "agent/preds.json"), str(patches(job))]
    grade = [
        job.python("multi-swe-bench"),
        "-m",
        "multi_swe_bench.harness.run_evaluation",
        "--config",
        str(job.work / "grade.json"),
    ]
    clean = {"PATH": "/usr/local/bin:/usr/bin:/bin"}  # variables such as MODE and LOG_LEVEL would be taken for options
    repositories = sorted({(row["org"], row["repo"]) for row in rows(job)})
    return [
        *(
            agent_step(
                job,
                str(job.work / "tasks"),
                f"agent-{org}-{repo}",
                ("--filter", f"{org}__{repo}-", "-c", f"environment.cwd=/home/{repo}"),
            )
            for org, repo in repositories
        ),
        Step("patches", convert, server=False),
        Step("grades", grade, server=False, environment=clean, exit_codes=(0, 1)),
    ]


def rows(job: Job) -> list[dict]:
    """Return the data set's rows.

    Raises:
        EvaluationError: they are not given.
    """
    if job.data is None or not (job.data / "dataset.jsonl").exists():
        raise EvaluationError(
            "multi_swe_bench needs its data set's rows in a file: --data multi_swe_bench=FOLDER, with dataset.jsonl (docs/evaluation.md)."
        )
    return read_lines(job.data / "dataset.jsonl")[: job.limit]


def patches(job: Job):
    """Return the file of converted predictions."""
    return job.work / "patches.jsonl"


def prepare(job: Job) -> None:
    """Write the agent's tasks and the grader's configuration."""
    forget_failed(job)
    write_config(job)
    for name in ("tasks", "graded", "repositories", "report", "logs"):
        (job.work / name).mkdir(exist_ok=True)
    tasks = []
    for row in rows(job):
        issues = "\n\n".join(f"{issue['title']}\n{issue['body'] or ''}" for issue in row["resolved_issues"])
        name = f"{row['org']}__{row['repo']}-{row['number']}"
        image = f"mswebench/{row['org']}_m_{row['repo']}:pr-{row['number']}".lower()
        tasks.append(
            {
                "instance_id": name,
                "problem_statement": issues or row["title"],
                "image_name": image,
                "repo": f"{row['org']}/{row['repo']}",
            }
        )
    (job.work / "tasks" / "test.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks), encoding="utf-8")
    assert job.data is not None
    config = {
        "mode": "evaluation",
        "workdir": str(job.work / "graded"),
        "patch_files": [str(patches(job))],
        "dataset_files": [str(job.data / "dataset.jsonl")],
        "force_build": False,
        "output_dir": str(job.work / "report"),
        "specifics": [],
        "skips": [],
        "repo_dir": str(job.work / "repositories"),
        "need_clone": False,
        "global_env": [],
        "clear_env": True,
        "stop_on_error": False,
        "max_workers": job.settings["workers"],
        "max_workers_build_image": job.settings["workers"],
        "max_workers_run_instance": job.settings["workers"],
        "log_dir": str(job.work / "logs"),
        "log_level": "INFO",
        "log_to_console": True,
    }
    (job.work / "grade.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def parse(job: Job) -> Outcome:
    """Read which instances are resolved, and the leaks."""
    predicted, failed, looked = predictions(job), unfinished(job), leaks(job)
    parts = {
        "leaks": {name: [hit.to_dict() for hit in hits] for name, hits in looked.items()},
        "instances with a leak": len(looked),
    }
    if failed:
        return Outcome({}, parts=parts, problems=[cut_short(failed, len(predicted))])
    path = job.work / "report" / "final_report.json"
    if not path.exists():
        return Outcome({}, parts=parts, problems=["multi-swe-bench left no report: see grades.log"])
    with reading(path):
        report = json.loads(path.read_text(encoding="utf-8"))
        # Its own total counts folders; we count the instances that were tried.
        resolved = {name.replace("/", "__").replace(":pr-", "-") for name in report["resolved_ids"]}
        parts |= {"errors": report["error_instances"]}
        if predicted and not report["completed_ids"]:
            return Outcome({}, parts=parts, problems=[f"none of {len(predicted)} instances was graded: see grades.log"])
    items = {name: float(name in resolved) for name in predicted}
    assert job.data is not None
    return Outcome(items, parts=parts, data=f"Multi-SWE-bench, {digest(job.data / 'dataset.jsonl')}")


BENCHMARK = Benchmark(
    name="multi_swe_bench",
    title="Multi-SWE-bench",
    measures="issues in seven languages, by an agent",
    metric="resolved, of the instances tried",
    tool="mini-swe-agent 2.4.6, graded by multi-swe-bench 1.1.2",
    paper={1: 14.0, 2: 31.0, 3: 11.0, 4: 9.3},
    environments=(AGENT, GRADER),
    needs=Needs(
        docker=True,
        disk_gb=500,
        memory_gb=32,
        network=("huggingface.co", "github.com"),
        registries=("registry-1.docker.io",),
        hours=60,
    ),
    settings=SETTINGS,
    silent='"Multi-SWE" may be this or SWE-bench Multilingual; the scaffold',
    run_here="the converter, whose lines the tool's own loader takes; the parser on its report of logs written by hand; agents and grading: not run",
    steps=steps,
    parse=parse,
    prepare=prepare,
    fixed=("environment",),
)
