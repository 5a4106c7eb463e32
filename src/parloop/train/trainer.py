"""transformers' Trainer for PLTs: a loop count per step, shards, checkpoints for any number of processes, and a stop when a run diverges."""

import functools
import math
import random
from collections import deque
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import SaveStrategy

from ..errors import TrainingDivergedError
from .build import INTO_THE_STREAM
from .checkpoint import load_optimizer, load_weights, save_optimizer, save_weights
from .objective import Objective, next_token
from .recipe import RunSettings
from .sharding import barrier, free_gathered, is_sharded, main_process, mean_over_processes, uses_bfloat16, uses_cuda


class LoopedTraining:
    """Mixin of Trainers for PLTs. List it before Trainer, or a subclass of Trainer, among the bases."""

    loop_counts: list[int] | None = None  # if set, one of them is drawn at every step
    branch_scale: float = 1.0  # factor on the learning rate of projections into the residual stream
    stream: Any = None  # the loader of a mixture, whose cursors are saved

    def __init__(self, *args: Any, **kwargs: Any):
        arguments: TrainingArguments = kwargs["args"]
        wanted = arguments.save_strategy
        # Trainer refuses to save a sharded optimizer, which it could not resume. This class can.
        arguments.save_strategy = SaveStrategy.NO
        super().__init__(*args, **kwargs)
        arguments.save_strategy = wanted
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)  # type: ignore[attr-defined]
        self.sharded = is_sharded(self.model)  # type: ignore[attr-defined]
        self.step_loss = 0.0  # sum over this process's micro-batches of the step so far
        self.first_loss: float | None = None
        self.recent: deque[float] = deque(maxlen=20)

    def training_step(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.loop_counts is not None:
            inputs = inputs | {"num_loops": drawn_loops(self.loop_counts, self.args.seed, self.state.global_step)}
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self.step_loss = self.step_loss + loss  # a micro-batch's loss is its share of the step's mean
        if self.accelerator.sync_gradients:
            if self.sharded:
                free_gathered(self.model)
            self._stop_if_diverged(mean_over_processes(self.step_loss))
            self.step_loss = 0.0
        return loss

    def _stop_if_diverged(self: Any, value: float) -> None:
        """Raise if the loss of a step diverges. `value` is the mean over all processes, so that all of them stop together."""
        remedy = "Lower learning_rate, or lengthen warmup_share; the last checkpoint, if there is one, is kept."
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

    def get_train_dataloader(self: Any) -> Any:
        return super().get_train_dataloader() if self.stream is None else self.stream  # type: ignore[misc]

    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        # All adapters are matrices, so the group without decay is empty, and torch cannot restore an empty group.
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        if self.branch_scale != 1.0:
            slow = {id(p) for name, p in self.model.named_parameters() if name.endswith(INTO_THE_STREAM)}
            for group in list(optimizer.param_groups):
                chosen = [p for p in group["params"] if id(p) in slow]
                if chosen:  # decay per step stays the same, relative to the weights
                    group["params"] = [p for p in group["params"] if id(p) not in slow]
                    smaller = {
                        "lr": group["lr"] * self.branch_scale,
                        "weight_decay": group["weight_decay"] / self.branch_scale,
                    }
                    optimizer.param_groups.append(group | {"params": chosen} | smaller)
        return optimizer

    # Checkpoints

    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _internal_call:
            return super().save_model(output_dir)  # type: ignore[misc]
        save_weights(self.model, Path(output_dir or self.args.output_dir))
        if self.processing_class is not None and main_process():
            self.processing_class.save_pretrained(output_dir)

    def _save_rng_state(self: Any, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        barrier()  # trainer_state.json, written next, marks the checkpoint as complete

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        folder = Path(output_dir)
        if self.stream is not None:  # before the optimizer, whose saving synchronises all processes
            self.stream.save(folder)
        save_optimizer(self.model, self.optimizer.optimizer, self.lr_scheduler, folder)

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer(self.model, self.optimizer.optimizer, self.lr_scheduler, Path(checkpoint))


class PLTTrainer(LoopedTraining, Trainer):
    """Trains a PLT on packed rows."""

    objective: Objective = staticmethod(next_token)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # Trainer calls what it is given, and takes the output's loss. Validation always uses the next-token loss.
        objective = self.objective if model.training else next_token
        return super().compute_loss(functools.partial(objective, model), inputs, *args, **kwargs)  # type: ignore[arg-type]


def drawn_loops(counts: list[int], seed: int, step: int) -> int:
    """Return the loop count of a step. It depends on nothing else, so that all processes and resumed runs agree."""
    return counts[0] if len(counts) == 1 else random.Random(f"{seed}-{step}").choice(counts)


def training_arguments(settings: RunSettings, output: Path, steps: int, processes: int = 1, **more: Any) -> dict[str, Any]:
    """Return keyword arguments for TrainingArguments (of transformers or of TRL) from a recipe's settings."""
    rows = settings.batch_size // processes
    cuda = uses_cuda(settings)
    layers = settings.gradient_checkpointing in ("layer", "both")
    return {
        "output_dir": str(output),
        "max_steps": steps,
        "per_device_train_batch_size": rows // settings.gradient_accumulation,
        "per_device_eval_batch_size": max(1, rows // settings.gradient_accumulation),
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": settings.min_learning_rate_share},
        "warmup_steps": max(1, round(settings.warmup_share * steps)),
        "optim": "adamw_torch_fused",
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "adam_epsilon": settings.adam_epsilon,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": uses_bfloat16(settings),
        "use_cpu": not cuda,
        "seed": settings.seed,
        "data_seed": settings.seed,
        # Gradients are scattered after every micro-batch: waiting would take a whole float32 gradient on every process.
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": processes > 1}},
        "activation_checkpointing": layers,
        "activation_checkpointing_kwargs": {"use_reentrant": False} if layers else None,
        "torch_compile": settings.compile,
        "logging_steps": min(settings.log_every, steps),
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if settings.eval_every else "no",
        "eval_steps": settings.eval_every or None,
        "prediction_loss_only": True,
        "save_strategy": "steps",
        "save_steps": settings.save_every,
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
        "report_to": ["tensorboard"] if _has_tensorboard() else [],
        "disable_tqdm": True,
    } | more


def _has_tensorboard() -> bool:
    from importlib.util import find_spec

    return find_spec("tensorboard") is not None
