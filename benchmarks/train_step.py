"""What a training step costs against the loop count: forward, backward and optimiser step, R = 1..4.

    python benchmarks/train_step.py [--shape small|medium] [--repeats N] [--threads N]

Runs of all loop counts are interleaved; printed are medians, and the ratio to R = 1 as median and quartiles over repeats.
The row "R = 2, dense mask" is the same model with its window as one T x T mask instead of bands.
"""

import argparse
from contextlib import contextmanager, nullcontext
from functools import partial

import torch

from parloop import PLTConfig, PLTForCausalLM
from parloop.model import window
from parloop.timing import Spread, interleaved, seconds_of

SHAPES = {  # hidden, layers, heads, kv heads, ffn, vocabulary, batch, T, w
    "small": (128, 3, 4, 2, 384, 2048, 8, 512, 32),
    "medium": (512, 6, 8, 4, 1536, 8192, 2, 1024, 64),
}


def build(shape: str, loops: int) -> PLTForCausalLM:
    D, L, H, G, ffn, V, _, T, w = SHAPES[shape]
    torch.manual_seed(0)
    return PLTForCausalLM(
        PLTConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=ffn,
            num_hidden_layers=L,
            num_attention_heads=H,
            num_key_value_heads=G,
            head_dim=D // H,
            max_position_embeddings=T,
            eos_token_id=None,
            plt_num_loops=loops,
            plt_window_size=[w, 0],
            plt_emb_scale=0.707,
            plt_hidden_scale=0.0141,
            plt_gate_use_hidden_states=True,
        )
    ).train()


@contextmanager
def dense_window(T: int):
    original = window.band_block
    window.band_block = lambda w: T
    try:
        yield
    finally:
        window.band_block = original


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    *_, V, B, T, _ = SHAPES[arguments.shape]
    ids = torch.randint(V, (B, T))

    runs = {f"R = {r}": build(arguments.shape, r) for r in (1, 2, 3, 4)}
    runs["R = 2, dense mask"] = runs["R = 2"]
    optimizers = {id(m): torch.optim.AdamW(m.parameters(), lr=1e-4) for m in runs.values()}

    def step(name: str) -> None:
        model = runs[name]
        with dense_window(T) if "dense" in name else nullcontext():
            model(ids, labels=ids).loss.backward()
        optimizers[id(model)].step()
        optimizers[id(model)].zero_grad()

    variants = {name: partial(seconds_of, partial(step, name)) for name in runs}
    seconds = interleaved(variants, arguments.repeats, warm_up=2)
    print(f"{arguments.shape}: {SHAPES[arguments.shape]}, {arguments.threads} threads, torch {torch.__version__}")
    print(f"{'':20}{'ms per step':>12}{'over R = 1':>12}   quartiles")
    for name, values in seconds.items():
        ratio = Spread.of_ratios(values, seconds["R = 1"])
        print(f"{name:20}{1e3 * Spread.of(values).median:12.1f}{ratio.median:12.2f}   {ratio.low:.2f} .. {ratio.high:.2f}")


if __name__ == "__main__":
    main()
