"""Settings of a bench, its blocks, their expected duration and memory."""

from dataclasses import dataclass

import torch

from ..errors import BenchError
from ..model.configuration import PLTConfig
from ..model.flops import forward_flops_per_token
from .models import DTYPES, available_bytes
from .variants import WEIGHTS, decode_variants

CONTEXTS = (256, 4096, 16384)
PREFILL_LENGTHS = (2048,)


@dataclass(frozen=True)
class Settings:
    """Settings that all blocks in a folder share."""

    checkpoint: str | None = None
    shape: str | None = None
    loops: tuple[int, ...] = (1, 2, 3, 4)
    steps: int = 16
    repeats: int = 7
    dtype: str = "bfloat16"
    device: str = "cpu"
    compile: bool = False
    static: bool = False
    threads: int = 1
    read_bytes: int = 2**30
    weights: tuple[str, ...] = ()  # quantised ones, beside those of `dtype`

    def check(self) -> None:
        """Check the settings.

        Raises:
            BenchError: a value is out of its bounds.
        """
        if self.loops[0] < 1:
            raise BenchError(f"--loops {self.loops[0]} must be at least 1: 1 is the plain transformer.")
        for name in ("steps", "repeats", "threads"):
            if not 1 <= getattr(self, name) < 2**31:
                raise BenchError(f"--{name} {getattr(self, name)} must be at least 1, and below 2**31.")
        if self.dtype not in DTYPES:
            raise BenchError(f"--dtype {self.dtype!r} is unknown: use one of {', '.join(DTYPES)}.")
        for name in self.weights:
            if name not in WEIGHTS:
                raise BenchError(f"--weights {name!r} is unknown: use some of {', '.join(WEIGHTS)}.")
        if self.weights and self.dtype != "bfloat16":
            raise BenchError(
                f"--weights {self.weights[0]} with --dtype {self.dtype}: quantised weights have kernels for bfloat16 only."
            )


def plan(
    settings: Settings, config: PLTConfig, contexts: list[int] | None, batch_sizes: list[int], lengths: list[int] | None
) -> list[tuple[str, int, int]]:
    """Return the blocks, (phase, tokens, batch size). Default lengths are cut to the model's longest text; given lengths
    must fit.

    Raises:
        BenchError: a length does not fit, or there is nothing to measure.
    """
    limit = config.max_position_embeddings
    if min(batch_sizes) < 1:
        raise BenchError(f"--batch-sizes {min(batch_sizes)} must be at least 1.")
    blocks = []
    for phase, asked, default, new in (
        ("prefill", lengths, PREFILL_LENGTHS, 0),
        ("decode", contexts, CONTEXTS, settings.steps),
    ):
        option = "--prefill-lengths" if phase == "prefill" else "--contexts"
        for tokens in asked or [n for n in default if n + new <= limit] or [limit - new]:
            if tokens + new > limit:
                steps = f" and {new} --steps" if new else ""
                raise BenchError(
                    f"{option} {tokens}{steps} are more than the {limit} tokens this model was made for "
                    f"(max_position_embeddings): take at most {limit - new}."
                )
            if tokens < 0 or (tokens == 1 and new):
                raise BenchError(f"{option} {tokens} must be at least {1 + (new > 0)}, or 0 to leave it out.")
            blocks += [(phase, tokens, n) for n in batch_sizes] if tokens else []
    if not blocks:
        raise BenchError("nothing to measure: --contexts and --prefill-lengths are both 0.")
    return list(dict.fromkeys(blocks))


def work(settings: Settings, config: PLTConfig, weights: int, key: tuple[str, int, int]) -> float:
    """Estimate a block's duration for the progress bar, in arbitrary units: bytes to read, or computation at 64
    operations per byte."""
    phase, tokens, batch_size = key
    if phase == "prefill":
        flops = [forward_flops_per_token(config, tokens, n) for n in (1, *settings.loops)]
        flops *= 1 + len(settings.weights)
        return sum(flops) * tokens * batch_size / 64
    variants = decode_variants(list(settings.loops), True, settings.compile, settings.weights)
    visits = sum(1 if variant.one_pass else variant.loops for variant in variants)
    return (settings.steps + 1) * (
        visits * weights + len(variants) * batch_size * tokens * cached_token_bytes(config, settings)
    )


def too_large(settings: Settings, config: PLTConfig, key: tuple[str, int, int], device: torch.device) -> str | None:
    """Return why a block does not fit into memory, by an estimate; None if it does."""
    phase, tokens, batch_size = key
    texts = tokens * batch_size
    caches: float = texts * cached_token_bytes(config, settings)
    layer = caches / config.num_hidden_layers
    if phase == "prefill":  # after a prefill, windows still hold the whole prompt
        itemsize = DTYPES[settings.dtype].itemsize
        needed = caches * settings.loops[-1] + texts * itemsize * (4 * config.intermediate_size + 12 * config.hidden_size)
    else:  # the random values, copies of a layer, and if attention cannot group heads, keys and values for every head
        groups = config.num_attention_heads // config.num_key_value_heads
        needed = caches * (2 if settings.static or settings.compile else 1) + layer * (5 + 2 * groups)
    needed += settings.read_bytes
    free = available_bytes(device)
    if free is None or needed < free:
        return None
    return f"it needs about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free"


def cached_token_bytes(config: PLTConfig, settings: Settings) -> int:
    """Return the bytes of loop 1's keys and values of one token, over all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * DTYPES[settings.dtype].itemsize
