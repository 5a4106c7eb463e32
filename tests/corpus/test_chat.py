"""Conversations: which tokens are the assistant's, for templates that say so and for those that do not; bad rows are counted."""

import pytest

from parloop.corpus.chat import encode, load_chat
from parloop.errors import SourceError
from tests.helpers.chats import CHATML, chat_tokenizer, write

MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: reasoning is kept in the last turn only.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HELLO = [
    {"role": "user", "content": "say hello, please"},
    {"role": "assistant", "content": "hello there"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "hello"},
]


def learnt(tokenizer, row):
    """The learnt stretches, as text."""
    texts, run = [], []
    for token, label in zip([*row["input_ids"], None], [*row["labels"], -100]):
        if label != -100:
            assert label == token
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_assistants_turns_and_their_ends_are_learnt(template):
    tokenizer = chat_tokenizer(template)
    (row,) = encode(tokenizer, HELLO)
    assert row["input_ids"] == tokenizer.apply_chat_template(HELLO, return_dict=False)
    assert learnt(tokenizer, row) == ["hello there<|im_end|>", "hello<|im_end|>"]


def test_tool_calls_are_learnt_and_answers_of_tools_are_not():
    tokenizer = chat_tokenizer()
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    messages = [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "three"},
    ]
    (row,) = encode(tokenizer, messages, [{"type": "function", "function": {"name": "add"}}])
    first, second = learnt(tokenizer, row)
    assert first.startswith("<tool_call>")
    assert '"name": "add"' in first
    assert first.endswith("</tool_call><|im_end|>")
    assert second == "three<|im_end|>"
    assert '"function"' in tokenizer.decode(row["input_ids"])


def test_turns_that_the_template_writes_otherwise_later_get_rows_of_their_own():
    tokenizer = chat_tokenizer(FORGETFUL)
    messages = [dict(m) for m in HELLO]
    messages[1]["content"] = "<think>hm</think>hello there"
    messages[3]["content"] = "<think>well</think>hello"
    rows = encode(tokenizer, messages)
    assert [learnt(tokenizer, row) for row in rows] == [
        ["<think>hm</think>hello there<|im_end|>"],
        ["<think>well</think>hello<|im_end|>"],
    ]
    assert "hm" not in tokenizer.decode(rows[1]["input_ids"])
    # What is learnt follows what a model would be given.
    for row, turns in zip(rows, (1, 3)):
        prompt = tokenizer.apply_chat_template(messages[:turns], add_generation_prompt=True, return_dict=False)
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"][len(prompt)] != -100
        assert row["labels"][len(prompt) - 1] == -100


def test_bad_rows_are_counted_and_the_rest_is_used(tmp_path):
    tokenizer = chat_tokenizer()
    good = [
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "hello"}]} for i in range(20)
    ]
    bad = [
        "{",
        {"text": "no"},
        {"messages": []},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]},
        {"messages": [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "x"}]},
        {"messages": good[0]["messages"]},
        {"messages": [{"role": "user", "content": "y"}, {"role": "assistant", "content": "z"}], "tools": "{"},
    ]
    source = write(tmp_path / "chat.jsonl", [*good[:10], *bad, *good[10:]])
    chat = load_chat(source, tokenizer, 64, 0.2, {tokenizer.convert_tokens_to_ids("<|im_end|>")})
    assert chat.conversations == 20
    assert len(chat.train) + len(chat.validation) == 20
    assert chat.validation
    assert chat.stops
    assert chat.left_out == {
        "not JSON": 1, "no messages": 2, "a message without a known role": 1, "no turn of the assistant's": 1,
        "a message without content": 1, "over 64 tokens": 1, "duplicate": 1,
        "tools that are not JSON": 1,
    }  # fmt: skip
    assert chat.left_out_names["not JSON"] == [f"{source}, line 11"]
    again = load_chat(source, tokenizer, 64, 0.2, set())
    assert (again.train.to_list(), again.digest) == (chat.train.to_list(), chat.digest)
    assert not again.stops


def test_nothing_to_train_on(tmp_path):
    tokenizer = chat_tokenizer()
    source = write(tmp_path / "chat.jsonl", [{"text": "x"}])
    with pytest.raises(SourceError, match=r"no conversation to train on \(left out: 1 no messages\)\. Rows look like"):
        load_chat(source, tokenizer, 64, 0.1, set())
    with pytest.raises(SourceError, match="no such file"):
        load_chat(str(tmp_path / "no.jsonl"), tokenizer, 64, 0.1, set())
    tokenizer.chat_template = None
    with pytest.raises(SourceError, match="has no chat template"):
        load_chat(source, tokenizer, 64, 0.1, set())


def test_tables_of_conversations(tmp_path):
    """Whose messages have nulls for each other's fields."""
    from datasets import Dataset

    tokenizer = chat_tokenizer()
    call = {"type": "function", "function": {"name": "add"}}
    rows = [{"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "hello"}]} for i in range(5)]
    rows[0]["messages"][1]["tool_calls"] = [call]
    Dataset.from_list(rows).to_parquet(tmp_path / "chat.parquet")
    chat = load_chat(str(tmp_path / "chat.parquet"), tokenizer, 96, 0.01, set())
    assert chat.conversations == 5
    plain = load_chat(write(tmp_path / "chat.jsonl", rows), tokenizer, 96, 0.01, set())
    assert sorted(map(str, chat.train)) == sorted(map(str, plain.train))


def talk(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def test_forms_of_openai(tmp_path):
    """Content in parts, and arguments as JSON text, are what they say."""
    tokenizer = chat_tokenizer()

    def row(content, arguments):
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
        asked = [{"role": "user", "content": content}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        return {"messages": [*asked, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "three"}]}

    plain = load_chat(write(tmp_path / "a.jsonl", [row("1 + 2?", {"a": 1, "b": 2})]), tokenizer, 256, 1e-9, set())
    parts = [{"type": "text", "text": "1 + "}, {"type": "text", "text": "2?"}]
    forms = load_chat(write(tmp_path / "b.jsonl", [row(parts, '{"a": 1, "b": 2}')]), tokenizer, 256, 1e-9, set())
    assert forms.train.to_list() == plain.train.to_list()
    empty = load_chat(write(tmp_path / "c.jsonl", [row("x", ""), row("y", None)]), tokenizer, 256, 1e-9, set())
    assert empty.conversations == 2
    bad = [row([{"type": "image_url"}], {}), row("x", "{"), row("x", "[1]"), "[" * 100_000]
    chat = load_chat(write(tmp_path / "d.jsonl", [*bad, row("x", {})]), tokenizer, 256, 1e-9, set())
    assert chat.left_out == {
        "content that is not text": 1, "tool calls without a function and its arguments as a JSON object": 2, "not JSON": 1,
    }  # fmt: skip


def test_an_answer_is_learnt_to_its_end_whatever_the_post_processor_trims():
    """Post-processors may trim spaces off the places of tokens, and the answers' first tokens begin with one."""
    from tokenizers import processors

    tokenizer = chat_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    messages = talk("say it", "hello there", "again", "  hello")
    (row,) = encode(tokenizer, messages)
    assert learnt(tokenizer, row) == [" hello there", "   hello"]


def test_a_conversation_that_the_assistant_opens():
    tokenizer = chat_tokenizer()
    (row,) = encode(tokenizer, talk("hello", "say it again", "hello there", first="assistant"))
    assert learnt(tokenizer, row) == ["hello<|im_end|>", "hello there<|im_end|>"]


def test_many_conversations_are_encoded_by_other_processes(tmp_path, monkeypatch):
    tokenizer = chat_tokenizer()
    source = write(tmp_path / "chat.jsonl", [{"messages": talk(f"{i}", "hello there! " * (1 + i % 9))} for i in range(60)])
    one = load_chat(source, tokenizer, 40, 0.2, set())
    monkeypatch.setattr("parloop.corpus.chat.FEW", 5)
    other = load_chat(source, tokenizer, 40, 0.2, set())
    assert 0 < one.left_out["over 40 tokens"] < 50
    assert (one.train.to_list(), one.validation.to_list()) == (other.train.to_list(), other.validation.to_list())
    assert (one.digest, one.left_out) == (other.digest, other.left_out)
