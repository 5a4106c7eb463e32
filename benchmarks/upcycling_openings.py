"""What an opening costs before any training: how far the logits are from the source's, and how much the loss moves.

    python benchmarks/upcycling_openings.py [--dense runs/study-quick/r1-seed0]

First the logits of small random models of three families against the gates' bias, at c = 0. Then, with --dense, the loss of a PLT of
one loop that `parloop train` or a study left, converted to two, against c (relative to the scale that makes the previous loop's
state as large as the embedding) and the bias.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from parloop.convert import convert
from parloop.convert.opening import OPEN_SHARE
from parloop.corpus import load_corpus, text_ids
from parloop.train import Recipe

BIASES = (12.0, 14.0, 15.0, 16.0, 17.0)
SHARES = (0.0, 0.03, 0.1, 0.3, 1.0)
SHAPE = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.1,
}  # fmt: skip


def logits(scratch: Path) -> None:
    table = Table(
        "source",
        "float32 against float64",
        *(f"b = {b:g}" for b in BIASES),
        title="largest change of a logit, R = 2, w = 4, 90 tokens",
    )
    torch.manual_seed(0)
    ids = torch.randint(512, (2, 90))
    for kind in (LlamaConfig, Qwen2Config, Qwen3Config):
        source = scratch / kind.model_type
        dense = AutoModelForCausalLM.from_config(kind(**SHAPE)).float().eval()
        dense.save_pretrained(source)
        with torch.no_grad():
            expected = dense(ids).logits
            row = [f"{(dense.double()(ids).logits - expected).abs().max():.1e}"]
            for bias in BIASES:
                convert(source, scratch / f"{kind.model_type}-{bias:g}", loops=2, window=4, gate_bias=bias, samples=0)
                model = AutoModelForCausalLM.from_pretrained(scratch / f"{kind.model_type}-{bias:g}")
                row.append(f"{(model(ids).logits - expected).abs().max():.1e}")
        table.add_row(kind.model_type, *row)
    Console(width=120).print(table)
    b = torch.tensor(BIASES, requires_grad=True)
    b.sigmoid().sum().backward()
    assert b.grad is not None
    gradients = ", ".join(f"{bias:g}: {gradient:.1e}" for bias, gradient in zip(BIASES, b.grad.tolist()))
    Console(width=120).print(f"gradient of g by b, {gradients}", highlight=False)


def losses(dense: str, scratch: Path) -> None:
    recipe = Recipe.load(f"{dense}/recipe.yaml")
    corpus = load_corpus(recipe.corpus_settings())
    T, rows = 128, 96
    stream = [i for text in corpus.validation["text"][:12] for i in text_ids(corpus.tokenizer, text)]
    ids = torch.tensor(stream[: rows * T]).view(-1, T)
    made = convert(dense, scratch / "plt", loops=2, window=32, start="open", samples=0)
    model = AutoModelForCausalLM.from_pretrained(scratch / "plt").eval()
    unit = made.config.plt_hidden_scale / OPEN_SHARE
    loss, table = float("nan"), Table("b", *(f"c = {share:g}" for share in SHARES))

    def nats(state: torch.Tensor) -> float:
        return F.cross_entropy(model.lm_head(state)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()

    for bias in (16.0, 4.0, 2.0, 0.0):
        row = []
        for share in SHARES:
            model.config.plt_hidden_scale = share * unit
            for layer in model.model.layers:
                layer.self_attn.plt_gate.bias.data.fill_(bias)
            with torch.no_grad():
                first, second = model.model(ids, use_cache=False).loop_states
                loss = nats(first)
                row.append(f"{nats(second) - loss:+.4f}")
        table.add_row(f"{bias:g}", *row)
    table.title = f"{dense}: nats per token over {loss:.4f}, {len(ids)} held-out rows of {T} tokens, R = 2"
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", help="a run of `parloop train` or a study with one loop")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        logits(Path(scratch))
        if arguments.dense:
            losses(arguments.dense, Path(scratch))


if __name__ == "__main__":
    main()
