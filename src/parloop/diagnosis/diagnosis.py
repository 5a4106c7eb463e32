"""Run a model over samples and apply every lens: `diagnose(model, batches) -> Diagnosis`.

    batch -> loops 1 .. R+1 of the model (attention lenses, by hooks) -> states -> hidden-state lenses
          -> predictions, a few tokens at a time -> output lenses -> one value per sample, loop and lens

Loop R+1, which the model was not trained for, gives the fixed-point gap of loop R and the loss with one more loop. Only real tokens count:
padding is left out, and no shift, neighbour or next token crosses into another document.
"""

import difflib
import operator
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..errors import DiagnosisError
from ..model.configuration import PLTConfig, loop_count
from ..result import build, plain
from ..statistics import Interval, bootstrap_mean
from .attention import AttentionLenses
from .lenses import (
    LENSES,
    angular_change,
    effective_rank,
    entropy,
    kl,
    offset_cost,
    shares,
    step_size,
    token_rank,
)

LOGIT_BYTES = 128 * 2**20  # of one loop's logits that are processed at a time


@dataclass
class Diagnosis:
    """Values of every lens.

    Attributes:
        loops: R, the number of loops that were run.
        trained_loops: the configuration's loop count.
        values: lens -> [samples, R], one value per sample and loop; NaN where a lens does not exist for a loop. The lenses and
            their units are in `lenses.LENSES`.
        one_more_loss: [samples], loss after loop R + 1, in nats per token.
        tokens: [samples], real tokens.
        by_layer: attention_entropy, attention_kl, head_diversity, head_similarity, gate -> [R, L], means over all samples.
        gate_by_head: [R, L, H]; NaN for loop 1.
        head_cosines: [R, H, H], cosines between heads, means over layers, queries and samples.
    """

    loops: int
    trained_loops: int
    values: dict[str, np.ndarray]
    one_more_loss: np.ndarray
    tokens: np.ndarray
    by_layer: dict[str, np.ndarray]
    gate_by_head: np.ndarray
    head_cosines: np.ndarray

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.tokens)

    def mean(self, lens: str, loop: int) -> Interval:
        """Return the mean of a lens over samples, with its 95% bootstrap interval; NaN where the lens does not exist.

        Args:
            lens: name of the lens, as in `lenses.LENSES`.
            loop: number of the loop, from 1.

        Raises:
            DiagnosisError: there is no such lens or loop.
        """
        return _mean_of_known(self._of(lens, loop))

    def change(self, lens: str, loop: int, since: int | None = None) -> Interval:
        """Return the mean of the lens at `loop` minus at `since` (default: the loop before) on the same samples, with its interval.

        NaN where the lens does not exist for one of them.

        Raises:
            DiagnosisError: there is no such lens or loop, or none before it.
        """
        now = self._of(lens, loop)
        if since is None and operator.index(loop) == 1:
            raise DiagnosisError("change: loop=1 has no loop before it: name another one, since=..")
        return _mean_of_known(now - self._of(lens, loop - 1 if since is None else since, "since"))

    def _of(self, lens: str, loop: int, name: str = "loop") -> np.ndarray:
        """Return the values of a lens at a loop, [samples]."""
        if lens not in self.values:
            close = difflib.get_close_matches(str(lens), self.values, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(self.values)}."
            raise DiagnosisError(f"there is no lens {lens!r}: {hint}")
        if isinstance(loop, bool) or not hasattr(loop, "__index__") or not 1 <= operator.index(loop) <= self.loops:
            there = "1" if self.loops == 1 else f"1 to {self.loops}"
            raise DiagnosisError(f"{name}={loop!r} is not a loop of this diagnosis: there are {there}.")
        return self.values[lens][:, operator.index(loop) - 1]

    def one_more(self) -> Interval:
        """Return the change of the loss by loop R + 1, in nats per token, on the same samples."""
        return _mean_of_known(self.one_more_loss - self.values["loss"][:, -1])

    def joined(self, other: "Diagnosis") -> "Diagnosis":
        """Return one diagnosis of all samples, from this one and another one of the same model."""
        share = other.tokens.sum() / (self.tokens.sum() + other.tokens.sum())

        def both(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # means over tokens
            return (1 - share) * a + share * b

        return replace(
            self,
            values={name: np.concatenate([self.values[name], other.values[name]]) for name in self.values},
            one_more_loss=np.concatenate([self.one_more_loss, other.one_more_loss]),
            tokens=np.concatenate([self.tokens, other.tokens]),
            by_layer={name: both(self.by_layer[name], other.by_layer[name]) for name in self.by_layer},
            gate_by_head=both(self.gate_by_head, other.gate_by_head),
            head_cosines=both(self.head_cosines, other.head_cosines),
        )

    def summary(self) -> dict[str, list[Any]]:
        """Return lens -> for every loop [mean, low, high], or None."""
        result: dict[str, list[Any]] = {}
        for lens in self.values:
            intervals = [self.mean(lens, loop).as_list() for loop in range(1, self.loops + 1)]
            result[lens] = [None if np.isnan(i[0]) else [None if np.isnan(x) else x for x in i] for i in intervals]
        return result

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as JSON holds it, with its `summary`: lists, and None for NaN."""
        return {name: plain(value) for name, value in vars(self).items()} | {"summary": self.summary()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Diagnosis":
        """Rebuild a diagnosis from the content that `to_dict` returned.

        Raises:
            ValueError, TypeError: the content is not a diagnosis.
        """
        return build(cls, content)


@torch.no_grad()
def diagnose(
    model: Any,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    num_loops: int | None = None,
    center_rank: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Diagnosis:
    """Diagnose a PLTForCausalLM with every lens.

    Args:
        model: the model, or peft's wrapper of it.
        batches: dictionaries with input_ids [B, T], for padded rows attention_mask [B, T], for packed rows position_ids [B, T] that
            restart with every document. If they have labels [B, T], in transformers' convention, losses and ranks are those of the tokens
            with a label. A row is a sample. Memory does not grow with the number of batches.
        num_loops: R; default: the configuration's.
        center_rank: take the effective rank of centred states.
        on_batch: called after each batch with its number of samples.

    Returns:
        values of every lens per sample and loop, with means and intervals.

    Raises:
        DiagnosisError: the model has another architecture, there are no samples, or a row has no two neighbouring tokens or is longer
            than the model allows.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise DiagnosisError(
            "this adapter learns a prompt, which the lenses do not cover: diagnose the model itself, or one with another adapter."
        )
    if hasattr(model, "get_base_model"):  # peft's wrapper; its adapters are inside the layers
        model = model.get_base_model()
    config = getattr(model, "config", None)
    if not isinstance(config, PLTConfig) or not hasattr(model, "lm_head"):
        raise DiagnosisError(
            f"{type(model).__name__} is not a PLTForCausalLM: load a PLT checkpoint with AutoModelForCausalLM.from_pretrained."
        )
    try:
        R = config.plt_num_loops if num_loops is None else loop_count(num_loops)
    except ValueError as error:
        raise DiagnosisError(str(error)) from None
    seen: Diagnosis | None = None
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            part = _look_at(model, batch, R, center_rank)
            seen = part if seen is None else seen.joined(part)
            if on_batch:
                on_batch(part.samples)
    finally:
        model.train(was_training)
    if seen is None:
        raise DiagnosisError("there are no samples: batches is empty.")
    return seen


def _look_at(model, batch: dict[str, torch.Tensor], R: int, center_rank: bool) -> Diagnosis:
    """Diagnose one batch."""
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    ids_BT = inputs["input_ids"]
    real, document = _tokens_and_documents(model.config, inputs)
    follows = (real[:, 1:] & real[:, :-1]) & (document[:, 1:] == document[:, :-1])  # [B, T-1]: is t + 1 the successor of t?
    if not bool(follows.any(-1).all()):
        raise DiagnosisError("a sample has no two neighbouring tokens of one text: use longer texts, or leave it out.")
    targets, asked = _targets(ids_BT, batch.get("labels"), follows)

    with AttentionLenses(model.model, R, real, document) as attention, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="num_loops=")  # loop R + 1 is run on purpose
        later = model.model(**inputs, use_cache=False, num_loops=R + 1).loop_states
    dtype = torch.promote_types(later[0].dtype, torch.float32)
    states = [model.model.embed_tokens(ids_BT), *later]  # h_0 .. h_{R+1}, each [B, T, D]

    values = {name: np.full((len(ids_BT), R), np.nan) for name in LENSES}

    def keep(name: str, loop: int, value_B: torch.Tensor) -> None:
        values[name][:, loop - 1] = value_B.double().cpu().numpy()

    for r in range(1, R + 1):
        before, h, after = (state.to(dtype) for state in states[r - 1 : r + 2])
        keep("step_size", r, _mean(step_size(h, before), real))
        keep("fixed_point_gap", r, _mean(step_size(after, h), real))
        keep("effective_rank", r, torch.stack([effective_rank(h[b][real[b]], center_rank) for b in range(len(h))]))
        if r >= 2:
            keep("angular_change", r, _mean(angular_change(h, before, states[r - 2].to(dtype)), real))
            keep("offset_cost", r, _mean(offset_cost(before), follows))

    tokens = real.sum(-1)
    L = model.config.num_hidden_layers
    for name, sums in attention.sums.items():  # [R, L, B]
        for r in range(LENSES[name].first_loop, R + 1):
            keep(name, r, sums[r - 1].sum(0) / (tokens * L))

    outputs = _output_lenses(model.lm_head, states[1:], targets, real, asked, dtype)
    for name in ("output_entropy", "output_shift", "token_rank", "loss"):
        for r in range(LENSES[name].first_loop, R + 1):
            keep(name, r, outputs[name][r - 1])
    if R >= 2:
        kl_BR = torch.stack([attention.sums["attention_kl"][r].sum(0) for r in range(1, R)], dim=-1)
        by_share = {
            "share_output_shift": shares(torch.stack(outputs["output_shift"][1:R], dim=-1)),
            "share_attention_kl": shares(kl_BR),
            "share_tokens": outputs["share_tokens"],
        }
        for name, share_BR in by_share.items():
            for r in range(2, R + 1):
                keep(name, r, share_BR[:, r - 2])
    every_token = tokens.sum()
    by_layer = {name: sums.sum(-1) / every_token for name, sums in attention.sums.items()}  # [R, L]
    by_head = attention.gate_by_head.sum(2) / every_token  # [R, L, H]
    for absent in (by_layer["gate"], by_layer["attention_kl"], by_head):
        absent[0] = torch.nan  # loop 1 has no gate, and no loop before it
    return Diagnosis(
        loops=R,
        trained_loops=model.config.plt_num_loops,
        values=values,
        one_more_loss=outputs["loss"][R].cpu().numpy(),
        tokens=tokens.cpu().numpy(),
        by_layer={name: means.cpu().numpy() for name, means in by_layer.items()},
        gate_by_head=by_head.cpu().numpy(),
        head_cosines=(attention.cosines / (every_token * L)).cpu().numpy(),
    )


def _tokens_and_documents(config: PLTConfig, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which tokens are real, bool [B, T], and the number of each token's document, int [B, T]."""
    ids_BT = inputs["input_ids"]
    if ids_BT.ndim != 2 or ids_BT.shape[1] < 2:
        raise DiagnosisError(f"input_ids has shape {tuple(ids_BT.shape)}: samples are rows of at least two tokens, [B, T].")
    if ids_BT.shape[1] > config.max_position_embeddings:
        raise DiagnosisError(
            f"samples of {ids_BT.shape[1]} tokens are longer than the model's {config.max_position_embeddings}: use --length "
            f"{config.max_position_embeddings} or less."
        )
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    real = torch.ones_like(ids_BT, dtype=torch.bool) if mask is None else mask.bool()
    if positions is None or mask is not None:
        return real, torch.zeros_like(ids_BT)
    return real, (positions.diff(prepend=positions[:, :1] - 1) != 1).cumsum(-1)


def _targets(ids_BT: torch.Tensor, labels: torch.Tensor | None, follows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token to predict at every position but the last, [B, T-1], and where it counts: the next token, unless
    there are labels."""
    if labels is None:
        return ids_BT[:, 1:], follows
    targets = labels.to(ids_BT.device)[:, 1:]
    asked = follows & (targets >= 0)
    if not bool(asked.any(-1).all()):
        raise DiagnosisError(
            "a sample has labels, but none at a token that follows another one: use longer texts, or leave it out."
        )
    return targets.clamp(min=0), asked


def _output_lenses(head, states, next_tokens, real, asked, dtype) -> dict[str, Any]:
    """Compute the lenses of p_1 .. p_{R+1}: name -> for every loop a value per sample [B] (share_tokens: [B, R-1])."""
    R, (B, T) = len(states) - 1, real.shape
    names = ("output_entropy", "output_shift", "loss")
    sums = {name: next_tokens.new_zeros(R + 1, B, dtype=torch.float64) for name in names}
    decides = next_tokens.new_zeros(B, max(R - 1, 1), dtype=torch.float64)
    ranks = next_tokens.new_zeros(R, B, T - 1)
    block = max(1, LOGIT_BYTES // (B * head.out_features * 4))
    for start in range(0, T, block):
        rows = slice(start, min(start + block, T))
        targets = slice(start, min(start + block, T - 1))  # the last token has no known successor
        n = targets.stop - targets.start
        shift_RBt, log_before = [], None
        for r, state in enumerate(states):
            log_p = head(state[:, rows]).to(dtype).log_softmax(-1)  # [B, block, V]
            if n > 0:
                token = next_tokens[:, targets]
                nll_Bt = -log_p[:, :n].gather(-1, token[..., None])[..., 0]
                sums["loss"][r] += (nll_Bt * asked[:, targets]).sum(-1)
                if r < R:
                    ranks[r, :, targets] = token_rank(log_p[:, :n], token)
            if r < R:
                sums["output_entropy"][r] += (entropy(log_p) * real[:, rows]).sum(-1)
                if log_before is not None:
                    shift_RBt.append(kl(log_p, log_before))
                    sums["output_shift"][r] += (shift_RBt[-1] * real[:, rows]).sum(-1)
                log_before = log_p
        if shift_RBt:
            largest_Bt = torch.stack(shift_RBt).argmax(0)
            for i in range(R - 1):
                decides[:, i] += ((largest_Bt == i) & real[:, rows]).sum(-1)
    tokens, predicted = real.sum(-1), asked.sum(-1)
    medians = [[_median(ranks[r, b][asked[b]]) for b in range(B)] for r in range(R)]
    return {
        "output_entropy": list(sums["output_entropy"] / tokens),
        "output_shift": list(sums["output_shift"] / tokens),
        "loss": list(sums["loss"] / predicted),
        "token_rank": [torch.tensor(row) for row in medians],
        "share_tokens": decides / tokens[:, None],
    }


def _mean(value_BT: torch.Tensor, counted_BT: torch.Tensor) -> torch.Tensor:
    """Return the mean over the counted tokens of each sample, [B]."""
    return (value_BT * counted_BT).sum(-1, dtype=torch.float64) / counted_BT.sum(-1)


def _median(values: torch.Tensor) -> float:
    return float(values.double().quantile(0.5))  # of an even count, the mean of the middle two


def _mean_of_known(values: np.ndarray) -> Interval:
    """Return the mean of the values that are not NaN, with its interval; NaN if there are none."""
    known = values[~np.isnan(values)]
    return bootstrap_mean(known) if len(known) else Interval(np.nan, np.nan, np.nan)
