"""Accuracy of a model on a task, by length, hops or difficulty, with one outcome per instance."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..corpus.tasks import HELD_OUT, Encoded, Encoder, Task
from ..corpus.tasks.encode import IGNORED
from ..errors import SourceError
from ..statistics import bootstrap_mean
from .evaluate import Evaluation

ROW_TOKENS = 8192  # tokens of a batch, padding included


@dataclass
class TaskAccuracy:
    """Outcomes on held-out instances.

    Attributes:
        source: the task.
        unit: unit of the groups, such as hops.
        groups: [G], easiest first.
        chance: [G], accuracy of the best constant answer.
        correct: [instances, G], share of an instance's answers in a group that are right.
        exact: [instances, G] of bool, whether all of them are right.
        nll: [instances, G], nats per answer; after the true worked steps where the task has them.
        written: [instances, G], tokens that the model wrote before it ended, the answer's included; 0 where it only gives answers.
        evaluation: the loss of all tokens that training predicts, worked steps included, in the groups that training has. It counts a
            predicted token as a byte.
    """

    source: str
    unit: str
    groups: list[int]
    chance: list[float]
    correct: np.ndarray
    exact: np.ndarray
    nll: np.ndarray
    written: np.ndarray
    evaluation: Evaluation

    def summary(self) -> dict[str, Any]:
        """Return means over instances with their 95% intervals, group by group, as JSON holds them."""
        rows = []
        for i, (group, chance) in enumerate(zip(self.groups, self.chance)):
            values = {name: getattr(self, name)[:, i] for name in ("correct", "exact", "nll", "written")}
            rows.append({"group": group, "chance": chance} | {name: _interval(of) for name, of in values.items()})
        return {"source": self.source, "unit": self.unit, "instances": len(self.correct), "groups": rows}

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the outcomes as arrays by name, for saving."""
        outcomes = {name: getattr(self, name) for name in ("correct", "exact", "nll", "written")}
        return outcomes | {f"evaluation_{name}": value for name, value in vars(self.evaluation).items()}

    @classmethod
    def of(cls, task: Task, arrays: Any) -> "TaskAccuracy":
        """Rebuild the outcomes on all of a task's groups from the arrays that `arrays` gave."""
        evaluation = Evaluation(**{name: arrays[f"evaluation_{name}"] for name in ("nll", "correct", "tokens", "bytes")})
        chance = [task.chance(group) for group in task.groups]
        outcomes = {name: arrays[name] for name in ("correct", "exact", "nll", "written")}
        return cls(task.source, task.unit, list(task.groups), chance, **outcomes, evaluation=evaluation)


def _interval(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(x) else x for x in bootstrap_mean(values.astype(float)).as_list()]


@torch.no_grad()
def task_accuracy(
    model: Any,
    task: Task,
    loops: int | None = None,
    groups: Sequence[int] | None = None,
    instances: int = 256,
    seed: int = 0,
    tokenizer: Any = None,
) -> TaskAccuracy:
    """Ask a model held-out questions, the same ones for the same seed.

    If the task has worked steps, the model writes them itself, greedily; its answer is the last token before the end.

    Args:
        model: a PLTForCausalLM.
        task: the task.
        loops: loop count; default: the model's.
        groups: only these groups of the task; default: all.
        instances: number of documents for each group; a task that asks every group in one document shares them.
        seed: seed of the questions.
        tokenizer: default: the task's own.

    Returns:
        outcomes per instance and group.

    Raises:
        SourceError: the task has no such group; the tokenizer cannot spell the task, or is not the model's; a document is longer than
            the model allows.
    """
    chosen = list(task.groups if groups is None else groups)
    for group in chosen:
        if group not in task.groups:
            raise SourceError(f"{task.source!r} has no {task.unit} {group}: it has {', '.join(map(str, task.groups))}.")
    if instances < 1:
        raise SourceError(f"instances={instances} must be at least 1.")
    encode = Encoder(task, task.tokenizer() if tokenizer is None else tokenizer)
    asked: list[tuple[int, int | None, Encoded]]  # instance, group or None for all of them, document
    if task.asks_every_group:
        asked = [(i, None, encode(task.document(i, HELD_OUT, seed))) for i in range(instances)]
    else:
        asked = [(i, g, encode(task.document(i, HELD_OUT, seed, g))) for i in range(instances) for g in chosen]
    _check(model, task, asked)

    shape = (instances, len(chosen))
    nll, right, answers, written = np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=np.int64)
    R = model.config.plt_num_loops if loops is None else loops
    counts = np.zeros((2, instances), dtype=np.int64)
    evaluation = Evaluation(nll=np.zeros((instances, R)), correct=counts[0], tokens=counts[1], bytes=counts[1])
    was_training = model.training
    model.eval()
    for batch in _batches(asked):
        nll_RBT, right_BT, asked_BT, groups_BT = _read(model, [document for _, _, document in batch], loops)
        nll_BT = nll_RBT[-1]
        trained_BT = asked_BT & np.isin(groups_BT, [0, *task.trained_groups])
        for row, (i, _, _) in enumerate(batch):
            evaluation.nll[i] += nll_RBT[:, row, trained_BT[row]].sum(-1)
            evaluation.correct[i] += (right_BT & trained_BT)[row].sum()
            evaluation.tokens[i] += trained_BT[row].sum()
            for column, group in enumerate(chosen):
                at = groups_BT[row] == group
                nll[i, column] += nll_BT[row][at].sum()
                right[i, column] += right_BT[row][at].sum()
                answers[i, column] += at.sum()
    if task.is_written:
        for batch in _batches(asked):
            outcomes = _write(model, [document for _, _, document in batch], loops, encode.tokenizer)
            for (i, group, _), (is_right, tokens) in zip(batch, outcomes):
                right[i, chosen.index(group)] = is_right
                written[i, chosen.index(group)] = tokens
    model.train(was_training)
    return TaskAccuracy(
        source=task.source,
        unit=task.unit,
        groups=chosen,
        chance=[task.chance(group) for group in chosen],
        correct=right / answers,
        exact=right == answers,
        nll=nll / answers,
        written=written,
        evaluation=evaluation,
    )


def _check(model: Any, task: Task, asked: list[tuple[int, int | None, Encoded]]) -> None:
    largest = max(int(max(document.input_ids.max(), document.labels.max())) for _, _, document in asked)
    rows = model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise SourceError(
            f"{task.source!r} has tokens up to {largest}, and the model's embedding {rows} rows: give the model's own tokenizer, or a model "
            f"that was trained on the task."
        )
    longest, positions = max(len(document.input_ids) for _, _, document in asked), model.config.max_position_embeddings
    if longest > positions:
        raise SourceError(
            f"a held-out document of {task.source!r} has {longest} tokens, and the model is made for {positions} "
            f"(max_position_embeddings): make the task smaller, or train with max_position_embeddings of as many."
        )


def _batches(asked: list[tuple[int, int | None, Encoded]]):
    """Yield batches of documents of similar length."""
    ordered = sorted(asked, key=lambda item: len(item[2].input_ids), reverse=True)
    while ordered:
        count = max(1, ROW_TOKENS // len(ordered[0][2].input_ids))
        yield ordered[:count]
        ordered = ordered[count:]


def _read(model: Any, documents: list[Encoded], loops: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Compute losses and correctness at every label.

    Returns nll [R, B, T], the loss in nats after every loop, and right [B, T], whether the last loop is right, both zero
    elsewhere; asked [B, T], where labels are; groups [B, T], the groups of labels that are answers.
    """
    T = len(documents[0].input_ids)  # the longest
    ids, labels, groups = (
        np.stack(
            [
                np.pad(getattr(document, name), (0, T - len(document.input_ids)), constant_values=pad)
                for document in documents
            ]
        )
        for name, pad in (("input_ids", 0), ("labels", IGNORED), ("groups", 0))
    )
    asked = labels != IGNORED
    asked[:, 0] = False
    # Padding comes after the text, so no real token sees it and no mask is needed.
    inputs = torch.from_numpy(ids[:, :-1]).long().to(model.device)
    labelled = torch.from_numpy(asked[:, 1:]).to(model.device)
    targets = torch.from_numpy(labels[:, 1:]).long().to(model.device)[labelled]
    states = model.model(inputs, use_cache=False, num_loops=loops).loop_states
    nll_RBT, right_BT = np.zeros((len(states), *groups.shape)), np.zeros(groups.shape, dtype=bool)
    for loop, states_BTD in enumerate(states):
        logits = model.lm_head(states_BTD[labelled]).float()
        nll_RBT[loop, asked] = F.cross_entropy(logits, targets, reduction="none").double().cpu().numpy()
    right_BT[asked] = (logits.argmax(-1) == targets).cpu().numpy()
    return nll_RBT, right_BT, asked, groups


def _write(model: Any, documents: list[Encoded], loops: int | None, tokenizer: Any) -> list[tuple[bool, int]]:
    """Let the model write greedily. Returns, per document, whether its last token is the answer, and how many tokens it
    wrote."""
    prompts = [document.input_ids[: document.prompt] for document in documents]
    T = max(map(len, prompts))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = np.stack([np.pad(prompt, (T - len(prompt), 0), constant_values=pad) for prompt in prompts])
    mask = np.stack([np.pad(np.ones_like(prompt), (T - len(prompt), 0)) for prompt in prompts])
    longest = max(len(document.input_ids) - document.prompt for document in documents)
    options = {} if loops is None else {"num_loops": loops}
    output = model.generate(
        torch.from_numpy(ids).long().to(model.device),
        attention_mask=torch.from_numpy(mask).long().to(model.device),
        max_new_tokens=2 * longest,  # a model that writes twice as much as needed has not answered
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
        **options,
    )
    outcomes = []
    for document, tokens in zip(documents, output[:, T:].tolist()):
        ended = tokenizer.eos_token_id in tokens
        count = tokens.index(tokenizer.eos_token_id) if ended else len(tokens)
        answer = int(document.labels[np.flatnonzero(document.groups)[0]])
        outcomes.append((ended and count > 0 and tokens[count - 1] == answer, count))
    return outcomes
