"""How far the model is from the vendor's outputs: the largest difference of a log-probability, case by case.

python benchmarks/parity.py [FOLDER]        default: tests/parity
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import parloop  # noqa: F401  (registers the model)
from parloop.model.reference import reference_forward

LENGTHS = (1, 5, 40, 200)


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "tests" / "parity"
    table = Table("case", "full forward", "cached generation", "the equations", "greedy tokens", title=str(root))
    for folder in sorted(path.parent for path in root.glob("*/cases.npz")):
        outputs = np.load(folder / "cases.npz")
        config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        whole, steps, equations, same = 0.0, 0.0, 0.0, True
        for T in LENGTHS:
            ids = torch.tensor(outputs[f"ids_{T}"])
            with torch.no_grad():
                logits = model(ids[None]).logits[0]
                text = model.generate(
                    ids[None], max_new_tokens=48, do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_logits=True
                )  # fmt: skip
            _, by_equations = reference_forward(weights, config, ids)

            def off(logits: torch.Tensor, expected: np.ndarray) -> float:
                return float(np.abs(logits.log_softmax(-1).numpy() - expected).max())

            whole = max(whole, off(logits, outputs[f"logprobs_{T}"]))
            equations = max(equations, off(by_equations[-1], outputs[f"logprobs_{T}"]))
            steps = max(steps, off(torch.cat(text.logits), outputs[f"gen_logprobs_{T}"]))
            same &= text.sequences[0, T:].tolist() == outputs[f"gen_ids_{T}"].tolist()
        table.add_row(folder.name, f"{whole:.1e}", f"{steps:.1e}", f"{equations:.1e}", "equal" if same else "DIFFERENT")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
