"""The model on several processes: FSDP2 through transformers' own plan, and how often a looped model's weights are gathered.

A process group comes from the launcher (torchrun or accelerate launch). FSDP2 keeps a shard of every weight on every process, gathers
a layer's weights before it runs, and sums and scatters its gradient afterwards. A PLT visits every layer R times, so there are
two ways:

    gather: step    weights are gathered once and kept until the step's last backward pass. Traffic does not depend on R; every process
                    holds one copy of the weights in the computation's precision
    gather: visit   weights are gathered for every visit, forward and backward, and freed after it: 2R times the traffic, and
                    every process holds two layers

The gradient of a weight is the sum over its R visits. Autograd sums them before FSDP2 sees them, so gradients are scattered once
per micro-batch either way; until loop 1's backward pass, every process holds the sums of all layers.
"""

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.distributed import DistributedConfig

from ..errors import RecipeError
from ..model.configuration import PLTConfig
from ..model.modeling import PLTForCausalLM
from ..model.rotary import PLTRotaryEmbedding
from .recipe import RunSettings


def start_processes(settings: RunSettings) -> PartialState:
    """Return this process's state among those that the launcher started, or alone if there was no launcher.

    Raises:
        RecipeError: there is no such device, or the processes cannot share the batch or the replicas evenly.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device='cuda', but torch finds no GPU here: use --device cpu or auto.")
    if settings.device == "cpu" and torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RecipeError(
            "device='cpu' with several processes on a machine with GPUs: hide them, CUDA_VISIBLE_DEVICES='' torchrun .."
        )
    state = PartialState(cpu=not uses_cuda(settings))
    each = state.num_processes * settings.gradient_accumulation
    if settings.batch_size % each:
        raise RecipeError(
            f"batch_size={settings.batch_size} cannot be divided by {state.num_processes} processes and "
            f"gradient_accumulation={settings.gradient_accumulation}: choose a multiple of {each}."
        )
    if state.num_processes > 1 and state.num_processes % settings.replicas:
        raise RecipeError(f"replicas={settings.replicas} must divide the number of processes, {state.num_processes}.")
    return state


@contextlib.contextmanager
def first_process_first(state: PartialState) -> Iterator[None]:
    """Let the first process run the block, then the others. Its work may take hours, longer than the default timeout of
    collectives."""
    if state.num_processes == 1:
        yield
        return
    group = _patient_group()
    if not state.is_main_process:
        dist.barrier(group=group)
    yield
    if state.is_main_process:
        dist.barrier(group=group)


@functools.cache
def _patient_group() -> Any:
    return dist.new_group(backend="gloo", timeout=timedelta(days=2))


def uses_cuda(settings: RunSettings) -> bool:
    """Return whether a run computes on a GPU."""
    return settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())


def uses_bfloat16(settings: RunSettings) -> bool:
    """Return whether a run computes in bfloat16. Not by default on CPUs, where autocast made steps of small models slower
    (docs/log.md)."""
    wanted = settings.precision == "bfloat16"
    return wanted or (settings.precision == "auto" and uses_cuda(settings) and torch.cuda.is_bf16_supported())


def empty_model(config: PLTConfig, settings: RunSettings, state: PartialState) -> PLTForCausalLM:
    """Return a float32 model whose weights have no values yet. With several processes, each holds only its shards.

    Set the values with `fill`, or with checkpoint.load_weights.
    """
    distributed = mesh = None
    if state.num_processes > 1:
        sizes = {"fsdp_size": state.num_processes // settings.replicas, "dp_replicate_size": settings.replicas}
        distributed, _, mesh = PLTForCausalLM.prepare_distribute_model(
            DistributedConfig(**sizes, fsdp_mixed_precision=uses_bfloat16(settings))
        )
    with torch.device("meta"):
        model = PLTForCausalLM(config)
    model.set_attn_implementation(settings.attention)
    if mesh is not None:
        style = "keep_full_weight" if settings.gather == "step" else "free_full_weight"
        # Final norm and head stay in the root group, which stays gathered: the norm runs once per loop, and fused losses read the
        # head's weight without calling it. So does a tied matrix, which is used at both ends.
        plan = {"model.layers.*": style} | ({} if config.tie_word_embeddings else {"model.embed_tokens": style})
        model.fsdp_plan = plan  # type: ignore[misc]
        model = PLTForCausalLM.maybe_distribute_model(model, distributed, mesh)
        if settings.gather == "step":
            model.set_reshard_after_backward(False)
    device = state.device if mesh is not None else torch.device("cpu")
    model.to_empty(device=device)
    model.model.rotary_emb = PLTRotaryEmbedding(config).to(device)  # type: ignore[arg-type]  # computed, not loaded
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def fill(model: PLTForCausalLM, values: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy whole tensors, one after the other, into a model that may be sharded. Every process must pass the same values."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values:
            target = parameters[name]
            if isinstance(target, DTensor):
                value = value.to(target.device)
                value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
            target.copy_(value)


def free_gathered(model: torch.nn.Module) -> None:
    """Free gathered weights, so that only shards are left, which the optimizer updates.

    Note: weights that stayed gathered would be used in the next step with their values from before the update.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(model: torch.nn.Module) -> bool:
    """Return whether FSDP2 shards the model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def main_process() -> bool:
    """Return whether this process is the first, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Wait for all processes, if there are several."""
    if dist.is_initialized():
        PartialState().wait_for_everyone()


def mean_over_processes(value: torch.Tensor) -> float:
    """Return the mean of `value` over all processes. Every process must call it."""
    if dist.is_initialized():
        value = value.detach().clone()
        dist.all_reduce(value)
        return value.item() / dist.get_world_size()
    return value.item()


def agreed(folder: Path | None) -> Path | None:
    """Return the first process's value on every process. Every process must call it."""
    if not dist.is_initialized():
        return folder
    said = [folder]
    dist.broadcast_object_list(said, src=0)
    return said[0]
