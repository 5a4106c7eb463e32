"""Client for benchmarks whose own scripts cannot ask a server: client.py TASKS.jsonl ANSWERS.jsonl ENDPOINT MODEL SETTINGS

TASKS has {"id", "messages"} per line; ANSWERS gets {"id", "sample", "text", "finish_reason"}. Answered questions are not asked again.
"""

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .benchmark import Job, read_lines


def client_command(job: Job) -> list[str]:
    """Return the command that asks the job's server the questions in work/tasks.jsonl and writes work/answers.jsonl."""
    files = [str(job.work / name) for name in ("tasks.jsonl", "answers.jsonl")]
    settings = {name: job.settings[name] for name in ("temperature", "top_p", "max_tokens", "samples", "workers")}
    return [sys.executable, "-m", "parloop.evaluate.client", *files, job.endpoint, job.model, json.dumps(settings)]


def ask_all(tasks: Path, answers: Path, endpoint: str, model: str, settings: dict[str, Any]) -> None:
    """Ask all questions that have no answer yet.

    After its retries, an error of the openai client is raised; answers until then are kept.
    """
    from openai import OpenAI

    client = OpenAI(base_url=endpoint, api_key="none", max_retries=5, timeout=900)
    done = {(row["id"], row["sample"]) for row in read_lines(answers)} if answers.exists() else set()
    lock = threading.Lock()
    sampling = {name: settings[name] for name in ("temperature", "top_p", "max_tokens") if settings.get(name) is not None}
    stop = threading.Event()

    def ask(task: dict[str, Any], sample: int) -> None:
        if stop.is_set():
            return
        try:
            answer = client.chat.completions.create(model=model, messages=task["messages"], seed=sample, **sampling).choices[
                0
            ]
        except Exception:
            stop.set()
            raise
        row = {
            "id": task["id"],
            "sample": sample,
            "text": answer.message.content or "",
            "finish_reason": answer.finish_reason,
        }
        with lock, answers.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    wanted = [(task, n) for task in read_lines(tasks) for n in range(settings["samples"]) if (task["id"], n) not in done]
    with ThreadPoolExecutor(settings["workers"]) as pool:
        for future in [pool.submit(ask, task, n) for task, n in wanted]:
            future.result()


def code_of(text: str) -> str:
    """Return the text between the last two lines with three backticks; empty if there are none."""
    lines = text.split("\n")
    fences = [i for i, line in enumerate(lines) if "```" in line]
    return "" if len(fences) < 2 else "\n".join(lines[fences[-2] + 1 : fences[-1]])


if __name__ == "__main__":
    ask_all(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4], json.loads(sys.argv[5]))
