"""Berkeley Function-Calling Leaderboard, version 3: calls of functions that are described to the model, single, parallel and over turns.

bfcl-eval's current release scores version 4, which has other data; 2025.8.6.2 is the last release with version 3.
"""

import json
from statistics import mean

from ..benchmark import Benchmark, Environment, Job, Needs, Outcome, Step, read_lines, reading

SIMPLE = ("simple", "java", "javascript")
NON_LIVE = (*SIMPLE, "multiple", "parallel", "parallel_multiple", "irrelevance")
LIVE = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance", "live_relevance")
MULTI_TURN = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
CATEGORIES = (*NON_LIVE, *LIVE, *MULTI_TURN)


def key(job: Job) -> str:
    """Return bfcl's name of the model, with letters, digits and dashes only: bfcl makes it a part of a Python identifier."""
    return "m-" + "".join(c if c.isalnum() else "-" for c in job.model) + ("-FC" if job.settings["mode"] == "FC" else "")


def categories(job: Job) -> list[str]:
    """Return the categories to run."""
    return list(job.settings["categories"]) or list(CATEGORIES)


def steps(job: Job) -> list[Step]:
    """Return the steps: answers and scores."""
    driver = [job.python("bfcl"), str(job.drivers / "bfcl_driver.py")]
    sampling = {name: job.settings[name] for name in ("top_p", "max_tokens", "seed")} | {"timeout": 600}
    own = {
        "BFCL_PROJECT_ROOT": str(job.work),
        "OPENAI_API_KEY": "none",
        "OPENAI_BASE_URL": job.endpoint,
        "PARLOOP_MODEL": job.model,
        "PARLOOP_KEY": key(job),
        "PARLOOP_MODE": job.settings["mode"],
        "PARLOOP_SAMPLING": json.dumps(sampling),
    }
    which = ["--model", key(job), "--test-category", ",".join(categories(job))]
    asked = ["--temperature", str(job.settings["temperature"]), "--num-threads", str(job.settings["threads"])]
    return [
        # bfcl also executes calls while it generates, in conversations.
        Step("answers", [*driver, "generate", *which, *asked], sandbox="online", environment=own),
        Step("scores", [*driver, "evaluate", *which], sandbox="offline", server=False, environment=own),
    ]


def prepare(job: Job) -> None:
    """Remove answers that are errors of the server, so that they are asked again: some would count as right."""
    for path in (job.work / "result" / key(job)).glob("*_result.json"):
        rows = read_lines(path)
        kept = [row for row in rows if "traceback" not in row]
        if len(kept) < len(rows):
            path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def parse(job: Job) -> Outcome:
    """Read accuracies of the categories, and which items are right."""
    accuracy: dict[str, float] = {}
    counts: dict[str, int] = {}
    items: dict[str, float] = {}
    problems: list[str] = []
    for path in sorted((job.work / "score" / key(job)).glob("BFCL_v3_*_score.json")):
        category = path.name.removeprefix("BFCL_v3_").removesuffix("_score.json")
        with reading(path):
            header, *failed = read_lines(path)
            accuracy[category], counts[category] = header["accuracy"], header["total_count"]
            wrong = {row["id"] for row in failed}
        with reading(given := job.work / "result" / key(job) / f"BFCL_v3_{category}_result.json"):
            answers = read_lines(given)
            broken = [row["id"] for row in answers if "traceback" in row]
            items |= {row["id"]: float(row["id"] not in wrong) for row in answers}
        if broken:
            problems.append(f"{len(broken)} answers of {category} are errors of the server: run it again")
    missing = [category for category in categories(job) if category not in accuracy]
    if missing:
        problems.append(f"no score of {', '.join(missing)}: run it again")
    data = "BFCL v3 of bfcl-eval 2025.8.6.2"
    if problems or set(categories(job)) != set(CATEGORIES):
        return Outcome(items, parts={"accuracy": accuracy}, problems=problems, data=data)
    groups = overall(accuracy, counts)
    return Outcome(items, value=100 * groups.pop("overall"), parts=groups | {"accuracy": accuracy}, data=data)


def overall(accuracy: dict[str, float], counts: dict[str, int]) -> dict[str, float]:
    """Return version 3's number: the mean of three groups; the live group weights its categories by their items."""
    a = accuracy
    non_live = mean([mean(a[c] for c in SIMPLE), *(a[c] for c in NON_LIVE if c not in SIMPLE)])
    live = sum(a[c] * counts[c] for c in LIVE) / sum(counts[c] for c in LIVE)
    multi_turn = mean(a[c] for c in MULTI_TURN)
    return {"non_live": non_live, "live": live, "multi_turn": multi_turn, "overall": mean([non_live, live, multi_turn])}


BENCHMARK = Benchmark(
    name="bfcl_v3",
    title="BFCL v3",
    measures="function calls: one, several, none where none fits, and over turns",
    metric="overall accuracy: the mean of non-live, live and multi-turn",
    tool="bfcl-eval 2025.8.6.2",
    paper={1: 32.2, 2: 40.1, 3: 36.3, 4: 39.5},
    environments=(Environment("bfcl"),),
    needs=Needs(sandbox=True, disk_gb=2, hours=2),
    settings={
        "mode": "FC",
        "temperature": 0.01,
        "top_p": 0.85,
        "max_tokens": 2048,
        "seed": 1,
        "threads": 8,
        "categories": [],
    },
    silent="tool calls (FC) or prompt mode, and sampling: the same lab's earlier model at 0.01 and top_p 0.85",
    run_here="its scorer on recorded answers of whole categories, and generation against a scripted server",
    steps=steps,
    parse=parse,
    prepare=prepare,
    reads_data=False,
    no_limit="""it scores whole categories: --set bfcl_v3.categories='["live_parallel"]' instead""",
)
