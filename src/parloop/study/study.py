"""The study: one model per loop count under a matched protocol, what each loop gives and costs, and which count to take.

    corpus -> for every seed and loop count: train, evaluate -> time the models side by side, look at them through the lenses
           -> statistics -> report

Matched are the initial draws, the data order, the optimiser, and the number of training tokens, or with `match="compute"`
the training FLOPs (each loop count then gets the mean of what the counts would cost at equal tokens). A study's folder can be
run again: finished runs are kept, an interrupted one goes on.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..corpus import Corpus, load_corpus
from ..diagnosis.checkpoint import diagnose_checkpoint
from ..errors import RecipeError
from ..folder import STUDY, claimed
from ..generate import load_model
from ..model.flops import training_flops_per_token
from ..record import command_line, environment, write_json
from ..report.terminal import progress_bars
from ..statistics import RULE, Interval, bits_per_byte, choose, paired_difference, resample_weights
from ..train.evaluate import Evaluation, evaluate_documents
from ..train.pretrain import train
from ..train.recipe import Recipe
from .measure import cache_bytes_of, inference_times, peak_training_bytes

MATCHES = ("tokens", "compute")
LENS_SAMPLES = 32  # for the report's chapter on what each loop adds; parloop diagnose takes more


def run_study(
    recipe: Recipe,
    output: str | Path,
    *,
    loops: list[int] | None = None,
    seeds: int = 1,
    match: str = "tokens",
    document_chars: int = 3000,
    console: Console | None = None,
    command: str | None = None,
    fresh: bool = False,
) -> dict[str, Any]:
    """Run a study into a folder, or continue it there.

    Args:
        recipe: the protocol; its loops, tokens and seed are set by the study.
        loops: the loop counts to compare; default 1, 2, 3, 4.
        seeds: trainings per loop count.
        match: "tokens" or "compute".
        document_chars: characters of each validation document that are evaluated.
        command: what the report says the study was started with.

    Returns:
        what results.json holds.

    Raises:
        RecipeError: impossible settings, or a folder with another study.
        OutputError: the folder cannot be written, holds something else than a study, or another command works in it.
    """
    console = console or Console()
    loops = sorted(set(loops or [1, 2, 3, 4]))
    if loops[0] < 1 or seeds < 1:
        raise RecipeError(f"loops {loops} and seeds {seeds} must be at least 1.")
    if match not in MATCHES:
        raise RecipeError(f"match={match!r} is unknown: use one of {', '.join(MATCHES)}.")
    if document_chars < 0:
        raise RecipeError(f"document_chars={document_chars} must be at least 0; 0 takes documents whole.")
    with claimed(output, STUDY, going_on="finished runs are kept, and an interrupted one goes on") as out:
        corpus = load_corpus(recipe.corpus_settings(), console=console)
        corpus.print_summary(console)
        runs = plan(recipe, corpus, loops, seeds, match)
        train_all(runs, out.path, corpus, seeds, document_chars, console, fresh)
        with console.status("measuring prefill, decode, cache and memory, loop counts interleaved"):
            costs = measure(out.path, runs, recipe, loops)
        first = [run for run in runs if run["seed"] == recipe.seed]
        diagnoses = [diagnosis_of(out.path / run["name"], recipe, corpus, console) for run in first]
        results = summarize(recipe, corpus, runs, costs, loops, seeds, match, command or command_line())
        results["diagnoses"] = diagnoses
        out.write_json("results.json", results)
    return results


def train_all(
    runs: list[dict[str, Any]],
    output: Path,
    corpus: Corpus,
    seeds: int,
    document_chars: int,
    console: Console,
    fresh: bool,
) -> None:
    """Train and evaluate every run in a folder of its own; adds `training` and `evaluation` to each."""
    with progress_bars(console) as progress:
        whole = progress.add_task("study", total=sum(run["flops"] for run in runs), loss="")
        for number, run in enumerate(runs, 1):
            label = f"run {number} of {len(runs)}: R = {run['loops']}" + (f", seed {run['seed']}" if seeds > 1 else "")
            task = progress.add_task(label, total=run["recipe"].steps, loss="")
            flops_per_step = run["flops"] / run["recipe"].steps

            def on_step(
                step: int, loss: float, task=task, whole=whole, start=progress.tasks[whole].completed, per=flops_per_step
            ):
                progress.update(task, completed=step)
                progress.update(whole, completed=start + step * per)
                if loss == loss:
                    progress.update(task, loss=f"loss {loss:.3f}")

            folder = output / run["name"]
            run["training"] = train(run["recipe"], folder, corpus=corpus, console=console, on_step=on_step, fresh=fresh)
            on_step(run["recipe"].steps, run["training"]["loss_curve"][-1][1])
            run["evaluation"] = evaluation_of(folder, run["recipe"], corpus, document_chars)


def plan(recipe: Recipe, corpus: Corpus, loops: list[int], seeds: int, match: str) -> list[dict[str, Any]]:
    """The runs, in order, with their recipes and FLOPs."""
    config = recipe.plt_config(corpus.tokenizer)
    cost = {n: training_flops_per_token(config, recipe.length, n) for n in loops}
    mean = sum(cost.values()) / len(cost)
    runs = []
    for seed in range(recipe.seed, recipe.seed + seeds):
        for n in loops:
            tokens = recipe.tokens if match == "tokens" else round(recipe.tokens * mean / cost[n])
            own = dataclasses.replace(recipe, loops=n, seed=seed, tokens=tokens)
            runs.append({"name": f"r{n}-seed{seed}", "loops": n, "seed": seed, "recipe": own})
            runs[-1]["flops"] = cost[n] * own.steps * own.batch_size * own.length
    return runs


def evaluation_of(folder: Path, recipe: Recipe, corpus: Corpus, document_chars: int) -> Evaluation:
    """The run's loss on every validation document, kept in the run's folder."""
    path = folder / f"evaluation-{document_chars}.npz"
    if path.exists():
        return Evaluation(**np.load(path))
    model = load_model(folder, recipe.device)
    texts = corpus.validation["text"]
    evaluation = evaluate_documents(model, corpus.tokenizer, list(texts), recipe.length, max_chars=document_chars)
    scratch = path.with_suffix(".partial.npz")
    np.savez_compressed(scratch, **vars(evaluation))
    os.replace(scratch, path)
    return evaluation


def diagnosis_of(folder: Path, recipe: Recipe, corpus: Corpus, console: Console) -> dict[str, Any]:
    """The run's diagnosis on held-out text, kept in the run's folder."""
    path = folder / "diagnosis.json"
    if not path.exists():
        held_out = zip(corpus.validation["name"], corpus.validation["text"])
        record = diagnose_checkpoint(
            folder, samples=LENS_SAMPLES, batch_size=8, device=recipe.device, held_out=held_out, console=console
        )
        write_json(path, record)
    return json.loads(path.read_text(encoding="utf-8"))


def measure(output: Path, runs: list[dict[str, Any]], recipe: Recipe, loops: list[int]) -> dict[int, dict[str, Any]]:
    """Times, bytes and memory of every loop count, from its first seed's model."""
    first = {run["loops"]: output / run["name"] for run in reversed(runs)}
    models = {n: load_model(first[n], recipe.device) for n in loops}
    costs = inference_times(models, recipe.length)
    for n, model in models.items():
        costs[n]["cache_bytes"] = cache_bytes_of(model, recipe.length)
        rows = recipe.batch_size // recipe.gradient_accumulation
        costs[n]["peak_training_bytes"] = peak_training_bytes(model, rows, recipe.length)
    return costs


def summarize(recipe, corpus, runs, costs, loops, seeds, match, command) -> dict[str, Any]:
    """Everything that the report shows."""
    byte_counts = runs[0]["evaluation"].bytes
    weights = resample_weights(len(byte_counts), seeds, np.random.default_rng(0))
    by_loops = {n: [run for run in runs if run["loops"] == n] for n in loops}
    nll = {n: np.stack([run["evaluation"].nll for run in by_loops[n]]) for n in loops}  # [seeds, documents, n]
    final = {n: values[:, :, -1] for n, values in nll.items()}
    losses = {n: bits_per_byte(final[n], byte_counts, weights) for n in loops}
    best = min(loops, key=lambda n: losses[n].value)
    to_best = {n: paired_difference(final[n], final[best], byte_counts, weights) for n in loops}
    base = 1 if 1 in loops else loops[0]
    to_base = {n: paired_difference(final[n], final[base], byte_counts, weights) for n in loops}
    chosen = choose({n: losses[n].value for n in loops}, to_best)

    rows = []
    for n in loops:
        own = by_loops[n]
        tokens = sum(int(run["evaluation"].tokens.sum()) for run in own)
        rows.append(
            {
                "loops": n,
                "parameters": own[0]["training"]["parameters"],
                "bits_per_byte": losses[n].as_list(),
                "loss_nats_per_token": float(final[n].sum() / tokens),
                "difference_to_base": to_base[n].as_list(),
                "difference_to_best": to_best[n].as_list(),
                "bits_per_byte_after_loop": [bits_per_byte(nll[n][:, :, r], byte_counts, weights).value for r in range(n)],
                "next_token_accuracy": float(sum(run["evaluation"].correct.sum() for run in own) / tokens),
                "training_tokens": own[0]["training"]["tokens"],
                "training_flops": own[0]["flops"],
                "training_seconds": float(np.mean([run["training"]["seconds"] for run in own])),
                "training_tokens_per_second": float(np.median([run["training"]["tokens_per_second"] for run in own])),
                "runs": [run["name"] for run in own],
                "loss_curves": [run["training"]["loss_curve"] for run in own],
                "validation_curves": [run["training"]["validation_curve"] for run in own],
                **costs[n],
            }
        )
    results = {
        "rows": rows,
        "base": base,
        "best": best,
        "chosen": chosen,
        "rule": RULE,
        "match": match,
        "seeds": seeds,
        "documents": len(byte_counts),
        "document_bytes": int(byte_counts.sum()),
        "recipe": dataclasses.asdict(recipe),
        "corpus": corpus.summary,
        "command": command,
        "environment": environment(),
    }
    results["verdict"] = verdict(rows, base, best, chosen, match, seeds, to_base)
    return results


def verdict(
    rows: list[dict[str, Any]], base: int, best: int, chosen: int, match: str, seeds: int, to_base: dict[int, Interval]
) -> str:
    """One plain paragraph: the choice as its first sentence, its evidence, its limits."""
    by_loops = {row["loops"]: row for row in rows}
    row = by_loops[chosen]
    if len(rows) == 1:
        return (
            f"Nothing was compared. R = {chosen} is the only loop count of this study; it has {row['bits_per_byte'][0]:.3f} bits "
            f"per byte. To find out which count pays, name several, for instance --loops 1 2 3."
        )
    matched = "the same training tokens" if match == "tokens" else "the same training compute"
    text = f"Take R = {chosen}. "
    if chosen != best:
        low, high = by_loops[chosen]["difference_to_best"][1:]
        text += (
            f"R = {best} has the lowest loss ({by_loops[best]['bits_per_byte'][0]:.3f} bits per byte), but R = {chosen} is "
            f"within the paired 95% interval of it ({low:+.3f} to {high:+.3f}) and is cheaper. "
        )
    else:
        text += f"It has the lowest loss ({row['bits_per_byte'][0]:.3f} bits per byte), and no smaller count comes within its paired 95% interval. "
    if chosen != base:
        d = to_base[chosen]
        text += (
            f"Against R = {base} it changes the loss by {d.value:+.3f} bits per byte ({d.low:+.3f} to {d.high:+.3f}) with "
            f"{matched}; a training token costs {row['training_flops'] / row['training_tokens'] / (by_loops[base]['training_flops'] / by_loops[base]['training_tokens']):.2f} "
            f"times the FLOPs, a decode step {row['decode_ms'] / by_loops[base]['decode_ms']:.2f} times the time. "
        )
    else:
        text += f"More loops did not help here with {matched}. "
    if match == "tokens":
        text += (
            "Equal tokens favour more loops, which spend more compute on each token: with unlimited fresh data and a fixed "
            "compute budget the plain model may still win (--match compute tests it). "
        )
    if seeds == 1:
        text += (
            "With one seed the intervals cover the choice of documents, not the luck of training (--seeds 3 covers both). "
        )
    text += (
        "Models this small, trained this briefly, on this corpus say which way it goes here, not what a 7B model would do."
    )
    return text
