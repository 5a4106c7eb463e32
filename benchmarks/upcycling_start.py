"""Which opening learns best: dense models, converted to two loops in several ways, all trained on.

    python benchmarks/upcycling_start.py --seeds 3 --output runs/upcycling
    python benchmarks/upcycling_start.py --tokens 100000 --only "dense, same tokens" "exact"    # a quick look

For every seed the quick recipe's model is trained at R = 1, converted through the plain Llama that it is, and trained on, in another order
of the same corpus. c is given relative to the scale that makes a state as large as an embedding. Intervals are bootstrapped over
seeds and documents, differences paired. What is finished is kept: run it again to continue.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from parloop.convert import convert
from parloop.convert.opening import EXACT_BIAS, OPEN_SHARE
from parloop.corpus import load_corpus
from parloop.model.flops import training_flops_per_token
from parloop.model.modeling import PLTGate
from parloop.statistics import bits_per_byte, paired_difference, resample_weights
from parloop.train import Recipe, pretrain
from parloop.train.evaluate import evaluate_documents
from parloop.train.training import train


@dataclasses.dataclass
class Opening:
    """What is trained on: c relative to the embedding's size, the gates' bias, and what else happens to c."""

    name: str
    share: float = 0.0
    bias: float = EXACT_BIAS
    how: str = (
        "fixed"  # fixed, ramp (from 0 to its value over the first fifth), learned (from its value), scratch (not converted)
    )
    loops: int = 2
    match: str = "tokens"  # or compute: as many tokens as cost what the two loops cost


OPENINGS = [
    Opening("dense, same tokens", loops=1),
    Opening("dense, same compute", loops=1, match="compute"),
    Opening("exact", 0.0, EXACT_BIAS),
    Opening("exact, c ramps to 0.3", 0.3, EXACT_BIAS, "ramp"),
    Opening("exact, c ramps to 1", 1.0, EXACT_BIAS, "ramp"),
    Opening("exact, c learned", 0.0, EXACT_BIAS, "learned"),
    Opening("c = 0, b = 4", 0.0, 4.0),
    Opening("open, c 0.3, b = 4", 0.3, 4.0),
    Opening("open, c 0.3, b = 2", 0.3, 2.0),
    Opening("open, c 1, b = 4", 1.0, 4.0),
    Opening("open, c 1, b = 0", 1.0, 0.0),
    Opening("c ramps to 1, b = 2", 1.0, 2.0, "ramp"),
    Opening("two loops from scratch, all tokens", how="scratch"),
]


def learn_scale(build: Any) -> Any:
    """build_model, with c as one more parameter of the model."""

    def built(*arguments: Any) -> Any:
        model = build(*arguments)
        stack = model.model
        stack.hidden_scale = nn.Parameter(torch.tensor(float(stack.config.plt_hidden_scale)))
        stack.offset.combine = lambda e, seen: e + stack.hidden_scale * seen
        return model

    return built


def gate_mean(model: Any, ids: torch.Tensor) -> float:
    seen: list[float] = []
    hooks = [
        m.register_forward_hook(lambda _m, _i, g: seen.append(float(g.mean())))
        for m in model.modules()
        if isinstance(m, PLTGate)
    ]
    with torch.no_grad():
        model.eval()(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return float(np.mean(seen)) if seen else float("nan")


def run(opening: Opening, folder: Path, llama: Path, recipe: Recipe, corpus: Any, settings: Any, console: Console) -> dict:
    """Convert, train on and evaluate one opening; kept in its folder."""
    record = folder / "result.json"
    if record.exists():
        return json.loads(record.read_text())
    cost = {n: training_flops_per_token(recipe.plt_config(corpus.tokenizer), recipe.length, n) for n in (1, 2)}
    tokens = round(settings.tokens * (cost[2] / cost[1] if opening.match == "compute" else 1))
    texts = corpus.validation["text"][: settings.documents]
    ids = torch.tensor(corpus.train[:8]["input_ids"]).long()

    def nll(model: Any):
        return evaluate_documents(model, corpus.tokenizer, texts, recipe.length, max_chars=3000)

    unit, at_first = float("nan"), None
    if opening.how == "scratch":
        more = dataclasses.replace(recipe, tokens=settings.base_tokens + settings.tokens, loops=opening.loops)
    else:
        # The scale that makes a state as large as an embedding, from what an open start takes of it.
        options = {"loops": opening.loops, "window": recipe.window_tokens, "start": "open", "samples": 0}
        if not (folder / "probe").exists():
            convert(llama, folder / "probe", **options)
        unit = json.loads((folder / "probe/config.json").read_text())["plt_hidden_scale"] / OPEN_SHARE
        if not (folder / "plt").exists():
            convert(llama, folder / "plt", **options, hidden_scale=opening.share * unit, gate_bias=opening.bias)
        at_first = nll(AutoModelForCausalLM.from_pretrained(folder / "plt", dtype=torch.float32)).bits_per_byte
        more = dataclasses.replace(
            recipe,
            init_from=str(folder / "plt"),
            loops=opening.loops,
            tokens=tokens,
            seed=recipe.seed + 100,
            learning_rate=settings.learning_rate,
            hidden_scale_warmup_share=0.2 if opening.how == "ramp" else 0.0,
        )
    build = pretrain.build_model
    pretrain.build_model = learn_scale(build) if opening.how == "learned" else build
    try:
        seconds = train(more, folder / "run", corpus=corpus, console=console).seconds
    finally:
        pretrain.build_model = build
    model = AutoModelForCausalLM.from_pretrained(folder / "run")
    if opening.how == "learned":
        model.config.plt_hidden_scale = load_file(folder / "run/model.safetensors")["model.hidden_scale"].item()
    after = nll(model)
    final = model.config.plt_hidden_scale
    content = {
        "opening": dataclasses.asdict(opening),
        "tokens": tokens + (settings.base_tokens if opening.how == "scratch" else 0),
        "first_bits": at_first,
        "bits": after.bits_per_byte,
        "nll": after.nll[:, -1].tolist(),
        "bytes": after.bytes.tolist(),
        "gate": gate_mean(model, ids),
        "final_share": final / unit,
        "seconds": seconds,
    }
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(content))
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/upcycling"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--base-tokens", type=int, default=2_000_000, help="of the dense model's training")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of the continuation")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="peak of the continuation")
    parser.add_argument("--documents", type=int, default=60, help="held out, at most 3000 characters of each")
    parser.add_argument("--only", nargs="+", help="names of openings")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    console = Console(width=150)
    openings = [opening for opening in OPENINGS if not settings.only or opening.name in settings.only]
    results: dict[str, list[dict]] = {opening.name: [] for opening in openings}
    corpus = None
    for seed in range(settings.seeds):
        folder = settings.output / f"seed-{seed}"
        recipe = Recipe.load("quick", loops=1, eval_every=0, save_every=10**6, tokens=settings.base_tokens, seed=seed)
        corpus = corpus or load_corpus(recipe.corpus_settings(), console=console)
        train(recipe, folder / "dense", corpus=corpus, console=console)
        if not (folder / "llama").exists():
            convert(folder / "dense", folder / "llama", to="dense")
        for opening in openings:
            name = "".join(c if c.isalnum() else "-" for c in opening.name)
            result = run(opening, folder / name, folder / "llama", recipe, corpus, settings, console)
            results[opening.name].append(result)
            console.print(
                f"seed {seed}, {opening.name}: {result['bits'][-1]:.4f} bits per byte, {result['seconds']:.0f} s",
                highlight=False,
            )

    first = results[openings[0].name]
    byte_counts = np.array(first[0]["bytes"])
    weights = resample_weights(len(byte_counts), settings.seeds, np.random.default_rng(0))
    base = np.array([r["nll"] for r in first])
    table = Table(
        title=f"{settings.tokens:,} more tokens after {settings.base_tokens:,}, {settings.seeds} seed(s), {len(byte_counts)} held-out "
        f"documents, bits per byte"
    )
    for column in (
        "opening",
        "tokens",
        "c, from",
        "b",
        "c after",
        "gate",
        "before",
        "loop 1",
        "after",
        "minus the first row",
        "s",
    ):
        table.add_column(column, justify="left" if column == "opening" else "right")

    def mean(rows: list[dict], pick: Any) -> str:
        values = [pick(row) for row in rows]
        return "" if None in values or np.isnan(values).any() else f"{np.mean(values):.4g}"

    for opening in openings:
        rows = results[opening.name]
        nll = np.array([r["nll"] for r in rows])
        change = paired_difference(nll, base, byte_counts, weights)
        table.add_row(
            opening.name,
            f"{rows[0]['tokens']:,}",
            "" if opening.how == "scratch" else f"{opening.share:g}",
            "" if opening.how == "scratch" else f"{opening.bias:g}",
            mean(rows, lambda r: r["final_share"]) if opening.loops > 1 else "",
            mean(rows, lambda r: r["gate"]),
            mean(rows, lambda r: r["first_bits"] and r["first_bits"][-1]),
            mean(rows, lambda r: r["bits"][0]),
            f"{bits_per_byte(nll, byte_counts, weights).value:.4f}",
            f"{change.value:+.4f} ({change.low:+.4f} .. {change.high:+.4f})",
            mean(rows, lambda r: r["seconds"]),
        )
    console.print(table)


if __name__ == "__main__":
    main()
