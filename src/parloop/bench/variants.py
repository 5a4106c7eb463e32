"""The lines of a bench's tables: a model, a loop count, and a way to run it."""

from collections.abc import Sequence
from dataclasses import dataclass

PLAIN = "bf16"  # weights as --dtype says
WEIGHTS = (PLAIN, "int8", "int4", "int8+head", "int4+head")  # as parloop quantize makes them, and with --head
PASS_PER_LOOP = "a pass per loop: the scheme of the vendor's server, not their code"
WHOLE_PROMPT = "a prefill with every loop on every token"


@dataclass(frozen=True)
class Variant:
    """One line of a table: a model, a loop count, and a way to run it."""

    loops: int
    llama: bool = False  # transformers' LlamaForCausalLM on the same weights
    one_pass: bool = True  # False: a pass over the weights per loop
    compiled: bool = False  # static cache and torch.compile
    tail: bool = True  # False: a prefill runs every loop on the whole prompt
    weights: str = PLAIN

    @property
    def label(self) -> str:
        """Name of the variant in tables."""
        name = "Llama" if self.llama else f"R = {self.loops}"
        name += "" if self.weights == PLAIN else f", {self.weights}"
        name += "" if self.tail else ", whole prompt"
        return name + ("" if self.one_pass else ", pass per loop") + (", compiled" if self.compiled else "")

    @property
    def kind(self) -> str:
        """The way to run the model, in words."""
        if self.llama:
            return "transformers' LlamaForCausalLM"
        if not self.tail:
            return WHOLE_PROMPT
        return "one pass" if self.one_pass else PASS_PER_LOOP


def decode_variants(loops: list[int], llama: bool, compiled: bool, weights: Sequence[str] = ()) -> list[Variant]:
    """Return the variants of a decode block, each loop count also with a pass per loop."""
    ways = [False, True] if compiled else [False]
    variants = [Variant(1, llama=True, compiled=way) for way in ways if llama]
    variants += [Variant(n, compiled=way) for way in ways for n in loops]
    variants += [Variant(n, one_pass=False) for n in loops if n > 1]
    return variants + [Variant(n, weights=name) for name in weights for n in loops]


def prefill_variants(loops: list[int], llama: bool, weights: Sequence[str] = ()) -> list[Variant]:
    """Return the variants of a prefill block, each loop count also on the whole prompt."""
    variants = [Variant(1, llama=True)] * llama + [Variant(n) for n in loops]
    variants += [Variant(n, tail=False) for n in loops if n > 1]
    return variants + [Variant(n, weights=name) for name in weights for n in loops]
