"""LiveCodeBench's own scorer without the hub, torch, vllm and datasets: livecodebench_driver.py REPOSITORY PROBLEMS.jsonl ARGUMENTS..

ARGUMENTS are those of lcb_runner.runner.custom_evaluator. It runs in an environment with numpy, pandas and tqdm.
"""

import json
import multiprocessing
import os
import sys
import types

repository, problems, *arguments = sys.argv[1:]
torch = types.ModuleType("torch")
torch.cuda = types.SimpleNamespace(device_count=lambda: 0)
datasets = types.ModuleType("datasets")


def load_dataset(*_args, **_kwargs):
    """Return the problems, in place of the Hub's data set."""
    with open(problems, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


datasets.load_dataset = load_dataset
anthropic = types.ModuleType("anthropic")
anthropic.HUMAN_PROMPT = anthropic.AI_PROMPT = ""
sys.modules |= {"torch": torch, "datasets": datasets, "anthropic": anthropic}
os.chdir(repository)  # its prompts open files in this folder
sys.path.insert(0, repository)
sys.argv = ["custom_evaluator", *arguments]
multiprocessing.set_start_method("fork")

from lcb_runner.runner.custom_evaluator import main  # noqa: E402

main()
