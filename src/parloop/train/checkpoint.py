"""Checkpoints of a run. Any number of processes can resume from one, whatever number wrote it.

    checkpoint-N/model.safetensors          written by one process; several write one shard each, shard-*.safetensors
                 optimizer/                 torch.distributed.checkpoint; each process writes its part
                 scheduler.pt, rng_state*   transformers' own
                 stream-*.json              the cursor of each stream of a mixture
                 config.json, tokenizer
                 trainer_state.json         written last: marks the checkpoint as complete

Weights are safetensors. The optimizer's files are in torch's own format, for the run that wrote them: do not load files of others.
"""

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import GenerationConfig
from transformers.distributed.checkpoint import save_optimizer_distributed
from transformers.distributed.utils import gather_full_state_dict

from ..checkpoints import load_part, other_head, refuse_other_weights
from ..errors import CheckpointError
from ..model.configuration import GATE, GATE_ALIASES
from .sharding import is_sharded, main_process

STATE, OPTIMIZER, SCHEDULER = "trainer_state.json", "optimizer", "scheduler.pt"
# Not loaded: the gates of a looped checkpoint that continues with one loop, and rotary buffers in old Llama files.
UNUSED = re.compile(rf"\.self_attn\.({'|'.join((GATE, *GATE_ALIASES))})\.|\.rotary_emb\.inv_freq$")
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # keyed by parameter names, as transformers saves it


def _quiet(function: Any, *arguments: Any, **options: Any) -> None:
    with warnings.catch_warnings():  # torch warns a single process that it is alone
        warnings.filterwarnings("ignore", message=".*process group is not initialized.*|.*single process.*")
        function(*arguments, **options)


def save_weights(model: Any, folder: Path) -> None:
    """Write weights and configuration, or only the adapters of a model that has adapters. Every process must call it."""
    if _has_adapter(model):
        model.save_pretrained(folder, is_main_process=main_process())
    elif is_sharded(model):
        folder.mkdir(parents=True, exist_ok=True)
        dcp.save(_weights(model), storage_writer=HuggingFaceStorageWriter(path=str(folder), save_distributed=True))
        if main_process():
            model.config.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
    else:
        model.save_pretrained(folder)


def save_model(model: Any, folder: Path) -> None:
    """Write the whole model in the format that any tool loads. Every process must call it; the first one holds all weights
    in memory and writes."""
    if not is_sharded(model):
        model.save_pretrained(folder)
        return
    state = {name: tensor for name, tensor in gather_full_state_dict(model).items() if name not in _tied(model)}
    for name, tensor in state.items():
        if tensor.untyped_storage().nbytes() > tensor.nbytes:  # a view: FSDP2 padded a size that does not divide
            state[name] = tensor.clone()
    if main_process():
        save_torch_state_dict(state, folder, max_shard_size="50GB")
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)


def load_weights(model: Any, folder: Path) -> None:
    """Read weights into a model in place, sharded or not, from safetensors of any number of files or processes. The model
    keeps its dtypes.

    Raises:
        CheckpointError: the files lack a weight, hold a weight that the model does not have or of another shape, or cannot be read.
    """
    if _has_adapter(model):
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        given = load_file(folder / "adapter_model.safetensors")
        held, asked = (
            {(name, tuple(tensor.shape)) for name, tensor in state.items() if ".lora_" in name}
            for state in (given, get_peft_model_state_dict(model, save_embedding_layers=False))
        )
        if held != asked:  # peft would leave missing ones at their initial values
            name, shape = min(held ^ asked)
            raise CheckpointError(
                f"checkpoint {str(folder)!r}: its adapters do not match the run's: see {name}, of shape {shape}."
            )
        set_peft_model_state_dict(model, given)
        return
    reader = HuggingFaceStorageReader(str(folder))
    try:
        there: dict[str, Any] = reader.read_metadata().state_dict_metadata
    except Exception as error:
        raise CheckpointError(f"checkpoint {str(folder)!r} has no weights that can be read ({error}).") from error
    state = {}
    for name, tensor in _weights(model).items():
        names = [name, *(name.replace(f".{GATE}.", f".{alias}.") for alias in GATE_ALIASES)]
        found = next((candidate for candidate in names if candidate in there), None)
        if found is None:
            raise CheckpointError(f"checkpoint {str(folder)!r} has no weight {name}: it belongs to another model.")
        shape = tuple(there[found].size)
        if shape != tuple(tensor.shape):
            raise CheckpointError(
                f"checkpoint {str(folder)!r}: {name} has shape {shape}, and the model {tuple(tensor.shape)}."
            )
        state[found] = tensor
    others = [name for name in there if name not in state and name not in _tied(model) and not UNUSED.search(name)]
    refuse_other_weights(folder, model.config, [], others, [])
    _quiet(dcp.load, state, storage_reader=HuggingFaceStorageReader(str(folder)))


def load_base(model: Any, folder: Path) -> None:
    """Read the weights and generation settings of the checkpoint that a run starts from.

    Raises:
        CheckpointError: as load_weights; also if the head should be tied to the embedding, but the files hold a different head.
    """
    load_weights(model, folder)
    for head, embedding in _tied(model).items():
        if not _alike(folder, head, embedding):
            raise other_head(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = load_part(GenerationConfig, folder, "generation_config.json")


def _alike(folder: Path, *names: str) -> bool:
    """Return whether all of these weights that the files hold have the same values."""
    found = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found += [file.get_tensor(name) for name in names if name in file.keys()]  # noqa: SIM118
    return all(torch.equal(found[0], other) for other in found[1:])


def _has_adapter(model: Any) -> bool:
    return hasattr(model, "peft_config")


def _weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights by name, a tied matrix only once."""
    state: dict[str, Any] = get_model_state_dict(model)
    return {name: tensor for name, tensor in state.items() if name not in _tied(model)}


def _tied(model: Any) -> dict[str, str]:
    """Return the tied weights: name -> name of the weight that it shares."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def save_optimizer(model: Any, optimizer: torch.optim.Optimizer, scheduler: Any, folder: Path) -> None:
    """Write the states of the optimizer and of the schedule. Every process must call it."""
    _quiet(save_optimizer_distributed, model, optimizer, str(folder / OPTIMIZER))
    if main_process():
        torch.save(scheduler.state_dict(), folder / SCHEDULER)


def load_optimizer(model: Any, optimizer: torch.optim.Optimizer, scheduler: Any, folder: Path) -> None:
    """Read the states of the optimizer and of the schedule into these two objects. Every process must call it."""
    state = get_optimizer_state_dict(model, optimizer, options=FLAT)
    there = FileSystemReader(folder / OPTIMIZER).read_metadata().state_dict_metadata
    saved = {name: value for name, value in state.items() if f"optimizer.{name}" in there}
    _quiet(dcp.load, {"optimizer": saved}, checkpoint_id=str(folder / OPTIMIZER))
    set_optimizer_state_dict(model, optimizer, state | saved, options=FLAT)
    for name, parameter in model.named_parameters():
        if f"state.{name}.step" in state and f"state.{name}.step" not in saved:
            optimizer.state.pop(parameter)  # gates have no state before the first step with more than one loop
    scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint folder's name, checkpoint-N."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints_of(output: Path) -> list[Path]:
    """Return a run's checkpoint folders, complete or not, newest first. (A folder checkpoint-best may be somebody
    else's.)"""
    folders = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(folders, key=step_of, reverse=True)


def last_whole_checkpoint(output: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, and delete newer, incomplete ones, which processes leave that are
    killed while saving. Call it from one process."""
    for folder in checkpoints_of(output):
        try:
            json.loads((folder / STATE).read_text(encoding="utf-8"))
            return folder
        except (OSError, ValueError):
            shutil.rmtree(folder, ignore_errors=True)
    return None
