"""Make the checkpoint that `parloop check` sends prompts of, and what right and wrong ports answer: python tests/check/make_probe.py

Weights are random, of a seed for which every fault changes what is written, and prompts those of many random ones for which the right
answer is decided by the widest margins, so that rounding to 16 bits does not change it.
"""

import itertools
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers.oracle import FAULTS, greedy

PROBE = Path(__file__).parents[2] / "src/parloop/check/probe"
SEED = 3
TOKENS = 12  # of an answer
PROMPTS, SHORT, LONG, ASKED_AGAIN = 4, 15, 129, 8
CHARACTERS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"  # a token each; nothing that servers trim or escape
)
CONFIG = {
    "architectures": ["IQuestPLTCoderForCausalLM"], "model_type": "iquestpltcoder", "torch_dtype": "float32", "vocab_size": 64,
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 32, "hidden_act": "silu", "max_position_embeddings": 256, "initializer_range": 0.02, "rms_norm_eps": 1e-5,
    "use_cache": True, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False, "rope_theta": 10000.0,
    "rope_scaling": None, "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "plt_num_loops": 2,
    "plt_window_size": [4, 0], "plt_normalize_per_loop": True, "plt_emb_scale": 0.7, "plt_hidden_scale": 0.4,
    "plt_gate_use_hidden_states": True,
}  # fmt: skip


def random_weights(seed: int) -> dict[str, torch.Tensor]:
    """float32 that bfloat16 holds exactly, so that engines which load in 16 bits start from the same weights."""
    generator = torch.Generator().manual_seed(seed)
    D, F, K, V = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"], CONFIG["vocab_size"]
    H, G = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    def matrix(rows, columns, size=1.0):
        return random(rows, columns) * size * columns**-0.5

    def norm():
        return (0.5 * random(D)).exp()  # far from 1, or a norm too much would not show

    weights = {"model.embed_tokens.weight": random(V, D), "model.norm.weight": norm(), "lm_head.weight": matrix(V, D, 3.0)}
    weights["lm_head.weight"][:2] = 0  # never padding nor the end
    for i in range(CONFIG["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": norm(), "post_attention_layernorm.weight": norm(),
            "self_attn.q_proj.weight": matrix(H * K, D, 1.2), "self_attn.k_proj.weight": matrix(G * K, D, 1.2),
            "self_attn.v_proj.weight": matrix(G * K, D), "self_attn.o_proj.weight": matrix(D, H * K, 1.5),
            "mlp.gate_proj.weight": matrix(F, D), "mlp.up_proj.weight": matrix(F, D), "mlp.down_proj.weight": matrix(D, F),
            "self_attn.plt_gate.weight": matrix(H, D, 1.5), "self_attn.plt_gate.bias": 0.5 * random(H),
            "self_attn.plt_gate.gate_norm.weight": norm(),
        }  # fmt: skip
        weights |= {f"model.layers.{i}.{name}": weight for name, weight in layer.items()}
    return {name: weight.bfloat16().float() for name, weight in weights.items()}


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<end>": 1} | {character: i for i, character in enumerate(CHARACTERS, 2)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", clean_up_tokenization_spaces=False
    )


def encode(text: str) -> list[int]:
    return [CHARACTERS.index(character) + 2 for character in text]


def decode(ids: list[int]) -> str:
    return "".join((["<pad>", "<end>", *CHARACTERS])[i] for i in ids)


def variants() -> list[tuple[str, ...]]:
    """No fault, each alone, and each two that are about different mechanisms. With one loop, nothing else is seen."""
    pairs = [
        (one, two)
        for one, two in itertools.combinations(FAULTS, 2)
        if FAULTS[one] != FAULTS[two] and "one loop" not in (one, two)
    ]
    return [(), *((name,) for name in FAULTS), *pairs]


def choose_prompts(weights: dict, tokens: int, length: int, count: int, tried: int, generator) -> list[str]:
    """Choose the prompts whose right answers have the widest margins, with different first characters."""
    ranked = []
    for _ in range(tried):
        ids = torch.randint(2, CONFIG["vocab_size"], (length,), generator=generator).tolist()
        chosen, _, leads = greedy(weights, CONFIG, ids, tokens)
        if len(set(chosen)) > tokens // 2:  # little is seen of an answer that repeats itself
            ranked.append((min(leads), ids))
    chosen: list[list[int]] = []
    for lead, ids in sorted(ranked, reverse=True):
        if all(ids[0] != other[0] for other in chosen) and len(chosen) < count:
            chosen.append(ids)
            print(f"  lead {lead:.2f}: {decode(ids)}")
    return [decode(ids) for ids in chosen]


def longer_prompt(weights: dict, text: str) -> str:
    """The text and a character: of those that let a zero carry at either of the last two tokens show, the one with the clearest answer."""
    ranked = []
    for character in CHARACTERS:
        ids = encode(text + character)
        right, _, leads = greedy(weights, CONFIG, ids, ASKED_AGAIN)
        wrong = [greedy(weights, CONFIG, ids, ASKED_AGAIN, zero_carry_at=len(ids) - back)[0] for back in (1, 2)]
        ranked.append((right not in wrong, min(leads), text + character))
    return max(ranked)[2]


def answer(weights: dict, prompt: str, tokens: int, faults=(), zero_carry_at=None) -> dict:
    ids, logprobs, _ = greedy(weights, CONFIG, encode(prompt), tokens, faults, zero_carry_at)
    return {"text": decode(ids), "logprobs": [round(value, 2 if faults else 4) for value in logprobs]}


def make(seed: int = SEED, tried: int = 400) -> tuple[dict, dict]:
    weights = random_weights(seed)
    exact = {name: weight.double() for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(seed)
    prompts = choose_prompts(exact, TOKENS, SHORT, PROMPTS, tried, generator)
    answers = [
        {"faults": list(faults), "answers": [answer(exact, prompt, TOKENS, faults) for prompt in prompts]}
        for faults in variants()
    ]
    # A long prompt, twice, and then with its answer and one character more. Engines that keep beginnings compute anew from the last
    # whole block (of 16, 32, .. tokens), from the prompt's last token, or from the last or last but one token of the answer.
    (long,) = choose_prompts(exact, ASKED_AGAIN, LONG, 1, tried // 10, generator)
    more = longer_prompt(exact, long + answer(exact, long, ASKED_AGAIN)["text"])
    again = [
        {
            "prompt": prompt,
            "right": answer(exact, prompt, ASKED_AGAIN),
            "zero_carry_at": {at: answer(exact, prompt, ASKED_AGAIN, zero_carry_at=at) for at in borders},
        }
        for prompt, borders in ((long, (64, 96, 112, 128)), (more, (128, 129, 136, 137)))
    ]
    before = [answer(exact, prompt, TOKENS, zero_carry_at=SHORT - 1) for prompt in prompts]
    return weights, {"tokens": TOKENS, "prompts": prompts, "variants": answers, "asked_before": before, "again": again}


def main() -> None:
    weights, answers = make()
    PROBE.mkdir(parents=True, exist_ok=True)
    save_file(weights, PROBE / "model.safetensors", metadata={"format": "pt"})
    (PROBE / "model.safetensors").chmod(0o644)
    (PROBE / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    tokenizer()._tokenizer.save(str(PROBE / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<end>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
    }
    (PROBE / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
    (PROBE / "answers.json").write_text(one_line_each(answers))
    report(answers)


def one_line_each(answers: dict) -> str:
    """JSON that is small, and whose changes can be read."""
    parts = []
    for name, value in answers.items():
        if isinstance(value, list) and isinstance(value[0], dict):
            lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in value)
            parts.append(f'"{name}":[\n{lines}\n]')
        else:
            parts.append(f'"{name}":{json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def report(answers: dict) -> None:
    right, *wrong = [[a["text"] for a in variant["answers"]] for variant in answers["variants"]]
    texts = {}
    for variant, found in zip(answers["variants"][1:], wrong):
        same = sum(a == b for a, b in zip(found, right))
        if len(variant["faults"]) == 1:
            print(f"  {variant['faults'][0]}: {PROMPTS - same} of {PROMPTS} answers differ")
        texts.setdefault(tuple(found), []).append(variant["faults"])
    print("  not told apart:", [names for names in texts.values() if len(names) > 1], tuple(right) in texts)
    for entry in answers["again"]:
        print(
            "  zero carry shows at", [at for at, a in entry["zero_carry_at"].items() if a["text"] != entry["right"]["text"]]
        )


if __name__ == "__main__":
    main() if len(sys.argv) == 1 else [print(seed) or report(make(int(seed), 60)[1]) for seed in sys.argv[1:]]
