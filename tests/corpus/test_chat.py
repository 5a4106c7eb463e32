"""Conversations: which tokens are the assistant's, for templates that say so and for those that do not; bad rows are counted."""

import pytest

from parloop.corpus.chat import Reasoning, encode, load_chat
from parloop.errors import SourceError
from tests.helpers.chats import CHATML, THINKING, chat_tokenizer, write

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


# Reasoning


def thinking(index, thought="hm, well", form="reasoning_content", **more):
    """A conversation of one question, with reasoning in one of its forms."""
    answer = {"role": "assistant", "content": f"hello {index}"}
    if form == "<think>":
        answer["content"] = f"<think>\n{thought}\n</think>\n\n{answer['content']}"
    elif form:
        answer[form] = thought
    return {"messages": [{"role": "user", "content": f"say it, {index}"}, answer]} | more


def loaded(tmp_path, rows, template=THINKING, length=200, **reasoning):
    tokenizer = chat_tokenizer(template)
    chat = load_chat(write(tmp_path / "chat.jsonl", rows), tokenizer, length, 1e-9, set(), Reasoning(**reasoning))
    return chat, [(tokenizer.decode(row["input_ids"]), *learnt(tokenizer, row)) for row in chat.train]


# Of a template without words for reasoning, it is part of the content; what marks the assistant's turns finds it there too.
@pytest.mark.parametrize("template", [THINKING, CHATML, MARKED], ids=["of its own", "plain", "marked"])
@pytest.mark.parametrize("form", ["reasoning_content", "reasoning", "<think>"])
def test_reasoning_and_answer_are_learnt_and_nothing_else(tmp_path, template, form):
    chat, rows = loaded(tmp_path, [thinking(0, form=form)], template)
    assert not chat.left_out
    assert [row[1:] for row in rows] == [("<think>\nhm, well\n</think>\n\nhello 0<|im_end|>",)]
    assert rows[0][0].startswith("<|im_start|>user\nsay it, 0<|im_end|>\n<|im_start|>assistant\n<think>")


@pytest.mark.parametrize("template", [THINKING, MARKED.replace("{{ m.content }}<|im_end|>{% endgen", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>{% endgen")], ids=["of its own", "marked"])  # fmt: skip
def test_reasoning_that_the_template_forgets_is_learnt_in_rows_of_its_own(tmp_path, template):
    messages = [*thinking(0)["messages"], *thinking(1, "so, then")["messages"]]
    _, rows = loaded(tmp_path, [{"messages": messages}], template)
    assert [row[1:] for row in rows] == [
        ("<think>\nhm, well\n</think>\n\nhello 0<|im_end|>",),
        ("<think>\nso, then\n</think>\n\nhello 1<|im_end|>",),
    ]
    assert "hm, well" not in rows[1][0]  # as a model is asked


@pytest.mark.parametrize("switch", [{"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}])
def test_thinking_that_is_turned_off_is_not_learnt(tmp_path, switch):
    _, rows = loaded(tmp_path, [thinking(0, form=None, **switch), thinking(1, form=None)])
    assert rows[0][1:] == ("hello 0<|im_end|>",)
    assert rows[0][0].endswith("assistant\n<think>\n\n</think>\n\nhello 0<|im_end|>\n")
    assert rows[1][1:] == (
        "<think>\n\n</think>\n\nhello 1<|im_end|>",
    )  # where it is on, the template writes that there was none


def test_what_contradicts_itself_or_is_no_reasoning_is_counted(tmp_path):
    wrong = [
        thinking(0, enable_thinking=False),
        thinking(1, enable_thinking="no"),
        thinking(2, chat_template_kwargs={"tokenize": True}),
        thinking(3, thought=["a list"]),
        {"messages": [{"role": "user", "content": "x", "reasoning": "hm"}, {"role": "assistant", "content": "y"}]},
    ]
    chat, rows = loaded(tmp_path, [*wrong, thinking(5)])
    assert len(rows) == 1
    assert chat.left_out == {
        "the chat template refuses it (the text before a turn is not how the text with it begins)": 1,
        "enable_thinking that is neither true nor false": 1,
        "chat_template_kwargs that are not options of a template": 1,
        "reasoning that is not the assistant's text": 2,
    }


def test_reasoning_that_a_template_does_not_write_is_counted(tmp_path):
    forgets = CHATML.replace("{{ m.content or '' }}", "{{ (m.content or '').split('</think>')[-1] }}")
    chat, rows = loaded(tmp_path, [thinking(0), thinking(1, form="<think>"), thinking(2, form=None)], forgets)
    assert chat.left_out == {"reasoning, which the chat template does not write": 2}
    assert [row[1:] for row in rows] == [("hello 2<|im_end|>",)]


@pytest.mark.parametrize("form", ["reasoning_content", "<think>"])
@pytest.mark.parametrize("template", [THINKING, CHATML], ids=["of its own", "plain"])
def test_long_reasoning_is_dropped_or_cut_and_counted(tmp_path, form, template):
    tokenizer = chat_tokenizer(template)
    long = "it is this, or that, and so on, and on"
    rows = [thinking(0, form=form), thinking(1, long, form=form), thinking(2, form=None)]
    tokens = len(tokenizer("hm, well", add_special_tokens=False)["input_ids"])
    assert tokens < len(tokenizer(long, add_special_tokens=False)["input_ids"])

    chat, dropped = loaded(tmp_path, rows, template, tokens=tokens, long="drop")
    assert (chat.conversations, chat.cut) == (2, 0)
    assert chat.left_out == {f"reasoning over {tokens} tokens": 1}
    assert "hello 1" not in str(dropped)

    chat, cut = loaded(tmp_path, rows, template, tokens=tokens, long="cut")
    assert (chat.conversations, chat.cut) == (3, 1)
    assert not chat.left_out
    begin = tokenizer.decode(tokenizer(long, add_special_tokens=False)["input_ids"][:tokens])
    assert {row[1] for row in cut} > {
        f"<think>\n{begin}\n</think>\n\nhello 1<|im_end|>",
        "<think>\nhm, well\n</think>\n\nhello 0<|im_end|>",
    }
    whole, _ = loaded(tmp_path, rows, template)  # 0 tokens: no limit
    assert (whole.conversations, whole.cut) == (3, 0)
