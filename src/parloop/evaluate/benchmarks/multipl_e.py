"""MultiPL-E: HumanEval in other languages. Our client asks for whole programs, and its image runs them.

Its own chat script asks through DSPy and counts any answer in another form as empty; so the prompt is ours, and results say so.
`--data multipl_e=FOLDER` has a file LANGUAGE.jsonl per language, in place of the Hub's data set.
"""

import gzip
import json
import sys
from pathlib import Path

from ...errors import EvaluationError
from ..benchmark import Benchmark, Job, Needs, Outcome, Step, digest, read_lines, reading
from ..client import client_command, code_of

IMAGE = "ghcr.io/nuprl/multipl-e-evaluation"
PROMPT = "Complete this {language} program. Answer with the whole program in one code block, without a main program and without tests.\n\n```{language}\n{prompt}\n```"
SOURCE = "nuprl/MultiPL-E"


def steps(job: Job) -> list[Step]:
    """Return the steps: answers, programs and scores."""
    work = job.work
    asked = client_command(job)
    collect = [sys.executable, "-m", "parloop.evaluate.benchmarks.multipl_e", str(work)]
    folder = str((work / "programs").absolute())
    run = [
        "docker",
        "run",
        "--rm",
        "--network",
        "none",
        "-v",
        f"{folder}:/programs:rw",
        IMAGE,
        "--dir",
        "/programs",
        "--output-dir",
        "/programs",
        "--recursive",
    ]
    return [Step("answers", asked), Step("programs", collect, server=False), Step("scores", run, server=False)]


def prepare(job: Job) -> None:
    """Write the problems and their prompts."""
    job.work.mkdir(parents=True, exist_ok=True)
    problems, tasks = [], []
    for language in job.settings["languages"]:
        for row in problems_of(job, language)[: job.limit]:
            name = f"{language}/{row['name']}"
            problems.append(
                {
                    "id": name,
                    "language": row["language"],
                    "name": row["name"],
                    "prompt": row["prompt"],
                    "tests": row["tests"],
                }
            )
            question = PROMPT.format(language=row["language"], prompt=row["prompt"].rstrip())
            tasks.append({"id": name, "messages": [{"role": "user", "content": question}]})
    for file, rows in (("problems.jsonl", problems), ("tasks.jsonl", tasks)):
        (job.work / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def problems_of(job: Job, language: str) -> list[dict]:
    """Return the problems in a language.

    Raises:
        EvaluationError: they cannot be loaded.
    """
    if job.data is not None:
        path = job.data / f"{language}.jsonl"
        if not path.exists():
            raise EvaluationError(f"multipl_e: there is no {path}; give --set multipl_e.languages='[..]' or the file.")
        return read_lines(path)
    from datasets import load_dataset

    try:
        return list(load_dataset(SOURCE, f"humaneval-{language}", split="test"))
    except Exception as error:
        raise EvaluationError(
            f"{SOURCE}, humaneval-{language}, cannot be loaded ({error}): check the connection, or give --data."
        ) from error


def collect(work: Path) -> None:
    """Write a file per problem, in the image's format: programs are whole, so no prompt goes before them."""
    problems = {row["id"]: row for row in read_lines(work / "problems.jsonl")}
    answers: dict[str, list[str]] = {name: [] for name in problems}
    for row in read_lines(work / "answers.jsonl"):
        answers[row["id"]].append(code_of(row["text"]))
    for name, completions in answers.items():
        problem = problems[name]
        path = work / "programs" / name.partition("/")[0] / f"{problem['name']}.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "name": problem["name"],
            "language": problem["language"],
            "prompt": "",
            "tests": problem["tests"],
            "completions": completions,
        }
        with gzip.open(path, "wt", encoding="utf-8") as file:
            json.dump(content | {"stop_tokens": []}, file)


def parse(job: Job) -> Outcome:
    """Read which programs pass, by language."""
    items: dict[str, float] = {}
    by_language: dict[str, list[float]] = {}
    for path in sorted((job.work / "programs").rglob("*.results.json.gz")):
        language = path.parent.name
        with reading(path), gzip.open(path, "rt", encoding="utf-8") as file:
            results = json.load(file)["results"]
            passed = sum(result["status"] == "OK" and result["exit_code"] == 0 for result in results) / max(len(results), 1)
        items[f"{language}/{path.name.removesuffix('.results.json.gz')}"] = passed
        by_language.setdefault(language, []).append(passed)
    asked = job.work / "problems.jsonl"
    count = len(read_lines(asked))
    problems = (
        [] if len(items) == count else [f"{len(items)} of {count} problems were run: see scores.log, and run it again"]
    )
    means = {language: 100 * sum(values) / len(values) for language, values in by_language.items()}
    value = sum(means.values()) / len(means) if means else None
    return Outcome(items, value=value, parts=means, problems=problems, data=f"humaneval-* of MultiPL-E, {digest(asked)}")


BENCHMARK = Benchmark(
    name="multipl_e",
    title="MultiPL-E",
    measures="HumanEval in other languages",
    metric="pass@1, the mean of the languages",
    tool="MultiPL-E's evaluation image",
    paper={1: 69.5, 2: 73.9, 3: 69.8, 4: 67.3},
    environments=(),
    needs=Needs(
        docker=True,
        disk_gb=15,
        memory_gb=8,
        network=("huggingface.co",),
        registries=("ghcr.io",),
        packages=("openai",),
        hours=0.5,
    ),
    settings={
        "languages": ["cpp", "cs", "java", "js", "php", "rs", "sh", "ts"],
        "temperature": 0.0,
        "top_p": 1.0,
        "max_tokens": 1024,
        "samples": 1,
        "workers": 8,
        "prompt": "ours",
    },
    fixed=("prompt",),
    silent="languages, prompt and sampling",
    run_here="its client against a scripted server, its parser on its evaluator's output for JavaScript; the image needs Docker: not run",
    steps=steps,
    parse=parse,
    prepare=prepare,
)

if __name__ == "__main__":
    collect(Path(sys.argv[1]))
