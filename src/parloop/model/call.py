"""Checks of a call: its loop count, its inputs, and all that the model refuses rather than computes wrongly.

Axes: B sequences, T tokens of this call.
"""

import warnings
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers.cache_utils import Cache
from transformers.utils.output_capturing import selected_hidden_states

from .cache import is_static, prefix_tokens
from .configuration import PLTConfig, loop_count


def chosen_loops(model: Any, num_loops: int | None) -> int:
    """R of this call: the configuration's unless given. Warns once of a count that the model was not trained at.

    Raises:
        ValueError: it is not an integer of at least 1.
    """
    config: PLTConfig = model.config
    if num_loops is None:
        return config.plt_num_loops
    num_loops, trained = loop_count(num_loops), config.trained_loops
    usual = num_loops == config.plt_num_loops or num_loops in trained or num_loops in model.warned_loops
    if not usual and not torch.compiler.is_compiling():
        model.warned_loops.add(num_loops)
        warnings.warn(
            f"num_loops={num_loops}, but this model was trained with {' and '.join(map(str, trained))}: expect worse text.",
            stacklevel=3,
        )
    return num_loops


def check_call(model: Any, num_loops: int, output_hidden_states: bool | int | list[int] | None) -> None:
    """Refuse a call whose arguments contradict its loop count.

    Raises:
        ValueError: hidden states chosen by numbers that mean other loops; reentrant checkpointing of loops in
            DistributedDataParallel.
    """
    if num_loops != model.config.plt_num_loops and selected_hidden_states(output_hidden_states) is not None:
        raise ValueError(
            f"output_hidden_states={output_hidden_states!r} counts what {model.config.plt_num_loops} loops return, and this call "
            f"has num_loops={num_loops}: pass output_hidden_states=True, and choose from what is returned."
        )
    if num_loops == 1 or not (model.training and model.gradient_checkpointing):
        return
    if not getattr(model._gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
        return
    parallel = DistributedDataParallel._get_active_ddp_module()
    if parallel is not None and not parallel.static_graph:
        raise ValueError(
            f"Reentrant checkpointing gives every weight a gradient per loop, {num_loops} here, and DistributedDataParallel takes "
            f"one: pass activation_checkpointing_kwargs={{'use_reentrant': False}} (TRL: gradient_checkpointing_kwargs)."
        )


def check_inputs(
    config: PLTConfig,
    num_loops: int,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
) -> tuple[torch.Tensor | None, bool]:
    """Return the attention mask (None if it masks nothing), and whether position_ids pack several documents into a row.

    The mask's values are read, which makes a GPU wait; but not in the single steps that follow a left-padded prompt, where the mask
    grows by ones.

    Raises:
        ValueError: a mask of the wrong shape; padding inside a text; packed documents with a cache, with padding, or in several
            rows with FlashAttention.
    """
    T, backend = inputs_embeds.shape[1], config._attn_implementation
    static = is_static(cache)
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but PLT derives several masks from it (full, "
                f"window, carry): pass [batch, tokens so far], 1 for real tokens and 0 for padding."
            )
        past = 0 if cache is None or static else cache.get_seq_length()
        if not static and attention_mask.shape[1] != past + T:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[1]} tokens, but there are {past + T} so far ({past} "
                f"cached, {T} new): it must cover all of them."
            )
    if torch.compiler.is_compiling():  # what follows reads values
        return attention_mask, position_ids is not None and attention_mask is None and cache is None
    if attention_mask is not None and not (T == 1 and getattr(cache, "is_left_padded", False)):
        is_padded = not bool(attention_mask.all())
        if is_padded and num_loops > 1:
            _refuse_padding_inside(attention_mask[:, prefix_tokens(cache) :])
        if cache is not None:
            cache.is_left_padded = is_padded and bool(attention_mask[:, -1].all())  # type: ignore[attr-defined]
        if not is_padded and not static:
            attention_mask = None
    if position_ids is None or T == 1:
        return attention_mask, False
    if cache is None:
        restarts = position_ids.diff(dim=-1) != 1
    else:
        restarts = position_ids[:, 1:] == 0
    if attention_mask is not None:  # positions may do as they like in padding
        real = attention_mask[:, -T:].bool()
        restarts = restarts & real[:, 1:] & real[:, :-1]
    if not bool(restarts.any()):
        return attention_mask, False
    if cache is not None:
        raise ValueError("position_ids restart in a call that uses a cache: pass packed documents with use_cache=False.")
    if attention_mask is not None:
        raise ValueError(
            "Packed documents (position_ids restart) together with padding in attention_mask: leave attention_mask out. "
            "Documents are distinguished by position_ids, and padding after them is never seen."
        )
    if backend.startswith("flash") and position_ids.shape[0] > 1:
        raise ValueError(
            f"{backend} tells packed documents apart in batches of one row only: use attn_implementation='sdpa' or "
            f"'flex_attention', or one row per batch."
        )
    return None, True


def _refuse_padding_inside(attention_mask: torch.Tensor) -> None:
    """Refuse padding between tokens of one text: windows and carries hold neighbours, and would hold the padding."""
    real = attention_mask.bool()
    if bool(((real[:, 1:] & ~real[:, :-1]).sum(-1) + real[:, 0] > 1).any()):
        raise ValueError(
            "attention_mask has padding between tokens of one text, as a right-padded prompt has when it is continued: leave it "
            "out, or pad the whole conversation on the left again and start from an empty cache."
        )
