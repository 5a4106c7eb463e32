"""LoRA on a looped model: which rank and which rate, against the loop count.

    python benchmarks/lora.py --output runs/lora

A base for each loop count (the quick recipe on the standard library, rows of 256 tokens) is fine-tuned on conversations: a function's signature
and docstring are the question, its body is the answer; functions of installed packages, which the base has not seen. Printed is the held-out
loss of the answers, in nats per token, against rank and rate, and full fine-tuning beside it. One adapter acts in every loop.
"""

import argparse
import ast
import dataclasses
import json
import sysconfig
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from parloop.corpus import load_corpus
from parloop.corpus.chat import load_chat
from parloop.corpus.sources import files_of
from parloop.errors import TrainingDivergedError
from parloop.train import ChatRecipe, Recipe
from parloop.train.conversations import Rows, packed
from parloop.train.training import train

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}# ask\n{{ m.content }}\n# answer\n{% else %}{% generation %}{{ m.content }}<|eos|>"
    "{% endgeneration %}{% endif %}{% endfor %}"
)


def conversations(path: Path, count: int) -> None:
    """Short documented functions of installed packages."""
    rows: list[str] = []
    for file in files_of(sysconfig.get_paths()["purelib"]):
        if file.suffix != ".py" or len(rows) >= count:
            continue
        try:
            source = file.read_text()
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            doc = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if not doc or not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
                continue
            body = "\n".join(ast.unparse(statement) for statement in node.body[1:])
            asked = f"{node.name}({ast.unparse(node.args)}): {doc.splitlines()[0]}"
            if 20 < len(body) < 250 and len(asked) < 150:
                messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": body}]
                rows.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(rows[:count]))


@torch.no_grad()
def held_out(folder: Path, recipe: ChatRecipe, tokenizer, rows) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    batches = packed(rows, recipe)
    collate = Rows(recipe.length, 0)
    total, count = 0.0, 0
    for start in range(0, len(batches), 8):
        batch = collate([batches[i] for i in range(start, min(start + 8, len(batches)))])
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/lora"))
    parser.add_argument("--loops", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--full-rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--conversations", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    console = Console(width=120)
    settings.output.mkdir(parents=True, exist_ok=True)
    chat = settings.output / "chat.jsonl"
    if not chat.exists():
        conversations(chat, settings.conversations)
    quick = Recipe.load("quick", length=256, batch_size=4, eval_every=0, save_every=10**6, tokens=1_000_000)
    corpus = load_corpus(quick.corpus_settings(), console=console)
    for loops in settings.loops:
        base = settings.output / f"base-r{loops}"
        train(dataclasses.replace(quick, loops=loops), base, corpus=corpus, console=console)
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(base)
        recipe = ChatRecipe(
            model=str(base), chat=str(chat), length=256, batch_size=8, epochs=2, eval_every=0, save_every=10**6, device="cpu"
        )
        rows = load_chat(str(chat), tokenizer, 256, recipe.validation_share, {2}).validation
        before = held_out(base, recipe, tokenizer, rows)
        table = Table(
            title=f"R = {loops}: held-out nats per token of answers, {before:.4f} before; {len(rows)} conversations"
        )
        table.add_column("rank")
        for rate in settings.rates:
            table.add_column(f"rate {rate:g}", justify="right")
        for rank in (*settings.ranks, 0):
            cells = []
            for rate in settings.rates if rank else settings.full_rates:
                folder = settings.output / f"r{loops}-rank{rank}-{rate:g}"
                kept = folder / "held-out.json"
                if not kept.exists():
                    own = dataclasses.replace(recipe, lora_rank=rank, lora_alpha=2.0 * max(rank, 1), learning_rate=rate)
                    try:
                        train(own, folder, console=console)
                        loss = held_out(folder, own, tokenizer, rows)
                    except TrainingDivergedError:
                        loss = None
                    kept.write_text(json.dumps(loss))
                loss = json.loads(kept.read_text())
                cells.append(("diverged" if loss is None else f"{loss:.4f}") + ("" if rank else f" at {rate:g}"))
            table.add_row(str(rank) if rank else "all weights", *cells)
        console.print(table)


if __name__ == "__main__":
    main()
