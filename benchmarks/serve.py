"""What a token costs when vLLM serves it: a plain Llama, R = 1, and R = 2 in one pass and as a pass per loop, side by side.

    python benchmarks/serve.py [--shape 600m] [--loops 1 2] [--requests 1 4 16] [--context 256] [--repeats N] [--compile]
    python benchmarks/serve.py --kernel      the matrix products alone, by rows, with the kernel that vLLM uses on CPUs

Run it in an environment of vLLM. All engines live in this process and take turns, a few steps each; weights are random. Printed are
medians over repeats of the time of a decode step, which gives every request one token, and the ratio to R = 1 of the same turn with
its quartiles.
"""

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from vllm import LLM, SamplingParams

from parloop.model.configuration import ARCHITECTURE
from parloop.model.shapes import SHAPES, SHARED
from parloop.timing import Spread, interleaved, seconds_of


def lines(loops: list[int]) -> dict[str, dict]:
    """Name -> what is laid over the configuration, and the engine's options."""
    found: dict[str, dict] = {"Llama": {"llama": True}}
    for R in loops:
        found[f"R = {R}"] = {"loops": R}
        if R > 1:
            found[f"R = {R}, pass per loop"] = {"loops": R, "additional_config": {"plt_one_pass": False}}
    return found


def engine(folder: Path, shape: str, llama: bool = False, loops: int = 1, **options) -> LLM:
    config = {
        **SHARED,
        **SHAPES[shape],
        "plt_num_loops": loops,
        "model_type": "iquestpltcoder",
        "architectures": [ARCHITECTURE],
    }
    if llama:
        config = {k: v for k, v in config.items() if not k.startswith("plt_")}
        config |= {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
        }
    config.setdefault("max_position_embeddings", 32768)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return LLM(str(folder), load_format="dummy", skip_tokenizer_init=True, **options)


def start(llm: LLM, requests: int, context: int, vocabulary: int, tokens: int) -> None:
    """Requests with different prompts, up to their first decode step."""
    server = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    for i in range(requests):
        prompt = [(7 * i + 13 * t + 1) % vocabulary for t in range(context)]
        server.add_request(f"{i}", {"prompt_token_ids": prompt}, params)
    answered: set[str] = set()
    while len(answered) < requests:
        answered |= {output.request_id for output in server.step() if output.outputs[0].token_ids}


def stop(llm: LLM) -> None:
    server = llm.llm_engine
    server.abort_request(list(server.output_processor.request_states), internal=True)
    while server.has_unfinished_requests():
        server.step()


def kernel(shape: str, repeats: int) -> None:
    """What a decode step's matrix products cost for more rows than one: no model and no scheduler beside them."""
    import torch
    import vllm._custom_ops as ops

    s = SHAPES[shape]
    D, K = s["hidden_size"], s["head_dim"]
    H, G, ffn = s["num_attention_heads"], s["num_key_value_heads"], s["intermediate_size"]
    layer = [(D, (H + 2 * G) * K), (H * K, D), (D, 2 * ffn), (ffn, D)]
    sizes = layer * s["num_hidden_layers"] + [(D, s["vocab_size"])]
    weights = [ops.create_onednn_mm((torch.randn(o, i) * 0.02).bfloat16().t()) for i, o in sizes]

    def products(x: dict[int, Any]) -> None:
        for (i, _), weight in zip(sizes, weights):
            ops.onednn_mm(weight, x[i], None)

    def run(rows: int) -> float:
        return seconds_of(partial(products, {i: torch.randn(rows, i).bfloat16() for i, _ in sizes}))

    times = interleaved({rows: partial(run, rows) for rows in (1, 2, 3, 4, 8, 16, 32)}, repeats)
    table = Table("rows", "ms", "to 1 row", title=f"{shape}: all matrix products of a step, bfloat16")
    for rows, own in times.items():
        ratio = Spread.of_ratios(own, times[1])
        shown = f"{ratio.median:.2f} ({ratio.low:.2f}..{ratio.high:.2f})"
        table.add_row(str(rows), f"{1000 * Spread.of(own).median:.1f}", shown)
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="600m")
    parser.add_argument("--loops", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16], help="at a time")
    parser.add_argument("--context", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--repeats", type=int, default=7, help="turns that count; one more warms up")
    parser.add_argument("--steps", type=int, default=8, help="decode steps a turn")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--compile", action="store_true", help="let vLLM compile what it can (the Llama) and capture CUDA graphs"
    )
    parser.add_argument("--kernel", action="store_true", help="only the matrix products, with their quartiles")
    arguments = parser.parse_args()
    if arguments.kernel:
        return kernel(arguments.shape, 3 * arguments.repeats)

    steps, turns = arguments.steps, arguments.repeats + 1
    length = arguments.context + steps * turns + 16
    with tempfile.TemporaryDirectory() as scratch:
        engines = {
            name: engine(
                Path(scratch, str(i)),
                arguments.shape,
                dtype=arguments.dtype,
                enforce_eager=not arguments.compile,
                max_model_len=length,
                max_num_seqs=max(arguments.requests),
                enable_prefix_caching=False,
                gpu_memory_utilization=0.9 / (len(arguments.loops) * 2 + 1),
                **options,
            )
            for i, (name, options) in enumerate(lines(arguments.loops).items())
        }
    vocabulary = SHAPES[arguments.shape]["vocab_size"]
    for requests in arguments.requests:
        for llm in engines.values():
            start(llm, requests, arguments.context, vocabulary, length)

        def run(llm: LLM) -> None:
            for _ in range(steps):
                llm.llm_engine.step()

        with Progress() as progress:
            task = progress.add_task(f"{requests} requests", total=turns * len(engines))
            measured = interleaved(
                {name: partial(seconds_of, partial(run, llm)) for name, llm in engines.items()}, arguments.repeats,
                after_run=partial(progress.advance, task),
            )  # fmt: skip
        times = {name: [value / steps for value in own] for name, own in measured.items()}
        for llm in engines.values():
            stop(llm)
        table = Table(title=f"{arguments.shape}, {arguments.dtype}, {requests} requests of {arguments.context} tokens")
        for column in ("", "ms/step", "tokens/s", "to R = 1", "to Llama"):
            table.add_column(column, justify="right" if column else "left")
        for name, own in times.items():
            median = Spread.of(own).median
            spreads = [Spread.of_ratios(own, times.get(other, own)) for other in ("R = 1", "Llama")]
            ratios = [f"{ratio.median:.2f} ({ratio.low:.2f}..{ratio.high:.2f})" for ratio in spreads]
            table.add_row(name, f"{1000 * median:.1f}", f"{requests / median:.1f}", *ratios)
        Console(width=110).print(table)


if __name__ == "__main__":
    main()
