"""Conversations, chat templates and small tokenizers."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from parloop.corpus import train_tokenizer
from parloop.train import ChatRecipe

CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# As Qwen3's: reasoning stands beside the content or in it, is written after the last question only, and can be turned off.
THINKING = (
    "{%- set ns = namespace(asked=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.asked = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- set content = m.content or '' %}{%- set thought = '' %}"
    "{%- if m.role == 'assistant' %}{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}"
    "{%- elif '</think>' in content %}{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.asked and (loop.last or thought) %}"
    "{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


def chat_tokenizer(template=CHATML):
    tokenizer = train_tokenizer(["def hello(x): return 'hello there, please say it again'\n"] * 9, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


WORDS = ["red", "green", "blue", "black", "white", "grey"]


def conversations(count=120):
    """Questions whose answers follow a rule."""
    rows = []
    for i in range(count):
        word = WORDS[i % len(WORDS)]
        messages = [{"role": "user", "content": f"{i} {word}"}, {"role": "assistant", "content": f"{word} {word}"}]
        rows.append(
            {"messages": messages, "tools": [{"type": "function", "function": {"name": "paint"}}] if i % 10 == 0 else None}
        )
    return rows


def recipe_of(made, **changes):
    fields = {
        "model": str(made / "base"), "chat": str(made / "chat.jsonl"), "length": 128, "epochs": 8.0, "batch_size": 4, "learning_rate": 1e-2,
        "log_every": 1, "eval_every": 20, "save_every": 15, "device": "cpu", "validation_share": 0.1,
    }  # fmt: skip
    return ChatRecipe(**(fields | changes))


def byte_tokenizer(**options) -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **options)
