"""Loss on held-out documents, for every loop of a model.

A document is `<bos> text <eos>`, cut into windows of T tokens that overlap by one, so that every token but the first is
predicted exactly once, and bits per byte do not depend on the tokenizer: bits of all predictions over bytes of text.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..corpus import text_ids


@dataclass
class Evaluation:
    """Sums per document.

    Attributes:
        nll: [documents, R] negative log-likelihood in nats, of each loop's state read out through the head.
        correct: [documents] tokens that the last loop ranks first.
        tokens: [documents] predicted tokens.
        bytes: [documents] bytes of text; for a task, number of predicted tokens.
    """

    nll: np.ndarray
    correct: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray

    @property
    def loss(self) -> float:
        """Mean loss of the last loop, in nats per token."""
        return float(self.nll[:, -1].sum() / self.tokens.sum())

    @property
    def bits_per_byte(self) -> list[float]:
        """Bits per byte of every loop, [R]."""
        return [float(nll / math.log(2) / self.bytes.sum()) for nll in self.nll.sum(0)]

    @property
    def accuracy(self) -> float:
        """Share of tokens that the last loop ranks first."""
        return float(self.correct.sum() / self.tokens.sum())


def cut_text(text: str, max_chars: int) -> tuple[str, bool]:
    """Return at most `max_chars` characters of a text (0: all), and whether that is the whole text."""
    return (text, True) if not max_chars or len(text) <= max_chars else (text[:max_chars], False)


@torch.no_grad()
def evaluate_documents(
    model,
    tokenizer,
    texts: list[str],
    length: int,
    batch_size: int = 8,
    max_chars: int = 0,
    num_loops: int | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    as_lm_eval: bool = False,
) -> Evaluation:
    """Compute the loss of every loop on `texts`, as sums per document.

    Args:
        model: a PLTForCausalLM.
        tokenizer: its tokenizer, with bos and eos.
        texts: the documents.
        length: T, tokens per window.
        batch_size: windows per forward pass.
        max_chars: use at most this many characters of each text; 0: all. (An <eos> is predicted only after a whole text.)
        num_loops: loop count; default: the model's.
        on_batch: called with the windows done and the number of windows.
        as_lm_eval: count as lm-eval's rolling log-likelihood does: <eos> is not predicted, and the last window of a text with several
            is extended to T tokens by the tokens before it, as context only.

    Returns:
        sums per document, R loops wide.

    Raises:
        ValueError: a number is out of its bounds.
    """
    if length < 1 or batch_size < 1 or max_chars < 0 or (num_loops is not None and num_loops < 1):
        raise ValueError(
            f"length={length}, batch_size={batch_size} and num_loops={num_loops} must be at least 1, max_chars={max_chars} at least 0."
        )
    R = model.config.plt_num_loops if num_loops is None else num_loops
    windows, sizes = [], []
    for number, text in enumerate(texts):
        part, whole = cut_text(text, max_chars)
        sizes.append(len(part.encode("utf-8", "replace")))
        ids = text_ids(tokenizer, part)
        ids = [tokenizer.bos_token_id, *ids, *([tokenizer.eos_token_id] if whole and not as_lm_eval else [])]
        for start in range(0, len(ids) - 1, length):
            end = min(start + length + 1, len(ids))
            first = max(0, end - length - 1) if as_lm_eval else start
            windows.append((number, ids[first:end], end - start - 1))
    windows.sort(key=lambda window: len(window[1]))  # rows of similar length share a batch
    result = Evaluation(
        nll=np.zeros((len(texts), R)),
        correct=np.zeros(len(texts), dtype=np.int64),
        tokens=np.zeros(len(texts), dtype=np.int64),
        bytes=np.array(sizes, dtype=np.int64),
    )
    was_training = model.training
    model.eval()
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        longest = max(len(ids) for _, ids, _ in batch)
        padded = torch.tensor([ids + [-100] * (longest - len(ids)) for _, ids, _ in batch], device=model.device)
        targets = padded[:, 1:].clone()
        for row, (_, ids, predicted) in enumerate(batch):
            targets[row, : len(ids) - 1 - predicted] = -100  # context, predicted in the window before
        # Padding comes after the text, so no real token sees it and no mask is needed.
        inputs = padded[:, :-1].clamp(min=0)
        output = model.model(inputs, use_cache=False, num_loops=num_loops)
        numbers = [number for number, _, _ in batch]
        for loop, state in enumerate(output.loop_states):
            logits = model.lm_head(state).float()
            nll = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")  # zero where the target is -100
            np.add.at(result.nll[:, loop], numbers, nll.double().sum(1).cpu().numpy())
        np.add.at(result.correct, numbers, (logits.argmax(-1) == targets).sum(1).cpu().numpy())
        np.add.at(result.tokens, numbers, (targets >= 0).sum(1).cpu().numpy())
        if on_batch:
            on_batch(min(start + batch_size, len(windows)), len(windows))
    model.train(was_training)
    return result
