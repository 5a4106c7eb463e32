"""Drive a Trainer through a run's steps, from its last complete checkpoint if there is one."""

import contextlib
import math
import warnings
from typing import Any

from transformers.trainer_callback import TrainerState

from ..record import write_json
from .callbacks import BarCallback, Clock, KeepCheckpoints, StepCallback
from .checkpoint import STATE, last_whole_checkpoint, load_weights, step_of
from .run import TRAINED_ON, Run
from .sharding import agreed


def fit(trainer: Any, run: Run, steps: int, label: str, digest: str) -> None:
    """Train to the last step. Every process must call it.

    Args:
        trainer: a Trainer with trainer.py's LoopedTraining among its bases.
        run: the open run.
        steps: optimizer steps of the whole run.
        label: text beside the progress bar.
        digest: hash of the training data, kept in the folder from the first step on.

    Raises:
        TrainingDivergedError: the loss is not a number, or far above its start.
    """
    main, output, console = run.state.is_main_process, run.output, run.console
    checkpoint = agreed(last_whole_checkpoint(output) if main else None)
    trainer.clock = Clock(checkpoint)
    trainer.add_callback(trainer.clock)
    trainer.add_callback(KeepCheckpoints(run.recipe.keep_checkpoints))
    bar = None
    if run.on_step is not None:
        trainer.add_callback(StepCallback(run.on_step))
    elif main:
        from ..report.terminal import progress_bars

        bar = progress_bars(console)
        trainer.add_callback(BarCallback(bar, label, steps))

    if checkpoint is not None:
        console.print(f"continuing {output} from {checkpoint.name}", highlight=False, markup=False)
        if trainer.stream is not None:
            trainer.stream.restore(checkpoint)
    elif main:
        write_json(output / TRAINED_ON, {"digest": digest})
    if checkpoint is not None and step_of(checkpoint) >= steps:
        # Killed after its last checkpoint: nothing is left to train, but Trainer would make one more step.
        load_weights(trainer.model, checkpoint)
        trainer.state = TrainerState.load_from_json(str(checkpoint / STATE))
    else:
        with warnings.catch_warnings(), bar or contextlib.nullcontext():
            _quiet_libraries()
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def curves(trainer: Any, step_tokens: int) -> dict[str, Any]:
    """Return the times and losses of a run, as fields of a TrainingResult.

    Args:
        trainer: the Trainer that ran it.
        step_tokens: tokens per step, over all processes.
    """
    losses, validation = loss_curves(trainer.state.log_history)
    return {
        "seconds": trainer.clock.seconds,
        "tokens_per_second": step_tokens / (trainer.clock.step_seconds() or math.inf),
        "loss_curve": losses,
        "validation_curve": validation,
    }


def loss_curves(history: list[dict[str, Any]]) -> tuple[list[list[float]], list[list[float]]]:
    """Return the training and the validation losses in a Trainer's log, as pairs of step and nats per token."""
    losses, validation = ([[log["step"], log[name]] for log in history if name in log] for name in ("loss", "eval_loss"))
    return losses, validation


def _quiet_libraries() -> None:
    """Silence two warnings of libraries that are expected here."""
    # To compare versions, Trainer reads the checkpoint's config.json with its base class, which warns of the released names.
    warnings.filterwarnings("ignore", message="`rope_scaling` is deprecated", category=FutureWarning)
    # A layer returns loop 1's keys and values, which are views; nothing modifies them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
