"""How far mlx-lm with our model file is from the vendor's outputs, per case: python benchmarks/mlx_parity.py [FOLDER-OF-CASES]

The largest difference of log-probability: whole prompts, chunks of 7, one-pass steps, and 48 greedy tokens through mlx-lm's generate_step.
"""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from parloop.export.mlx import register

register()
print(f"{'':16}{'whole':>10}{'chunks':>10}{'steps':>10}{'greedy':>10}  greedy tokens equal")
for folder in sorted(path.parent for path in Path(sys.argv[1] if sys.argv[1:] else "tests/parity").glob("*/cases.npz")):
    model, outputs = load_model(folder)[0], np.load(folder / "cases.npz")
    worst, equal = dict.fromkeys(("whole", "chunks", "steps", "greedy"), 0.0), 0
    for T in (1, 5, 40, 200):
        ids = mx.array(outputs[f"ids_{T}"])[None]
        for how, size in (("whole", T), ("chunks", 7), ("steps", 1)):
            cache = make_prompt_cache(model)
            logits = mx.concatenate([model(ids[:, t : t + size], cache=cache) for t in range(0, T, size)], axis=1)[0]
            found = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
            worst[how] = max(worst[how], np.abs(found - outputs[f"logprobs_{T}"]).max())
        tokens, rows = zip(*generate_step(ids[0], model, max_tokens=48, prefill_step_size=48))
        worst["greedy"] = max(
            worst["greedy"], np.abs(np.stack([np.array(row) for row in rows]) - outputs[f"gen_logprobs_{T}"]).max()
        )
        equal += list(tokens) == outputs[f"gen_ids_{T}"].tolist()
    print(f"{folder.name:16}" + "".join(f"{value:10.1e}" for value in worst.values()) + f"  {equal} of 4")
