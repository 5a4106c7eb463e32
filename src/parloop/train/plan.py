"""Plan a recipe before it is run: parameters, FLOPs, memory per GPU, days. The model is built on the meta device only.

FLOPs are counted from the shape (model/flops.py). Memory is the sum of the tensors that a training step holds at its peak, from a list of
those that each layer keeps for its backward pass; `benchmarks/training_memory.py` compares both with measured runs. Workspace of a GPU's
kernels and of its allocator comes on top.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..model.configuration import PLTConfig
from ..model.flops import training_flops_per_token
from ..model.modeling import PLTForCausalLM
from ..model.window import band_block
from .recipe import ChatRecipe, Recipe

GPUS = (1, 8, 64, 512)
PEAK_FLOPS = 989e12  # FLOP/s of an H100 or H200 in bfloat16, without sparsity
UTILISATION = 0.4
GPU_BYTES = 80e9
ROOM = 0.85  # share of GPU_BYTES that a plan may use; kernels and the allocator get the rest


@dataclass
class Memory:
    """Bytes on one GPU.

    Attributes:
        states: float32 weights, gradients and Adam's two moments, sharded.
        gathered: weights in the computation's precision: gathered, or cast if there is one process.
        cast: further cast weights, freed when the forward pass ends.
        activations: tensors that the forward pass keeps for the backward pass.
        logits: tensors of the loss, in several precisions.
        recomputed: one layer, or one loop, run again in the backward pass.
        gradients: sums over loops of the layers' gradients, before they are scattered.
        gone: activations that the last loop's backward pass frees, minus the gradients that it leaves.
    """

    states: float
    gathered: float
    cast: float
    activations: float
    logits: float
    recomputed: float
    gradients: float
    gone: float

    @property
    def total(self) -> float:
        """Peak bytes, at the worse of two moments: at the loss, when all activations are held; and at the end of the last
        loop's backward pass, when its activations are freed but all layers' gradients wait for the other loops'."""
        at_loss = self.activations + max(self.logits + self.cast, self.recomputed)
        later = self.activations - self.gone + self.recomputed + self.gradients
        return self.states + self.gathered + max(at_loss, later)


def parameters(config: PLTConfig) -> dict[str, int]:
    """Count the parameters of the layers, the embedding, the head and the gates, and the total."""
    with torch.device("meta"):
        model = PLTForCausalLM(config)
    layers = sum(p.numel() for p in model.model.layers.parameters())
    total = sum(p.numel() for p in model.parameters())
    embedding = model.model.embed_tokens.weight.numel()
    head = 0 if config.tie_word_embeddings else model.lm_head.weight.numel()
    gates = sum(p.numel() for name, p in model.named_parameters() if "plt_gate" in name)
    return {"layers": layers, "embedding": embedding, "head": head, "gates": gates, "total": total}


@dataclass(frozen=True)
class Arithmetic:
    """Computation of a step.

    Attributes:
        element: bytes per number: 2 for bfloat16, 4 for float32.
        stream: bytes per number of the residual stream: 4 under autocast, whose embedding gives float32 (one process); otherwise as
            element (on several processes FSDP2 casts all weights).
        fused: norms are one kernel, as on GPUs; on CPUs they also keep their normalised input in float32.
    """

    element: int = 2
    stream: int = 2
    fused: bool = True

    @property
    def autocast(self) -> bool:
        """Whether autocast computes in a lower precision than the residual stream's."""
        return self.stream > self.element

    def norm(self, width: int, readers: int, source: bool = True) -> float:
        """Return the bytes per token that a norm keeps: its input (if nothing else keeps it), and its output once, or under
        autocast once for every layer that reads it."""
        output = self.element * width * (readers if self.autocast else 1)
        if self.fused:
            return output + source * self.stream * width
        return output + 4 * width + (source or self.stream < 4) * 4 * width


def kept_per_token(config: PLTConfig, loop: int, arithmetic: Arithmetic) -> float:
    """Return the bytes per token that one visit of a layer keeps for its backward pass.

    Args:
        config: configuration of the model.
        loop: 1, or larger: later loops attend twice and have gates.
        arithmetic: how a step computes.
    """
    D, F = config.hidden_size, config.intermediate_size
    H, q = config.num_attention_heads, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    norms = arithmetic.norm(D, 3) + arithmetic.norm(D, 2)  # read by q, k, v and by gate, up
    attention = 4 * q + H  # query, output (the projection's input), key and value for every head; log-sum-exp
    mlp = 4 * F  # gate, its activation, up, their product
    kept = attention + mlp
    if loop == 1:
        return norms + arithmetic.element * (kept + 2 * kv)  # + keys and values, which later loops read
    w = config.window_tokens
    bands = 2 * q * (1 + w / band_block(w)) if w else 0  # keys and values of the window, overlapping
    if config.plt_gate_use_hidden_states:
        norms += arithmetic.norm(D, 1, source=False)
    return norms + arithmetic.element * (kept + 3 * q + 2 * H + bands)  # folded query, both outputs, the gate, their blend


def training_memory(
    config: PLTConfig,
    rows: int,
    length: int,
    *,
    loops: int | None = None,
    checkpointing: str = "none",
    shards: int = 1,
    processes: int | None = None,
    gather: str = "step",
    element: int = 2,
    fused: bool = True,
    adapters: int = 0,
) -> Memory:
    """Compute the memory, in bytes, that a training step takes on one process.

    Args:
        config: configuration of the model.
        rows: rows of this process's micro-batch.
        length: tokens per row.
        loops: loop count; default: the configuration's.
        checkpointing: a recipe's gradient_checkpointing: none, layer, loop or both.
        shards: number of processes that the states are sharded over.
        processes: number of all processes; default: shards.
        gather: a recipe's gather: step or visit.
        element: bytes per number in the computation: 2 for bfloat16, 4 for float32.
        fused: see Arithmetic.
        adapters: number of LoRA parameters; if there are any, they alone are trained.
    """
    alone = (processes or shards) == 1
    R, L, D, V = loops or config.plt_num_loops, config.num_hidden_layers, config.hidden_size, config.vocab_size
    kv = config.num_key_value_heads * config.head_dim
    counted = parameters(config)
    # A frozen model on one process is stored in bfloat16; everything else is cast when it is needed.
    cast = element < 4 and not (alone and adapters)
    arithmetic = Arithmetic(element, 4 if alone and cast else element, fused)
    tokens = rows * length
    first, later = (kept_per_token(config, loop, arithmetic) for loop in (1, 2))
    stream = arithmetic.stream * D * tokens  # one state of the residual stream
    keys = element * 2 * kv * L * tokens if R > 1 else 0  # keys and values of loop 1, which all later loops read
    between = R * tokens * arithmetic.norm(D, 1) + (R - 1) * stream  # final norms, inputs of loops
    visits = tokens * L * (first + (R - 1) * later)
    largest = tokens * (later if R > 1 else first)
    held = {"none": visits, "layer": R * L * stream + keys, "loop": R * stream + keys, "both": R * stream + keys}[
        checkpointing
    ]
    # When the last loop's backward pass has ended, its activations are freed, and loop 1's keys have gradients.
    gone = {"none": L * tokens * later, "layer": L * stream, "loop": stream, "both": stream}[checkpointing]
    gone = gone + tokens * arithmetic.norm(D, 1) - keys if R > 1 else held + between
    if R == 2:  # loop 1 comes next
        gone += {"none": 0, "layer": 1, "both": 1, "loop": L}[checkpointing] * tokens * (later - first)
    again = {"none": 0, "layer": largest, "both": L * stream + largest, "loop": L * largest}[checkpointing]
    blocks = -(-length // band_block(config.window_tokens))
    window = rows * blocks * band_block(config.window_tokens) * (config.window_tokens + band_block(config.window_tokens))
    masks = element * (rows * length * length + (window if R > 1 else 0))
    logits = tokens * V * (element + 8)  # the logits; in float32, their log-probabilities and gradient
    layer = counted["layers"] / L
    ends = counted["total"] - counted["layers"]
    if not alone:
        copies = element * (counted["total"] if gather == "step" else ends + 2 * layer)
    else:  # autocast's copies of all matrices but the embedding
        copies = element * (counted["total"] - counted["embedding"]) if cast else 0
    # Autocast's copies are kept for the backward pass; with recomputation they are freed after the forward pass and cast again.
    briefly = copies - element * (counted["head"] + layer) if alone and cast and checkpointing in ("layer", "both") else 0
    sums = element * (counted["layers"] if R > 1 else 2 * layer)
    frozen = 4 if cast or element == 4 else 2
    return Memory(
        states=16 * counted["total"] / shards if not adapters else frozen * counted["total"] / shards + 16 * adapters,
        gathered=copies - briefly,
        cast=briefly,
        activations=held + between + masks,
        logits=logits,
        recomputed=again + 4 * counted["head"],
        gradients=0 if adapters else sums,
        gone=gone,
    )


def plan_of(recipe: Recipe | ChatRecipe) -> dict[str, Any]:
    """Return everything that `parloop train --plan` prints: parameters, FLOPs per token, days, and memory in bytes.

    Raises:
        RecipeError: the recipe describes no model.
    """
    if isinstance(recipe, ChatRecipe) or recipe.init_from is not None:
        from ..checkpoints import load_config

        config = load_config(recipe.model if isinstance(recipe, ChatRecipe) else str(recipe.init_from))
    else:
        config = recipe.plt_config()
    tokens = recipe.tokens if isinstance(recipe, Recipe) else None
    chosen = max(recipe.loop_counts or [config.plt_num_loops])
    counts = sorted({1, 2, 3, 4, chosen})
    flops = {n: training_flops_per_token(config, recipe.length, n) for n in counts}
    rows: list[dict[str, Any]] = []
    for gpus in GPUS:
        each = recipe.batch_size // gpus
        if recipe.batch_size % gpus or gpus % recipe.replicas:
            continue
        for gather in ("step", "visit") if gpus > 1 else ("step",):
            # Choose the fewest passes over a GPU's rows that fit its memory, or one row at a time.
            for micro in sorted((n for n in range(1, each + 1) if each % n == 0), reverse=True):
                memory = training_memory(
                    config, micro, recipe.length, loops=chosen, checkpointing=recipe.gradient_checkpointing,
                    shards=gpus // recipe.replicas, processes=gpus, gather=gather, adapters=_adapters(recipe, config),
                )  # fmt: skip
                if memory.total <= GPU_BYTES * ROOM:
                    break
            rows.append({"gpus": gpus, "accumulation": each // micro, "rows": micro, "gather": gather, "memory": memory})
    return {
        "config": config,
        "recipe": recipe,
        "parameters": parameters(config),
        "loops": chosen,
        "steps": recipe.steps if isinstance(recipe, Recipe) else None,
        "tokens": tokens,
        "flops": flops,
        "gpus": rows,
        "days": {
            gpus: {n: (tokens or 0) * flops[n] / (gpus * PEAK_FLOPS * UTILISATION) / 86400 for n in counts} for gpus in GPUS
        },
    }


def _adapters(recipe: Recipe | ChatRecipe, config: PLTConfig) -> int:
    """Count the parameters of the adapters that a recipe trains."""
    if not isinstance(recipe, ChatRecipe) or not recipe.lora_rank:
        return 0
    with torch.device("meta"):
        model = PLTForCausalLM(config)
    linear = [m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in recipe.lora_targets]
    return sum(recipe.lora_rank * (m.in_features + m.out_features) for m in linear)
