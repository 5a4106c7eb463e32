"""Which opening learns best: one dense model, converted to two loops in several ways, all trained on with the same tokens.

    python benchmarks/upcycling_start.py --output runs/upcycling
    python benchmarks/upcycling_start.py --dense runs/study-quick/r1-seed0 --tokens 100000    # a model that is there

Trains the quick recipe's model at R = 1, converts it (through the plain Llama that it is), and trains on in another order. c is given relative to the scale that makes a state as large as an embedding. One seed; intervals are over documents.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from parloop.convert import EXACT_BIAS, OPEN_SHARE, convert
from parloop.corpus import collate, load_corpus
from parloop.model.modeling import PLTGate
from parloop.statistics import paired_difference, resample_weights
from parloop.train import Recipe
from parloop.train.evaluate import evaluate_documents
from parloop.train.pretrain import PLTTrainer, train, training_arguments, whole_batches


@dataclasses.dataclass
class Opening:
    """What is trained on: c relative to the embedding's size, the gates' bias, and what else happens to c."""

    name: str
    share: float = 0.0
    bias: float = EXACT_BIAS
    how: str = "fixed"  # fixed, ramp (from 0 to its value over the first fifth), learned (from its value)
    loops: int = 2
    steps: float = 1.0


OPENINGS = [
    Opening("dense, trained on", loops=1),
    Opening("dense, twice the steps", loops=1, steps=2.0),
    Opening("exact", 0.0, EXACT_BIAS),
    Opening("exact, c ramps up", 1.0, EXACT_BIAS, "ramp"),
    Opening("exact, c learned", 0.0, EXACT_BIAS, "learned"),
    Opening("c = 0, b = 4", 0.0, 4.0),
    Opening("open, 0.1, b = 4", 0.1, 4.0),
    Opening("open, 0.1, b = 2", 0.1, 2.0),
    Opening("open, 0.3, b = 2", 0.3, 2.0),
    Opening("open, 1, b = 2", 1.0, 2.0),
    Opening("open, 1, b = 0", 1.0, 0.0),
    Opening("c ramps to 1, b = 2", 1.0, 2.0, "ramp"),
]


class Ramp(TrainerCallback):
    """c grows from 0 to its value over the first fifth of the steps."""

    def __init__(self, config: Any):
        self.config, self.final = config, config.plt_hidden_scale
        config.plt_hidden_scale = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.config.plt_hidden_scale = self.final * min(1.0, state.global_step / (0.2 * args.max_steps))


def learn_scale(stack: Any) -> None:
    """Make c a parameter of this model object."""
    stack.hidden_scale = nn.Parameter(torch.tensor(float(stack.config.plt_hidden_scale)))
    stack._combine = lambda e, shifted: e + stack.hidden_scale * shifted


def train_on(model: Any, recipe: Recipe, corpus: Any, ramp: Ramp | None, folder: Path) -> float:
    """Seconds."""
    trainer = PLTTrainer(
        model=model,
        args=training_arguments(recipe, folder),
        train_dataset=whole_batches(corpus, recipe, 1),
        data_collator=collate,
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if ramp is not None:
        trainer.add_callback(ramp)
    start = time.perf_counter()
    trainer.train()
    return time.perf_counter() - start


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/upcycling"))
    parser.add_argument(
        "--dense", type=Path, help="folder of a run of `parloop train` with one loop; default: train the quick recipe"
    )
    parser.add_argument("--tokens", type=int, default=300_000, help="of the continuation")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="peak of the continuation")
    parser.add_argument("--documents", type=int, default=40, help="held out, at most 3000 characters of each")
    parser.add_argument("--only", nargs="+", help="names of openings")
    arguments = parser.parse_args()
    console = Console(width=140)
    dense, llama = arguments.dense or arguments.output / "dense", arguments.output / "llama"
    kept = dense / "recipe.yaml"
    recipe = Recipe.load(kept if kept.is_file() else "quick", num_loops=1, eval_every=0, save_every=10**6)
    corpus = load_corpus(recipe.corpus_settings(), console=console)
    if arguments.dense is None:
        train(recipe, dense, corpus=corpus, console=console)
    if not llama.exists():
        convert(dense, llama, to="dense")
    texts = corpus.validation["text"][: arguments.documents]
    ids = torch.tensor(corpus.train[:8]["input_ids"]).long()

    def nll(model: Any):
        return evaluate_documents(model, corpus.tokenizer, texts, recipe.length, max_chars=3000)

    results = []
    for number, opening in enumerate(OPENINGS):
        if arguments.only and opening.name not in arguments.only:
            continue
        folder = arguments.output / f"opening-{number}"
        record = folder / "result.json"
        if not record.exists():
            plt = folder / "plt"
            if not plt.exists():
                # The scale that makes a state as large as an embedding, from what an open start takes of it.
                options = {"loops": opening.loops, "window": recipe.window_tokens, "start": "open", "samples": 0}
                probe = convert(llama, folder / "probe", **options).config.plt_hidden_scale / OPEN_SHARE
                convert(llama, plt, **options, hidden_scale=opening.share * probe, gate_bias=opening.bias)
            model = AutoModelForCausalLM.from_pretrained(plt, dtype=torch.float32)
            unit = json.loads((folder / "probe/config.json").read_text())["plt_hidden_scale"] / OPEN_SHARE
            ramp = Ramp(model.config) if opening.how == "ramp" else None
            at_first = nll(model)
            if opening.how == "learned":
                learn_scale(model.model)
            tokens = int(arguments.tokens * opening.steps)
            more = dataclasses.replace(
                recipe, tokens=tokens, seed=1, learning_rate=arguments.learning_rate, num_loops=opening.loops
            )
            seconds = train_on(model, more, corpus, ramp, folder / "run")
            after = nll(model)
            final = model.model.hidden_scale.item() if opening.how == "learned" else model.config.plt_hidden_scale
            content = {
                "opening": dataclasses.asdict(opening),
                "first_bits": at_first.bits_per_byte,
                "bits": after.bits_per_byte,
                "nll": after.nll[:, -1].tolist(),
                "bytes": after.bytes.tolist(),
                "gate": gate_mean(model, ids),
                "final_share": final / unit,
                "seconds": seconds,
            }
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(content))
        results.append(json.loads(record.read_text()))
        r = results[-1]
        console.print(
            f"{opening.name}: {r['first_bits'][-1]:.4f} -> {r['bits'][-1]:.4f}, {r['seconds']:.0f} s", highlight=False
        )

    weights = resample_weights(len(results[0]["nll"]), 1, np.random.default_rng(0))
    table = Table(title=f"{arguments.tokens:,} more tokens, {len(results[0]['nll'])} held-out documents, bits per byte")
    for column in (
        "opening",
        "c / size",
        "after",
        "b",
        "gate after",
        "before",
        "loop 1 after",
        "after",
        "minus the first row",
        "s",
    ):
        table.add_column(column, justify="left" if column == "opening" else "right")
    for r in results:
        o = Opening(**r["opening"])
        change = paired_difference(np.array([r["nll"]]), np.array([results[0]["nll"]]), np.array(r["bytes"]), weights)
        table.add_row(
            o.name, f"{o.share:g}", f"{r['final_share']:.2f}", f"{o.bias:g}", f"{r['gate']:.3f}", f"{r['first_bits'][-1]:.4f}",
            f"{r['bits'][0]:.4f}", f"{r['bits'][-1]:.4f}", f"{change.value:+.4f} ({change.low:+.4f}..{change.high:+.4f})",
            f"{r['seconds']:.0f}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
