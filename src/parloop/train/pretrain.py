"""Pretraining: a recipe drives transformers' Trainer.

A run's folder holds recipe.yaml, corpus.json (which documents), checkpoint-N folders while it runs, and in the end the model, its
tokenizer and training.json. Running the same recipe again continues an interrupted run from its last whole checkpoint, with the same data
order and random numbers, and leaves a finished one alone.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import time
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback, TrainerState

from ..corpus import Corpus, collate, load_corpus, pack, text_ids
from ..errors import RecipeError, TrainingDivergedError
from ..model.modeling import PLTForCausalLM, PLTGate
from ..record import write_json
from .recipe import Recipe

MODEL_DONE = "training.json"  # written last: the run is finished
TRAINED_ON = "corpus.json"  # the digest of the corpus, written first
FREE_TO_CHANGE = {"device", "log_every", "save_every", "keep_checkpoints", "compile"}  # do not change what is trained


def build_model(recipe: Recipe, tokenizer: Any = None) -> PLTForCausalLM:
    """A new model with the recipe's initial weights.

    Normal weights of standard deviation `initializer_range`; the projections into the residual stream smaller by
    (2 * L * R)^(-1/2), since the stream receives two of them per visit of a layer and there are L * R visits; norms one, gates
    zero. The random numbers depend on the seed alone, so models of different loop counts start from the same draws.
    """
    config = recipe.plt_config(tokenizer)
    config._attn_implementation = recipe.attention
    model = PLTForCausalLM(config)
    generator = torch.Generator().manual_seed(recipe.seed)
    visits = config.num_hidden_layers * config.plt_num_loops
    with torch.no_grad():
        for module_name, module in model.named_modules():
            if isinstance(module, PLTGate):
                continue  # zero, an even blend
            if isinstance(module, (nn.Linear, nn.Embedding)) and not (
                recipe.tie_word_embeddings and "lm_head" in module_name
            ):
                module.weight.normal_(0.0, config.initializer_range, generator=generator)
                if module_name.endswith(("o_proj", "down_proj")):
                    module.weight.mul_((2 * visits) ** -0.5)
    return model


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    corpus: Corpus | None = None,
    console: Console | None = None,
    on_step: Callable[[int, float], None] | None = None,
    fresh: bool = False,
) -> dict[str, Any]:
    """Run a recipe into a folder, or continue it there.

    Args:
        corpus: the prepared corpus, if it is at hand; else it is loaded or made.
        on_step: called after every step with its number and loss; default: a progress bar on `console`.
        fresh: delete what is in the folder and start over.

    Returns:
        what training.json holds: steps, tokens, seconds, tokens per second, the loss curve.

    Raises:
        RecipeError: the folder holds a run of another recipe or on other text, or with `fresh` something else than a run; there
            is no such device; the corpus is too small for a step.
        TrainingDivergedError: the loss is not a number, or far above its start.
    """
    console = console or Console(stderr=True)
    output = Path(output)
    if fresh:
        _delete_run(output)
    _same_recipe(recipe, output)
    if corpus is not None:
        _same_corpus(corpus, output)
    if (output / MODEL_DONE).exists():
        return json.loads((output / MODEL_DONE).read_text())
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device='cuda', but torch finds no GPU here: use --device cpu or auto.")
    if corpus is None:
        corpus = load_corpus(recipe.corpus_settings(), console=console)
        _same_corpus(corpus, output)
    output.mkdir(parents=True, exist_ok=True)
    recipe.save(output / "recipe.yaml")

    model = build_model(recipe, corpus.tokenizer)
    args = training_arguments(recipe, output)
    trainer = PLTTrainer(
        model=model,
        args=args,
        train_dataset=whole_batches(corpus, recipe, args.world_size),
        eval_dataset=validation_rows(corpus, recipe) if recipe.eval_every else None,
        data_collator=collate,
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    checkpoint = last_whole_checkpoint(output)
    clock = Clock(checkpoint)
    trainer.add_callback(clock)
    bar: Progress | None = None
    if on_step is None:
        from ..report.terminal import progress_bars

        bar = progress_bars(console)
        trainer.add_callback(_BarCallback(bar, recipe, output.name))
    else:
        trainer.add_callback(_StepCallback(on_step))

    if checkpoint is not None:
        console.print(f"continuing {output} from {checkpoint.name}", highlight=False, markup=False)
    elif trainer.is_world_process_zero():
        write_json(output / TRAINED_ON, {"digest": corpus.summary["digest"]})
    if checkpoint is not None and _step(checkpoint) >= recipe.steps:
        # Killed after its last checkpoint: nothing is left to train, but Trainer would do one more step.
        model.load_state_dict(PLTForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).state_dict())
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    else:
        with warnings.catch_warnings(), bar or contextlib.nullcontext():
            # To compare versions, Trainer reads the checkpoint's config.json with its base class, which minds the released names.
            warnings.filterwarnings("ignore", message="`rope_scaling` is deprecated", category=FutureWarning)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    trainer.save_model(str(output))
    corpus.tokenizer.save_pretrained(output)
    steps_tokens = recipe.steps * recipe.batch_size * recipe.length * args.world_size
    result = {
        "steps": recipe.steps,
        "tokens": steps_tokens,
        "seconds": clock.seconds,
        "tokens_per_second": steps_tokens / recipe.steps / (clock.step_seconds() or math.inf),
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss_curve": [[log["step"], log["loss"]] for log in trainer.state.log_history if "loss" in log],
        "validation_curve": [[log["step"], log["eval_loss"]] for log in trainer.state.log_history if "eval_loss" in log],
    }
    if trainer.is_world_process_zero():
        write_json(output / MODEL_DONE, result)
        for folder in output.glob("checkpoint-*"):
            shutil.rmtree(folder)
    return result


def training_arguments(recipe: Recipe, output: Path) -> TrainingArguments:
    cuda = recipe.device == "cuda" or (recipe.device == "auto" and torch.cuda.is_available())
    # On CPUs, bfloat16 autocast made steps of small models slower, AMX or not (docs/log.md).
    bf16 = recipe.precision == "bfloat16" or (recipe.precision == "auto" and cuda and torch.cuda.is_bf16_supported())
    return TrainingArguments(
        output_dir=str(output),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size // recipe.gradient_accumulation,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.min_learning_rate_share},
        warmup_steps=max(1, round(recipe.warmup_share * recipe.steps)),
        optim="adamw_torch_fused",
        adam_beta1=recipe.adam_beta1,
        adam_beta2=recipe.adam_beta2,
        adam_epsilon=recipe.adam_epsilon,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=bf16,
        use_cpu=not cuda,
        seed=recipe.seed,
        data_seed=recipe.seed,
        activation_checkpointing=recipe.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if recipe.gradient_checkpointing else None,
        torch_compile=recipe.compile,
        logging_steps=min(recipe.log_every, recipe.steps),
        logging_nan_inf_filter=False,
        eval_strategy="steps" if recipe.eval_every else "no",
        eval_steps=recipe.eval_every or None,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=recipe.save_every,
        save_total_limit=recipe.keep_checkpoints,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        report_to=["tensorboard"] if _has_tensorboard() else [],
        disable_tqdm=True,
    )


def whole_batches(corpus: Corpus, recipe: Recipe, processes: int) -> Dataset:
    """The training rows without the last few that fill no step, so that every step of every epoch has all its rows."""
    rows, step = len(corpus.train), recipe.batch_size * processes
    if rows < step:
        raise RecipeError(
            f"the corpus has {rows} rows of length={recipe.length} to train on, but a step takes {step} (batch_size="
            f"{recipe.batch_size} on {processes} process{'es' if processes > 1 else ''}): lower batch_size or length, or add text."
        )
    return corpus.train.select(range(rows - rows % step))


def validation_rows(corpus: Corpus, recipe: Recipe) -> Dataset:
    """The first validation documents, packed, for losses during training."""
    tokenizer, tokens = corpus.tokenizer, []
    for text in corpus.validation["text"]:
        tokens.append([tokenizer.bos_token_id, *text_ids(tokenizer, text), tokenizer.eos_token_id])
        if sum(map(len, tokens)) > recipe.eval_rows * recipe.length:
            break
    rows = pack([np.asarray(ids, dtype=np.int32) for ids in tokens], recipe.length)
    return Dataset.from_dict({name: values[: recipe.eval_rows] for name, values in rows.items()}).with_format("numpy")


class PLTTrainer(Trainer):
    """Trainer that stops a run that is lost instead of finishing it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.first_loss: float | None = None
        self.recent: deque[float] = deque(maxlen=20)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        value = loss.item() * self.args.gradient_accumulation_steps
        remedy = "Lower learning_rate, or lengthen warmup_share; the last checkpoint is kept."
        if not math.isfinite(value):
            raise TrainingDivergedError(f"the loss is {value} at step {self.state.global_step + 1}. {remedy}")
        if self.first_loss is None:
            self.first_loss = value
        self.recent.append(value)
        mean = sum(self.recent) / len(self.recent)
        if len(self.recent) == self.recent.maxlen and mean > self.first_loss + 1.0:
            raise TrainingDivergedError(
                f"the loss diverges: {mean:.2f} nats on average over the last {len(self.recent)} steps, but "
                f"{self.first_loss:.2f} at the start. {remedy}"
            )
        return loss


def last_whole_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that was written to its end. (A process killed while saving leaves half of one, which is
    deleted here: trainer_state.json is what the Trainer writes last.)"""
    folders = sorted(output.glob("checkpoint-*"), key=_step, reverse=True)
    for folder in folders:
        try:
            json.loads((folder / "trainer_state.json").read_text())
            return folder
        except (OSError, json.JSONDecodeError):
            shutil.rmtree(folder, ignore_errors=True)
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _delete_run(output: Path) -> None:
    if not output.exists():
        return
    if not output.is_dir() or (any(output.iterdir()) and not (output / "recipe.yaml").is_file()):
        raise RecipeError(
            f"output {str(output)!r} holds no run (there is no recipe.yaml), so --fresh does not delete it: choose another output."
        )
    shutil.rmtree(output)


def _same_corpus(corpus: Corpus, output: Path) -> None:
    path = output / TRAINED_ON
    if path.exists() and json.loads(path.read_text())["digest"] != corpus.summary["digest"]:
        raise RecipeError(
            f"source {corpus.summary['source']!r} has changed since the run in {str(output)!r} began, and losses on different "
            f"text do not compare: start over with --fresh, or choose another --output."
        )


def _same_recipe(recipe: Recipe, output: Path) -> None:
    path = output / "recipe.yaml"
    if output.exists() and not output.is_dir():
        raise RecipeError(f"output {str(output)!r} is a file: choose a folder.")
    if not path.exists():
        if output.exists() and any(output.iterdir()):
            raise RecipeError(f"output {str(output)!r} is not empty and holds no run: choose another folder.")
        return
    before, now = dataclasses.asdict(Recipe.load(path)), dataclasses.asdict(recipe)
    differ = [name for name in now if now[name] != before[name] and name not in FREE_TO_CHANGE]
    if differ:
        shown = ", ".join(f"{name} {before[name]!r} -> {now[name]!r}" for name in differ)
        raise RecipeError(
            f"output {str(output)!r} holds a run of another recipe ({shown}): choose another output, or start over with --fresh."
        )


class Clock(TrainerCallback, ExportableState):
    """Time in training steps, without validation and saving, summed over interruptions: Trainer keeps `state()` in each
    checkpoint's trainer_state.json, so that time and weights are always those of the same step."""

    def __init__(self, checkpoint: Path | None):
        state = {} if checkpoint is None else json.loads((checkpoint / "trainer_state.json").read_text())
        before = state.get("stateful_callbacks", {}).get("Clock", {}).get("attributes", {})
        self.seconds: float = before.get("seconds", 0.0)
        self.median: float = before.get("median", 0.0)  # of this process's steps, or of the last one's if it made none
        self.steps: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        state.stateful_callbacks.setdefault("Clock", {})  # Trainer updates it, but a checkpoint may come without

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(time.perf_counter() - self.start)
        self.seconds += self.steps[-1]

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.seconds, "median": self.step_seconds()}}

    def step_seconds(self) -> float:
        return float(np.median(self.steps)) if self.steps else self.median


class _StepCallback(TrainerCallback):
    def __init__(self, on_step: Callable[[int, float], None]):
        self.on_step = on_step

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_step(state.global_step, float("nan"))

    def on_step_end(self, args, state, control, **kwargs):
        self.on_step(state.global_step, float("nan"))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.on_step(state.global_step, logs["loss"])


class _BarCallback(TrainerCallback):
    """A progress bar with the loss and the time left."""

    def __init__(self, progress: Progress, recipe: Recipe, name: str):
        self.progress = progress
        self.task = self.progress.add_task(f"{escape(name)}: R = {recipe.num_loops}", total=recipe.steps, loss="")

    def on_train_begin(self, args, state, control, **kwargs):
        self.progress.update(self.task, completed=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.progress.update(self.task, loss=f"loss {logs['loss']:.3f}")


def _has_tensorboard() -> bool:
    from importlib.util import find_spec

    return find_spec("tensorboard") is not None
