"""Export of a run's checkpoint as a model that any tool loads."""

import json
import re
import shutil
from pathlib import Path

from ..card import CARD
from ..checkpoints import check_weights, load_config
from ..errors import CheckpointError
from ..folder import check_room, new_folder
from .adapters import merge_adapter
from .card import card_of_run
from .checkpoint import SCHEDULER, STATE
from .fit import loss_curves
from .recipe import ChatRecipe, load_recipe


def export(checkpoint: str | Path, out: str | Path) -> Path:
    """Write a run's checkpoint as a model that any tool loads: one safetensors file, configuration and tokenizer.

    Adapters are merged into the model that the run's recipe names.

    Args:
        checkpoint: checkpoint-N of a run, written by any number of processes.
        out: folder to create.

    Returns:
        the folder.

    Raises:
        CheckpointError: the checkpoint is incomplete, or its weights do not match its config.json.
        OutputError: the folder is not empty, or cannot be written.
    """
    from transformers.distributed.checkpoint import consolidate_distributed_checkpoint

    checkpoint, out = Path(checkpoint), Path(out)
    if not (checkpoint / STATE).is_file() or not list(checkpoint.glob("*.safetensors")):
        raise CheckpointError(f"{str(checkpoint)!r} is not a complete checkpoint of a run: give RUN/checkpoint-N.")
    if (checkpoint / "model.safetensors").is_file():
        check_weights(checkpoint)
    recipe_file = checkpoint.parent / "recipe.yaml"
    with new_folder(out) as scratch:
        weights = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
        check_room(scratch, weights, "the model")
        if (checkpoint / "adapter_config.json").is_file():
            recipe = ChatRecipe.load(recipe_file)
            counts = recipe.loop_counts
            merge_adapter(recipe.model, checkpoint, scratch, counts if counts and len(counts) > 1 else None)
        if list(checkpoint.glob("shard-*.safetensors")):
            consolidate_distributed_checkpoint(checkpoint, scratch)
            (whole,) = scratch.glob("*.safetensors")
            whole.rename(scratch / "model.safetensors")
            (scratch / "model.safetensors.index.json").unlink(missing_ok=True)
        apart = re.compile(rf"{STATE}|{SCHEDULER}|stream-.*|shard-.*|adapter_.*|README\.md|.*\.(pth|pt)")
        for path in checkpoint.iterdir():
            if path.is_file() and not apart.fullmatch(path.name):
                shutil.copyfile(path, scratch / path.name)
        history = json.loads((checkpoint / STATE).read_text(encoding="utf-8")).get("log_history", [])
        known = (
            load_recipe(recipe_file) if recipe_file.is_file() else None
        )  # a checkpoint may have been moved away from its run
        card = card_of_run(out.absolute().name, known, load_config(scratch), *loss_curves(history))
        (scratch / CARD).write_text(card, encoding="utf-8")
    return out
