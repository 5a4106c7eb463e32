"""Run by torchrun, see test_processes.py: every job of a file, one after the other, in the processes of one group.

A job is {"kind": train, finetune or traffic, "output": folder, "recipe": fields}.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from parloop.train import ChatRecipe, Recipe
from parloop.train.build import build_model
from parloop.train.sharding import free_gathered, start_processes
from parloop.train.training import train


class Traffic(TorchDispatchMode):
    """Elements that collectives carry, by name: of what is gathered, and of what is scattered."""

    def __init__(self):
        super().__init__()
        self.elements = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [x for x in args[:2] if isinstance(x, torch.Tensor)]
            self.elements[function._schema.name.split("::")[1]] += max(x.numel() for x in tensors)
        return function(*args, **(kwargs or {}))


def traffic(recipe: Recipe, output: Path) -> None:
    state = start_processes(recipe)
    model = build_model(recipe, None, state)
    ids = torch.randint(3, 300, (2, 32), generator=torch.Generator().manual_seed(state.process_index))
    counted = Counter()
    for _ in range(2):  # the second is as all that follow
        with Traffic() as seen:
            for _ in range(recipe.gradient_accumulation):
                model(ids, labels=ids).loss.backward()
            free_gathered(model)
        counted = seen.elements
    if state.is_main_process:
        parameters = sum(p.numel() for p in model.parameters())
        output.write_text(json.dumps({"elements": counted, "parameters": parameters}))


quiet = Console(quiet=True)
for job in json.loads(Path(sys.argv[1]).read_text()):
    output = Path(job["output"])
    if job["kind"] == "train":
        train(Recipe(**job["recipe"]), output, console=quiet)
    elif job["kind"] == "finetune":
        train(ChatRecipe(**job["recipe"]), output, console=quiet)
    else:
        traffic(Recipe(**job["recipe"]), output)
