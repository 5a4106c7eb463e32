"""Results of benchmarks as runs would have written them."""

from parloop.evaluate.benchmark import Job, Outcome, benchmarks
from parloop.evaluate.results import save, settings_of

BFCL, HELD_OUT, SWE, SPOKEN = (benchmarks()[name] for name in ("bfcl_v3", "held_out", "swe_bench_verified", "multipl_e"))


def saved(
    folder, benchmark, loops, items, model=None, cost=(3, 900, 100, 20.0), weights=None, value=None, parts=None, **settings
):
    """A result of these items, in the given folder."""
    model = model or f"toy@{loops}"
    job = Job(
        folder=folder / model / benchmark.name / str(settings),
        endpoint="",
        model=model,
        loops=loops,
        settings=benchmark.settings | settings,
    )
    names = ("requests", "prompt_tokens", "completion_tokens", "seconds")
    outcome = Outcome(items, value=value, weights=weights, parts=parts or {}, data="made")
    more = {"cost": dict(zip(names, cost))}
    about = {"name": model, "loops": loops, "checkpoint": None, "hash": None, "engine": "unknown"}
    return save(benchmark, job, outcome, settings_of(benchmark, job), about, more)


def passed(pattern):
    """Items of a string such as "110", by their places."""
    return {f"item {n}": float(digit) for n, digit in enumerate(pattern)}
