"""Callbacks of a run: its clock, its old checkpoints, the warm-up of c, progress bars."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.progress import Progress
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .checkpoint import STATE, checkpoints_of
from .sharding import main_process


class Clock(TrainerCallback, ExportableState):
    """Measures seconds in training steps, without validation and saving, summed over interruptions.

    Trainer keeps `state()` in each checkpoint's trainer_state.json, so that time and weights always belong to the same step.
    """

    def __init__(self, checkpoint: Path | None):
        state = {} if checkpoint is None else json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        before = state.get("stateful_callbacks", {}).get("Clock", {}).get("attributes", {})
        self.seconds: float = before.get("seconds", 0.0)
        self.median: float = before.get(
            "median", 0.0
        )  # seconds; until this process has made a step, the value of the process before it
        self.steps: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        state.stateful_callbacks.setdefault("Clock", {})  # Trainer updates this entry, but a checkpoint may lack it

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(time.perf_counter() - self.start)
        self.seconds += self.steps[-1]

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.seconds, "median": self.step_seconds()}}

    def step_seconds(self) -> float:
        """Return the median seconds of a step."""
        return float(np.median(self.steps)) if self.steps else self.median


class KeepCheckpoints(TrainerCallback):
    """Deletes a run's older checkpoints. (Trainer's own limit counts and deletes every folder named checkpoint-SOMETHING.)"""

    def __init__(self, number: int):
        self.number = number

    def on_save(self, args, state, control, **kwargs):
        if main_process():
            for folder in checkpoints_of(Path(args.output_dir))[self.number :]:
                shutil.rmtree(folder, ignore_errors=True)


class HiddenScaleWarmup(TrainerCallback):
    """Raises c linearly from 0 to its value over the first steps."""

    def __init__(self, config: Any, steps: int):
        self.config, self.steps, self.final = config, steps, config.plt_hidden_scale

    def on_step_begin(self, args, state, control, **kwargs):
        self.config.plt_hidden_scale = (1.0 if self.final is None else self.final) * min(1.0, state.global_step / self.steps)

    def on_train_end(self, args, state, control, **kwargs):
        self.config.plt_hidden_scale = self.final


class StepCallback(TrainerCallback):
    """Calls a function with every step's number and its loss, NaN where the loss is not logged."""

    def __init__(self, on_step: Callable[[int, float], None]):
        self.on_step = on_step

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_step(state.global_step, float("nan"))

    def on_step_end(self, args, state, control, **kwargs):
        self.on_step(state.global_step, float("nan"))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.on_step(state.global_step, logs["loss"])


class BarCallback(TrainerCallback):
    """Shows a progress bar with the loss and the time left."""

    def __init__(self, progress: Progress, label: str, steps: int):
        self.progress = progress
        self.task = self.progress.add_task(escape(label), total=steps, loss="")

    def on_train_begin(self, args, state, control, **kwargs):
        self.progress.update(self.task, completed=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.progress.update(self.task, loss=f"loss {logs['loss']:.3f}")
