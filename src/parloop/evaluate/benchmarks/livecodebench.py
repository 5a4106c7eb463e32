"""LiveCodeBench: problems of programming contests after a date. Our client asks with its prompt, and its own scorer judges.

It is not on PyPI and its runner knows only a fixed list of models, so `--data livecodebench=FOLDER` holds a checkout of its repository,
LiveCodeBench/, and its problems, data.jsonl (test.jsonl, test2.jsonl .. of its data set, concatenated).
"""

import json
import subprocess
import sys
from pathlib import Path

from ...errors import EvaluationError
from ..benchmark import Benchmark, Environment, Job, Needs, Outcome, Step, digest, read_lines, reading
from ..client import client_command, code_of

SYSTEM = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a correct Python program that "
    "matches the specification and passes all tests."
)
WITH_CODE = (
    "### Format: You will use the following starter code to write the solution to the problem and enclose your code within delimiters.\n"
    "```python\n{starter_code}\n```\n\n"
)
WITHOUT = (
    "### Format: Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample inputs). Enclose "
    "your code within delimiters as follows. Ensure that when the python program runs, it reads the inputs, runs the algorithm and writes output "
    "to STDOUT.\n```python\n# YOUR CODE HERE\n```\n\n"
)


def messages(problem: dict) -> list[dict[str, str]]:
    """Return LiveCodeBench's own prompt for chat models."""
    form = WITH_CODE.format(**problem) if problem.get("starter_code") else WITHOUT
    user = f"### Question:\n{problem['question_content']}\n\n{form}### Answer: (use the provided format with backticks)\n\n"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]


def steps(job: Job) -> list[Step]:
    """Return the steps: answers, programs and scores."""
    s, work = job.settings, job.work
    asked = client_command(job)
    collect = [sys.executable, "-m", "parloop.evaluate.benchmarks.livecodebench", str(work), str(s["samples"])]
    score = [
        job.python("livecodebench"),
        str(job.drivers / "livecodebench_driver.py"),
        str(_data(job) / "LiveCodeBench"),
        str(work / "window.jsonl"),
        "--custom_output_file",
        str(work / "out.json"),
        "--scenario",
        "codegeneration",
        "--release_version",
        s["release"],
        "--num_process_evaluate",
        str(s["workers"]),
        "--timeout",
        "6",
    ]
    return [
        Step("answers", asked),
        Step("programs", collect, server=False),
        Step("scores", score, sandbox="offline", server=False),
    ]


def _data(job: Job) -> Path:
    if (
        job.data is None
        or not (job.data / "data.jsonl").exists()
        or not (job.data / "LiveCodeBench" / "lcb_runner").is_dir()
    ):
        raise EvaluationError(
            "livecodebench needs its repository and problems: --data livecodebench=FOLDER, with LiveCodeBench/ and data.jsonl "
            "(docs/evaluation.md)."
        )
    return job.data


def commit(checkout: Path) -> str:
    """Return the commit of the scorer and the prompts."""
    if not (checkout / ".git").exists():  # otherwise git would search the parent folders
        return "an unknown commit"
    done = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "an unknown commit"


def prepare(job: Job) -> None:
    """Write the problems of the window, in the scorer's order, and their prompts."""
    job.work.mkdir(parents=True, exist_ok=True)
    start, end = job.settings["start_date"], job.settings["end_date"]
    kept = []
    with (_data(job) / "data.jsonl").open(encoding="utf-8") as lines:
        for line in lines:  # hundreds of lines of tens of kilobytes
            problem = json.loads(line)
            if start <= problem["contest_date"][:10] <= end:
                kept.append(problem)
    kept = sorted(kept, key=lambda problem: str(problem["question_id"]))[: job.limit]
    if not kept:
        raise EvaluationError(f"livecodebench: {job.data} has no problem from {start} to {end}.")
    (job.work / "window.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in kept), encoding="utf-8")
    tasks = [{"id": str(problem["question_id"]), "messages": messages(problem)} for problem in kept]
    (job.work / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks), encoding="utf-8")


def collect(work: Path, samples: int) -> None:
    """Write the programs in the answers in the scorer's format: every problem, with the same number of samples."""
    programs: dict[str, list[str]] = {task["id"]: [] for task in read_lines(work / "tasks.jsonl")}
    for row in sorted(read_lines(work / "answers.jsonl"), key=lambda row: row["sample"]):
        programs[row["id"]].append(code_of(row["text"]))
    short = [name for name, codes in programs.items() if len(codes) != samples]
    if short:
        sys.exit(f"{len(short)} problems have fewer than {samples} answers, for instance {short[0]}")
    (work / "out.json").write_text(
        json.dumps([{"question_id": name, "code_list": codes} for name, codes in programs.items()]), encoding="utf-8"
    )


def parse(job: Job) -> Outcome:
    """Read which programs pass."""
    path = job.work / "out_codegeneration_output_eval_all.json"
    if not path.exists():
        return Outcome({}, problems=["the scorer left nothing: see scores.log"])
    by_difficulty: dict[str, list[float]] = {}
    with reading(path):
        rows = json.loads(path.read_text(encoding="utf-8"))
        items = {str(row["question_id"]): sum(row["graded_list"]) / len(row["graded_list"]) for row in rows}
        for row in rows:
            by_difficulty.setdefault(row["difficulty"], []).append(items[str(row["question_id"])])
    s = job.settings
    return Outcome(
        items,
        parts={name: 100 * sum(values) / len(values) for name, values in by_difficulty.items()},
        data=f"{s['start_date']} to {s['end_date']}, {digest(job.work / 'window.jsonl')}, LiveCodeBench at {commit(_data(job) / 'LiveCodeBench')}",
    )


BENCHMARK = Benchmark(
    name="livecodebench",
    title="LiveCodeBench",
    measures="contest problems after a date",
    metric="pass@1, the mean of 10 samples",
    tool="LiveCodeBench, of a checkout",
    paper={1: 27.4, 2: 35.4, 3: 28.6, 4: 24.5},
    environments=(Environment("livecodebench"),),
    needs=Needs(sandbox=True, disk_gb=10, memory_gb=8, packages=("openai",), commands=("git",), hours=1.5),
    settings={
        "temperature": 0.6,
        "top_p": 0.95,
        "max_tokens": 4096,
        "samples": 10,
        "workers": 8,
        "release": "release_v5",
        "start_date": "2024-10-01",
        "end_date": "2025-02-01",
    },
    silent="version, window, samples and length; the same lab's earlier model at 0.6 and top_p 0.95",
    run_here="its client against a scripted server, its parser on recorded output; by hand, the scorer at 28fef95 on made problems",
    steps=steps,
    parse=parse,
    prepare=prepare,
)

if __name__ == "__main__":
    collect(Path(sys.argv[1]), int(sys.argv[2]))
