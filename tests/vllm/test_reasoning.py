"""Reasoning that a model is fine-tuned to write is read back by vLLM's parser. tests/serve/test_reasoning.py is the same without vLLM."""

import pytest
from vllm.reasoning import ReasoningParserManager

from parloop.corpus.chat import encode
from parloop.corpus.tokenizer import train_tokenizer

# As Qwen3's, of the last turn.
TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.reasoning_content is string %}{{- '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{%- endif %}"
    "{{- m.content + '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


@pytest.mark.parametrize("form", ["reasoning_content", "<think>"])
def test_what_is_learnt_is_parsed_back(form):
    tokenizer = train_tokenizer(["2 and 2 is 4, so it is 4\n"] * 9, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE
    answer = {"role": "assistant", "content": "It is 4."}
    if form == "<think>":
        answer["content"] = "<think>\n2 and 2\nis 4\n</think>\n\nIt is 4."
    else:
        answer[form] = "2 and 2\nis 4"
    (row,) = encode(tokenizer, [{"role": "user", "content": "2 + 2?"}, answer])
    written = tokenizer.decode([token for token, label in zip(row["input_ids"], row["labels"]) if label != -100])
    parser = ReasoningParserManager.get_reasoning_parser("qwen3")(tokenizer)
    reasoning, content = parser.extract_reasoning(written.removesuffix("<|im_end|>"), None)
    assert (reasoning.strip("\n"), content.strip("\n")) == ("2 and 2\nis 4", "It is 4.")
