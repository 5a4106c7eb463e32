"""From a dense checkpoint to a server: converted, trained on, fine-tuned with an adapter, merged, and asked over HTTP."""

import json

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from parloop.convert import convert
from parloop.train import ChatRecipe, Recipe
from parloop.train.training import train
from tests.helpers.chats import conversations, write
from tests.helpers.dense import make_source
from tests.helpers.servers import Running
from tests.helpers.sources import write_sources

QUIET = Console(quiet=True)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|eos|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    source = make_source(folder / "dense", "qwen3")
    (source / "chat_template.jinja").write_text(TEMPLATE)
    convert(source, folder / "plt", loops=2, window=8, start="open", samples=0)
    sources = str(write_sources(folder / "sources"))
    options = {"batch_size": 4, "device": "cpu", "eval_every": 0, "log_every": 10, "length": 64}
    recipe = Recipe(source=sources, init_from=str(folder / "plt"), tokens=50 * 4 * 64, validation_share=0.2, **options)
    result = train(recipe, folder / "run", console=QUIET)
    assert result.loss_curve[-1][1] < result.loss_curve[0][1] - 0.5
    chat = write(folder / "chat.jsonl", conversations(60))
    options |= {"length": 128, "learning_rate": 1e-2}
    train(
        ChatRecipe(model=str(folder / "run"), chat=chat, lora_rank=4, epochs=4.0, **options), folder / "tuned", console=QUIET
    )
    return folder


def test_what_was_converted_trained_and_tuned_is_served(trained):
    tokenizer, model = (
        AutoTokenizer.from_pretrained(trained / "tuned"),
        AutoModelForCausalLM.from_pretrained(trained / "tuned"),
    )
    assert model.config.qk_norm
    assert json.loads((trained / "tuned" / "config.json").read_text())["plt_num_loops"] == 2
    messages = [{"role": "user", "content": "3 red"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        output = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    running = Running(trained / "tuned", trained / "log", "--log-level", "error")
    try:
        running.wait()
        answer = running.client.chat.completions.create(
            model="tuned@2", messages=messages, max_tokens=8, temperature=0
        ).choices[0]
    finally:
        running.process.kill()
    assert answer.message.content == tokenizer.decode(output, skip_special_tokens=True)
    assert answer.message.content
