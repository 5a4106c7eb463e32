"""The start of a converted model's loops: gates, the scale of the previous loop's state, and the resulting loss."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from ..checkpoints import load_model
from ..corpus.corpus import CorpusSettings
from ..corpus.samples import samples_of
from ..errors import ConvertError, first_line
from ..model.configuration import GATE, PLTConfig
from .weights import rows_of

EXACT_BIAS = 16.0
OPEN_BIAS = 0.0
OPEN_SHARE = 1.0  # size of the previous loop's state in a later loop's input, relative to the embedding
SAMPLE_TOKENS = 512


def initial_gates(config: PLTConfig, bias: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return gates with zero weights: sigmoid(bias) at every token. Names -> tensors, weights [H, D]."""
    gates = {}
    for i in range(config.num_hidden_layers):
        name = f"model.layers.{i}.self_attn.{GATE}"
        gates[f"{name}.weight"] = torch.zeros(config.num_attention_heads, config.hidden_size, dtype=dtype)
        gates[f"{name}.bias"] = torch.full((config.num_attention_heads,), bias, dtype=dtype)
        gates[f"{name}.gate_norm.weight"] = torch.ones(config.hidden_size, dtype=dtype)
    return gates


def embedding_size(files: Iterable[Path]) -> float:
    """Return the ratio of the embedding's root mean square to that of a state after the final norm: the c that makes both
    equally large."""

    def mean_square(name: str) -> float:
        parts = [(float(rows.double().pow(2).sum()), rows.numel()) for rows in rows_of(files, name)]
        return sum(total for total, _ in parts) / sum(count for _, count in parts)

    return math.sqrt(mean_square("model.embed_tokens.weight") / mean_square("model.norm.weight"))


def sample_rows(source: Path, data: str, samples: int, longest: int) -> list[torch.Tensor]:
    """Return rows of token ids of a text, each [1, T].

    Raises:
        ConvertError: the source has no tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # transformers raises a dozen kinds for files of a wrong form
        raise ConvertError(
            f"source {str(source)!r} has no tokenizer to measure a loss with: use --samples 0 ({first_line(error)})."
        ) from error
    rows = samples_of(CorpusSettings(source=data), tokenizer, min(SAMPLE_TOKENS, longest), samples, held_out=False)
    return [torch.tensor([row.ids]) for row in rows]


@torch.no_grad()
def opening_loss(folder: Path, rows: list[torch.Tensor], device: str = "auto") -> tuple[float, float]:
    """Return the loss of loop 1, which is the dense model, and of the last loop, in nats per token."""
    model = load_model(folder, device)
    losses = torch.zeros(2, dtype=torch.float64)
    for row in rows:
        ids = row.to(model.device)
        states = model.model(ids, use_cache=False).loop_states
        for i, state in enumerate((states[0], states[-1])):
            logits = model.lm_head(state)[0, :-1].float()
            losses[i] += F.cross_entropy(logits, ids[0, 1:], reduction="sum").double().cpu()
    source_loss, loss = (losses / sum(row.shape[1] - 1 for row in rows)).tolist()
    return source_loss, loss
