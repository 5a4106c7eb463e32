"""Reasoning that a model is fine-tuned to write is read back by the server's parser, which shows it beside the answer.
tests/vllm/test_reasoning.py is the same of vLLM's parser."""

import pytest
from transformers.utils.chat_parsing import ResponseParser

from parloop.corpus.chat import encode
from parloop.serve.fallback_answers import answer_template
from tests.helpers.chats import THINKING, chat_tokenizer


@pytest.mark.parametrize("form", ["reasoning_content", "<think>"])
@pytest.mark.parametrize("in_pieces", [False, True])
def test_what_is_learnt_is_parsed_back(form, in_pieces):
    tokenizer = chat_tokenizer(THINKING)
    answer = {"role": "assistant", "content": "It is 4."}
    if form == "<think>":
        answer["content"] = "<think>\n2 and 2\nis 4\n</think>\n\nIt is 4."
    else:
        answer[form] = "2 and 2\nis 4"
    question = [{"role": "user", "content": "2 + 2?"}]
    (row,) = encode(tokenizer, [*question, answer])
    written = tokenizer.decode([token for token, label in zip(row["input_ids"], row["labels"]) if label != -100])
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    parser = ResponseParser(answer_template(tokenizer, tools=False), prefix=prompt)
    for piece in written if in_pieces else [written]:
        parser.feed(piece)
    message, _ = parser.finalize()
    assert (message["reasoning_content"], message["content"]) == ("2 and 2\nis 4", "It is 4.")
