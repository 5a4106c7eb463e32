"""Fine-tuning on conversations: TRL's SFT trainer, full or with LoRA, on the assistant's tokens.

In the end the run's folder holds the whole model, with adapters merged into it, ready to be served. A LoRA run also keeps `adapter/`, for
those who serve one base with several adapters.
"""

import json
import math
from typing import Any

import torch
from accelerate import PartialState
from datasets import load_from_disk
from transformers import AutoTokenizer

from ..checkpoints import check_weights, load_config, load_part, local_folder
from ..errors import RecipeError
from ..folder import check_room
from ..model.configuration import PLTConfig
from .adapters import ADAPTER, lora_config, merge_adapter, quiet
from .checkpoint import load_base, save_model, save_weights
from .conversations import ROWS, SUMMARY, Rows, order_of, prepare, stop_ids
from .fit import curves, fit
from .recipe import ChatRecipe
from .result import TrainingResult
from .run import Run, bytes_to_come, save_tokenizer
from .sharding import empty_model, first_process_first, uses_bfloat16
from .trainer import training_arguments


def check(recipe: ChatRecipe) -> None:
    """Check that a recipe can be run here.

    Raises:
        RecipeError: TRL or peft is not installed, or the recipe does not fit the checkpoint.
        CheckpointError: the checkpoint cannot be read.
    """
    try:
        import peft  # noqa: F401

        from . import sft  # noqa: F401
    except ImportError as error:
        raise RecipeError(f'fine-tuning needs TRL and peft ({error}): pip install "parloop[finetune]".') from error
    _config(recipe)
    check_weights(recipe.model)


def finetune(run: Run, recipe: ChatRecipe) -> TrainingResult:
    """Fine-tune a checkpoint, continuing where the run stands. Every process must call it.

    Args:
        run: the open run.
        recipe: its recipe.

    Returns:
        the run's result; the model is in its folder.

    Raises:
        RecipeError, SourceError, CheckpointError, TrainingDivergedError: as `train`.
    """
    from trl import SFTConfig

    from .sft import PLTSFTTrainer

    config, state, output = _config(recipe), run.state, run.output
    tokenizer = load_part(AutoTokenizer, recipe.model, "tokenizer (tokenizer.json)")
    if len(tokenizer) > config.vocab_size:
        raise RecipeError(
            f"the tokenizer of {recipe.model!r} has {len(tokenizer)} tokens, and its embedding {config.vocab_size} rows: its tokenizer files are "
            f"another model's, or tokens were added without resizing the model."
        )
    with first_process_first(state):
        if run.out is not None:
            save_tokenizer(tokenizer, run.out)
            with run.console.status("reading conversations"):
                stops = stop_ids(config, tokenizer, local_folder(recipe.model))
                prepare(recipe, output, tokenizer, stops, run.console)
    summary = json.loads((output / ROWS / SUMMARY).read_text(encoding="utf-8"))
    train_rows = load_from_disk(str(output / ROWS / "train"))
    held_out = output / ROWS / "validation"
    validation_rows = load_from_disk(str(held_out)) if held_out.is_dir() else train_rows.select([])
    if len(train_rows) < recipe.batch_size:
        raise RecipeError(
            f"the conversations fill {len(train_rows)} rows of length={recipe.length}, and a step takes batch_size={recipe.batch_size}: "
            f"lower batch_size or length, set packing: false, or give more conversations."
        )
    steps = math.ceil(recipe.epochs * len(train_rows) / recipe.batch_size)

    model = _model(recipe, config, state)
    if run.out is not None:
        saved_as: Any = load_config(recipe.model).dtype or torch.float32
        merged = saved_as.itemsize * sum(p.numel() for p in model.parameters())  # adapters are small beside it
        needed = merged if recipe.lora_rank else bytes_to_come(model, recipe, steps, output, saved_as.itemsize)
        check_room(output, needed, "fine-tuning")
    evaluates = bool(recipe.eval_every and len(validation_rows))
    arguments = training_arguments(
        recipe,
        output,
        steps,
        state.num_processes,
        eval_strategy="steps" if evaluates else "no",
        packing=False,  # done already; TRL must not pack the rows again
        max_length=None,
        train_sampling_strategy="sequential",  # shuffled already
        dataset_kwargs={"skip_prepare_dataset": True},
        average_tokens_across_devices=True,
    )
    counts = config.trained_loops
    with quiet():
        trainer = PLTSFTTrainer(
            model=model,
            args=SFTConfig(**arguments),
            train_dataset=train_rows.select(order_of(len(train_rows), steps * recipe.batch_size, recipe.seed)),
            eval_dataset=validation_rows.select(range(min(len(validation_rows), recipe.eval_rows))) if evaluates else None,
            data_collator=Rows(recipe.length if recipe.packing else None, tokenizer.pad_token_id or 0),
            processing_class=tokenizer,
            peft_config=lora_config(recipe, model) if recipe.lora_rank else None,
        )
        trainer.loop_counts = counts if len(counts) > 1 else None
        fit(trainer, run, steps, run.label(counts), summary["digest"])

    tuned: Any = trainer.model
    parameters = sum(p.numel() for p in tuned.parameters())
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    _save(tuned, run, recipe, tokenizer)
    return TrainingResult(
        steps=steps,
        conversations=summary["conversations"],
        rows=len(train_rows),
        tokens=steps * recipe.batch_size * recipe.length,
        left_out=summary["left_out"],
        reasoning_cut=summary.get("cut", 0),
        processes=state.num_processes,
        parameters=parameters - trained if recipe.lora_rank else parameters,  # adapters are merged into the base's weights
        trained_parameters=trained,
        **curves(trainer, recipe.batch_size * recipe.length),
    )


def _config(recipe: ChatRecipe) -> PLTConfig:
    config = load_config(recipe.model)
    counts = recipe.loop_counts or config.trained_loops
    if max(counts) != config.plt_num_loops:
        raise RecipeError(
            f"loops={recipe.loops}, but {recipe.model!r} has {config.plt_num_loops}: leave loops out, or make that the largest. For a "
            f"model of more loops, parloop convert; for fewer, set plt_num_loops in its config.json."
        )
    if recipe.length > config.max_position_embeddings:
        raise RecipeError(
            f"length={recipe.length} is more than the {config.max_position_embeddings} tokens that {recipe.model!r} was made for."
        )
    config.plt_trained_loops = None if counts == [config.plt_num_loops] else list(counts)
    return config


def _model(recipe: ChatRecipe, config: PLTConfig, state: PartialState) -> Any:
    model: Any = empty_model(config, recipe, state)
    load_base(model, local_folder(recipe.model))
    if recipe.lora_rank and uses_bfloat16(recipe) and state.num_processes == 1:
        model.to(torch.bfloat16)  # frozen; adapters stay in float32
    model.model.checkpoint_loops = recipe.gradient_checkpointing in ("loop", "both")
    return model.train()


def _save(model: Any, run: Run, recipe: ChatRecipe, tokenizer: Any) -> None:
    """Write the whole model, in the checkpoint's dtype. One process merges adapters into it, from the adapter's folder."""
    output = run.output
    if not recipe.lora_rank:
        model.to(load_config(recipe.model).dtype or torch.float32)
        save_model(model, output)
    else:
        save_weights(model, output / ADAPTER)
    if recipe.lora_rank and run.state.is_main_process:
        tokenizer.save_pretrained(output / ADAPTER)
        (output / ADAPTER / "README.md").unlink(missing_ok=True)  # peft's model card says nothing about this model
        merge_adapter(recipe.model, output / ADAPTER, output, model.config.plt_trained_loops)
