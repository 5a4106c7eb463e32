"""Fine-tuning on conversations: TRL's SFT trainer, full or with LoRA, on the assistant's tokens.

A LoRA adapter is on the shared weights, so it acts in every loop. The run's folder ends up with the whole model, adapters merged into it,
ready to be served; of a LoRA run also with `adapter/`, for those who keep the base and change adapters.
"""

import contextlib
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, load_from_disk
from rich.console import Console
from transformers import AutoTokenizer, GenerationConfig

from ..corpus import sources
from ..corpus.chat import Chat, load_chat
from ..errors import RecipeError
from ..folder import OutputFolder, check_room
from ..generate import check_weights, load_config, load_model, load_part, local_folder
from ..model.configuration import PLTConfig
from ..model.modeling import PLTForCausalLM
from ..record import write_json
from .checkpoint import load_base, load_weights, save_model, save_weights
from .pretrain import (
    MODEL_DONE,
    TRAINED_ON,
    bytes_to_come,
    close_run,
    curves,
    finished,
    opened_run,
    run,
    save_tokenizer,
)
from .recipe import ChatRecipe
from .sharding import empty_model, first_process_first, start_processes, uses_bfloat16
from .trainer import training_arguments

ADAPTER = "adapter"
ROWS, SUMMARY = "conversations", "summary.json"  # what was made of the conversations, in the run's folder


def finetune(
    recipe: ChatRecipe,
    output: str | Path,
    *,
    console: Console | None = None,
    on_step: Callable[[int, float], None] | None = None,
    fresh: bool = False,
) -> dict[str, Any]:
    """Run a recipe into a folder, or continue it there. On several processes, all of them call it.

    Args:
        on_step: called after every step with its number and loss; default: a progress bar on `console`.
        fresh: delete what is in the folder and start over.

    Returns:
        what training.json holds: steps, conversations, tokens, seconds, the loss curve.

    Raises:
        RecipeError: TRL or peft is not installed; the folder holds another run; the recipe and the checkpoint do not fit.
        OutputError: the folder cannot be written, holds something else than a run, or another command works in it.
        SourceError: there are no conversations, or the checkpoint has no chat template.
        CheckpointError: the checkpoint cannot be read.
        TrainingDivergedError: the loss is not a number, or far above its start.
    """
    try:
        import peft  # noqa: F401
        from trl import SFTConfig  # noqa: F401

        from .sft import PLTSFTTrainer  # noqa: F401
    except ImportError as error:
        raise RecipeError(f'fine-tuning needs TRL and peft ({error}): pip install "parloop[finetune]".') from error
    output = Path(output)
    config = _config(recipe)  # before anything is written, or deleted
    check_weights(recipe.model)
    state = start_processes(recipe)
    console = console or Console(stderr=True, quiet=not state.is_main_process)
    with opened_run(recipe, output, state, fresh) as out:
        if (output / MODEL_DONE).exists():
            return finished(output, state.is_main_process)
        return _finetune(recipe, config, output, out, state, console, on_step)


def _finetune(
    recipe: ChatRecipe,
    config: PLTConfig,
    output: Path,
    out: OutputFolder | None,
    state: PartialState,
    console: Console,
    on_step: Callable[[int, float], None] | None,
) -> dict[str, Any]:
    """Fine-tune from where the run in the folder is. The first process has it claimed, as `out`."""
    from trl import SFTConfig

    from .sft import PLTSFTTrainer

    tokenizer = load_part(AutoTokenizer, recipe.model, "tokenizer (tokenizer.json)")
    if len(tokenizer) > config.vocab_size:
        raise RecipeError(
            f"the tokenizer of {recipe.model!r} has {len(tokenizer)} tokens, and its embedding {config.vocab_size} rows: its tokenizer files are "
            f"another model's, or tokens were added without resizing the model."
        )
    with first_process_first(state):
        if out is not None:
            save_tokenizer(tokenizer, out)
            stop_ids = _stop_ids(config, tokenizer, local_folder(recipe.model))
            with console.status("reading conversations"):
                prepare(recipe, output, tokenizer, stop_ids, console)
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
    if out is not None:
        saved_as: Any = load_config(recipe.model).dtype or torch.float32
        merged = saved_as.itemsize * sum(p.numel() for p in model.parameters())  # beside it, adapters are small
        needed = merged if recipe.lora_rank else bytes_to_come(model, recipe, steps, output, saved_as.itemsize)
        check_room(output, needed, "fine-tuning")
    evaluates = bool(recipe.eval_every and len(validation_rows))
    arguments = training_arguments(
        recipe,
        output,
        steps,
        state.num_processes,
        eval_strategy="steps" if evaluates else "no",
        packing=False,  # done already, into rows that stay rows
        max_length=None,
        train_sampling_strategy="sequential",  # shuffled already
        dataset_kwargs={"skip_prepare_dataset": True},
        average_tokens_across_devices=True,
    )
    counts = config.trained_loops
    with _quiet():
        trainer = PLTSFTTrainer(
            model=model,
            args=SFTConfig(**arguments),
            train_dataset=train_rows.select(order_of(len(train_rows), steps * recipe.batch_size, recipe.seed)),
            eval_dataset=validation_rows.select(range(min(len(validation_rows), recipe.eval_rows))) if evaluates else None,
            data_collator=Rows(recipe.length if recipe.packing else None, tokenizer.pad_token_id or 0),
            processing_class=tokenizer,
            peft_config=_lora(recipe, model) if recipe.lora_rank else None,
        )
        trainer.loop_counts = counts if len(counts) > 1 else None
        label = f"{output.name}: R = {' or '.join(map(str, counts))}"
        run(trainer, recipe, output, steps, label, console, on_step, {"digest": summary["digest"]})

    tuned: Any = trainer.model
    result = {
        "steps": steps,
        "conversations": summary["conversations"],
        "rows": len(train_rows),
        "tokens": steps * recipe.batch_size * recipe.length,
        "left_out": summary["left_out"],
        "processes": state.num_processes,
        "trained_parameters": sum(p.numel() for p in tuned.parameters() if p.requires_grad),
    } | curves(trainer, recipe.batch_size * recipe.length)
    _save(tuned, recipe, output, tokenizer, state)
    if out is not None:
        close_run(output, result)
    state.wait_for_everyone()
    return result


def prepare(recipe: ChatRecipe, output: Path, tokenizer: Any, stop_ids: set[int], console: Console) -> None:
    """Encode and pack the conversations into the run's folder, where all processes, and resumed runs, find them.

    Raises:
        SourceError: there are none.
        RecipeError: they are others than when the run began.
    """
    folder, known = output / ROWS, json.loads(json.dumps([sources.fingerprint(recipe.chat), tokenizer.chat_template]))
    kept = json.loads((folder / SUMMARY).read_text(encoding="utf-8")) if (folder / SUMMARY).exists() else None
    if kept is not None and kept["fingerprint"] == known:
        return
    datasets.disable_progress_bars()
    chat = load_chat(recipe.chat, tokenizer, recipe.length, recipe.validation_share, stop_ids)
    _tell(chat, console)
    begun = output / TRAINED_ON
    if begun.exists() and json.loads(begun.read_text(encoding="utf-8"))["digest"] != chat.digest:
        raise RecipeError(
            f"chat={recipe.chat!r} has changed since the run in {str(output)!r} began: start over with --fresh, or choose another "
            f"--output."
        )
    shutil.rmtree(folder, ignore_errors=True)
    for name, rows in (("train", chat.train), ("validation", chat.validation)):
        if len(rows):  # of few conversations, perhaps none is held out; and `datasets` cannot load what is empty
            packed(rows, recipe).save_to_disk(str(folder / name))
    summary = {
        "fingerprint": known,
        "digest": chat.digest,
        "conversations": chat.conversations,
        "left_out": dict(chat.left_out),
    }
    write_json(folder / SUMMARY, summary)


def order_of(rows: int, wanted: int, seed: int) -> np.ndarray:
    """Which rows are trained on: all of them, epoch after epoch, in another order each time, until there are as many as wanted."""
    epochs = [np.random.default_rng([seed, epoch]).permutation(rows) for epoch in range(-(-wanted // rows))]
    return np.concatenate(epochs)[:wanted]


def packed(data: Dataset, recipe: ChatRecipe) -> Dataset:
    """Conversations in rows of at most `length` tokens: input_ids, labels, seq_lengths."""
    from trl import pack_dataset

    if recipe.packing:
        return pack_dataset(data, seq_length=recipe.length, strategy="bfd")
    return data.add_column("seq_lengths", [[len(ids)] for ids in data["input_ids"]])


class Rows:
    """Collates packed rows: input_ids, labels and position_ids [B, T], which start again with every conversation.

    Padding comes last, each token of it a text of its own, so that nothing real sees it.
    """

    def __init__(self, length: int | None, pad: int):
        self.length, self.pad = length, pad

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        T = self.length or max(len(row["input_ids"]) for row in rows)
        ids, labels, positions = [], [], []
        for row in rows:
            missing = T - len(row["input_ids"])
            ids.append(list(row["input_ids"]) + [self.pad] * missing)
            starts = [i for size in row["seq_lengths"] for i in range(size)]
            positions.append(starts + [0] * missing)
            learnt = [-100 if place == 0 else label for label, place in zip(row["labels"], starts)]
            labels.append(learnt + [-100] * missing)
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "position_ids": torch.tensor(positions)}


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
    config._attn_implementation = recipe.attention
    return config


def _model(recipe: ChatRecipe, config: PLTConfig, state: PartialState) -> Any:
    model: Any = empty_model(config, recipe, state)
    load_base(model, local_folder(recipe.model))
    if recipe.lora_rank and uses_bfloat16(recipe) and state.num_processes == 1:
        model.to(torch.bfloat16)  # frozen; adapters stay in float32
    model.model.checkpoint_loops = recipe.gradient_checkpointing in ("loop", "both")
    return model.train()


def _lora(recipe: ChatRecipe, model: PLTForCausalLM) -> Any:
    from peft import LoraConfig

    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    unknown = sorted(set(recipe.lora_targets) - linear)
    if unknown:
        raise RecipeError(
            f"lora_targets has {unknown[0]!r}, which the model does not: choose among {', '.join(sorted(linear))}."
        )
    return LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,  # type: ignore[arg-type]  # a float does
        lora_dropout=recipe.lora_dropout,
        target_modules=list(recipe.lora_targets),
        task_type="CAUSAL_LM",
    )


def _stop_ids(config: PLTConfig, tokenizer: Any, folder: Path) -> set[int]:
    name = "generation_config.json"
    given = load_part(GenerationConfig, folder, name).eos_token_id if (folder / name).is_file() else None
    stops: set[int] = set()
    for ids in (given, config.eos_token_id, tokenizer.eos_token_id):
        stops |= set(ids) if isinstance(ids, (list, tuple)) else set() if ids is None else {ids}
    return stops


def _tell(chat: Chat, console: Console) -> None:
    left_out = ", ".join(f"{n:,} {reason}" for reason, n in chat.left_out.most_common()) or "nothing"
    console.print(
        f"{chat.conversations:,} conversations: {len(chat.train):,} rows to train on, {len(chat.validation):,} held out. Left out: {left_out}",
        highlight=False,
        markup=False,
    )
    if not chat.stops:
        console.print(
            "The last token that is learnt of some turns does not end generation: the model may not learn to stop. Add it to "
            "eos_token_id in generation_config.json, or let the chat template's {% generation %} block include the end of the turn.",
            style="yellow",
            markup=False,
        )


def _save(model: Any, recipe: ChatRecipe, output: Path, tokenizer: Any, state: PartialState) -> None:
    """The whole model, in the dtype that the checkpoint has. Adapters are merged into it by one process, out of their own folder."""
    if not recipe.lora_rank:
        model.to(load_config(recipe.model).dtype or torch.float32)
        save_model(model, output)
    else:
        save_weights(model, output / ADAPTER)
    if recipe.lora_rank and state.is_main_process:
        tokenizer.save_pretrained(output / ADAPTER)
        (output / ADAPTER / "README.md").unlink(missing_ok=True)  # peft's model card knows nothing of the model
        merge_adapter(recipe.model, output / ADAPTER, output, model.config.plt_trained_loops)


def merge_adapter(base: str, adapter: Path, out: Path, trained_loops: list[int] | None) -> None:
    """Write the base with an adapter merged into its weights.

    Args:
        trained_loops: the loop counts that the adapter was trained at, if they are several.

    Raises:
        CheckpointError: the adapter is not whole, or is another base's.
    """
    from peft import PeftModel

    model: Any = load_model(base, "cpu")
    model.config.plt_trained_loops = trained_loops
    with _quiet():
        adapted: Any = PeftModel.from_pretrained(model, adapter)
        load_weights(adapted, adapter)  # raises: some are missing; peft would warn only
        adapted.merge_and_unload().save_pretrained(out)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what is said of things that are as they should be: other loop counts in training, and what peft asks transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="num_loops=")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield
