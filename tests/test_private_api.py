"""Canaries: what parloop relies on in other libraries beyond what they document. Each test says what breaks when it fails.

A release of a library that changes one of these makes its test fail here, by name, and not somewhere in the suite.
"""

import inspect
from dataclasses import fields

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, masking_utils
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer, StaticSlidingWindowLayer
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput, GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.chat_parsing import ResponseParser

from parloop import make_cache
from parloop.model.cache_argument import CACHE
from tests.helpers.models import random_ids, tiny_config, tiny_model


def spied(monkeypatch, owner, *names):
    """Names of methods of `owner`, in the order of their calls from now on."""
    calls = []
    for name in names:
        method = getattr(owner, name)

        def call(*args, name=name, method=method, **kwargs):
            calls.append(name)
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)
    return calls


# The model (model/).


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("_prefill", {"prefill_chunk_size": 3}),  # else chunks of a prompt run later loops on the tail of each: slower
        ("_prepare_cache_for_generation", {}),  # else assisted decoding cannot crop what it rejects
        ("_get_candidate_generator", {"assistant_early_exit": 1}),  # else a failed call leaves a model of one layer
    ],
)
def test_generate_calls_what_generation_py_overrides(name, options, monkeypatch):
    calls = spied(monkeypatch, GenerationMixin if name != "_get_candidate_generator" else type(tiny_model()), name)
    tiny_model().generate(random_ids(1, 7), max_new_tokens=3, do_sample=False, **options)
    assert calls == [name]


def test_steps_of_a_static_cache_have_their_masks_made_in_advance(monkeypatch):
    """generation.py, create_masks_for_generate: else compiled steps make the masks of a Llama."""
    model = tiny_model(dtype=torch.float32)
    calls = []
    made = type(model).create_masks_for_generate
    monkeypatch.setattr(
        type(model), "create_masks_for_generate", staticmethod(lambda *a, **k: calls.append(1) or made(*a, **k))
    )
    model.generate(random_ids(1, 7), max_new_tokens=3, do_sample=False, cache_implementation="static", disable_compile=True)
    assert len(calls) == 3


def test_the_library_has_one_name_for_a_cache():
    """cache_argument.CACHE: else masks are made as if there were no cache, or generate() loses it between two steps."""
    masks = [masking_utils.create_causal_mask, masking_utils.create_sliding_window_causal_mask]
    for function in (*masks, GenerationMixin.prepare_inputs_for_generation, LlamaForCausalLM.forward):
        assert CACHE in inspect.signature(function).parameters, function
    for output in (BaseModelOutputWithPast, CausalLMOutputWithPast, GenerateDecoderOnlyOutput):
        assert CACHE in {field.name for field in fields(output)}, output
    parameters = inspect.signature(masking_utils.create_causal_mask).parameters
    assert {"allow_is_causal_skip", "layer_idx"} <= parameters.keys()  # masks.py


def test_a_layer_that_is_computed_again_is_called_without_a_cache():
    """cache_argument.CACHE, as the layers are called: else what it stores is stored twice, and gradients are wrong."""
    got = []

    class Layer(GradientCheckpointingLayer):
        def forward(self, x, **kwargs):
            got.append(kwargs)
            return x

    layer = Layer().train()
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = lambda function, *args: function(*args)
    layer(torch.ones(1, requires_grad=True), **{CACHE: make_cache(tiny_config())})
    assert got == [{CACHE: None}]


def test_moving_a_model_applies_to_every_module():
    """rotary.py overrides nn.Module._apply: else frequencies are cast to bfloat16, and far positions drift."""
    model = tiny_model(dtype=torch.float32).to(torch.bfloat16)
    frequencies = [b for name, b in model.named_buffers() if "inv_freq" in name]
    assert {b.dtype for b in frequencies} == {torch.float32}
    assert frequencies


def test_attributes_of_cache_layers_that_the_tail_writes():
    """cache.py: else windows behind a tail say that they hold the wrong number of tokens."""
    grown, static = DynamicSlidingWindowLayer(sliding_window=5), StaticSlidingWindowLayer(max_cache_len=9, sliding_window=5)
    assert {"cumulative_length", "record_past"} <= vars(grown).keys()
    assert {"cumulative_length", "cumulative_length_int"} <= vars(static).keys()
    assert "activate_past_recording" in vars(Cache)


def test_what_masks_ask_of_a_cache():
    """masks.WindowView and tail.TailView stand for a configuration and a cache when masks are made: else AttributeError."""
    config, asked = tiny_config(), set()

    class Asked:
        def __getattr__(self, name):
            asked.add(name)
            return getattr(cache, name)

    cache = make_cache(config)
    config._attn_implementation = "sdpa"
    masking_utils.create_causal_mask(config, torch.zeros(2, 3, 8), torch.ones(2, 3), Asked(), None)
    assert asked <= {"get_query_offset", "get_mask_sizes", "is_compileable", "is_sliding", "get_seq_length", "layers"}


def test_reentrant_checkpointing_under_ddp_can_be_seen():
    """call.py: else gradients of shared weights are synchronised too early, in silence."""
    assert DistributedDataParallel._get_active_ddp_module() is None
    model = tiny_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert model.model.layers[0]._gradient_checkpointing_func.keywords["use_reentrant"] is True


# The trainer (train/trainer.py).


def test_a_trainer_saves_and_loads_through_what_is_overridden(monkeypatch, tmp_path):
    """Otherwise checkpoints are the library's own: mixtures lose their cursor, and one of many processes may count as whole before
    all have written. _save_rng_state is the last to write, before the trainer's state says that the checkpoint is there."""
    saved = ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"]
    loaded = ["_load_from_checkpoint", "_load_optimizer_and_scheduler"]
    calls = spied(monkeypatch, Trainer, *saved, *loaded)

    def trainer():
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
        )
        rows = [{"input_ids": row, "labels": row} for row in random_ids(4, 8)]
        return Trainer(tiny_model(dtype=torch.float32), arguments, train_dataset=rows)

    trainer().train()
    assert calls == [*saved, *saved]
    calls.clear()
    trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert calls == [*loaded, *saved]


# The server without vLLM (serve/fallback_*.py). It uses nothing private of transformers' own server.


def test_a_streamer_gets_the_prompt_first_and_then_one_token_at_a_time():
    """serve/fallback_answers.Writer: else prompts are in answers, or first tokens are lost."""
    got, ended = [], []

    class Streamer(BaseStreamer):
        def put(self, value):
            got.append(value)

        def end(self):
            ended.append(True)

    prompt = torch.tensor([[5, 6, 7]])
    written = tiny_model().generate(prompt, max_new_tokens=3, do_sample=False, streamer=Streamer(), eos_token_id=-1)
    assert got[0].tolist() == prompt.tolist()
    assert [value.tolist() for value in got[1:]] == [[token] for token in written[0, 3:].tolist()]
    assert ended == [True]


def test_what_a_streamer_raises_ends_generate():
    """serve/fallback_answers.Writer: else stop strings end no answer, and answers are written for clients that left."""

    class EndedError(Exception):
        pass

    class Streamer(BaseStreamer):
        puts = 0

        def put(self, value):
            self.puts += 1
            if self.puts == 3:
                raise EndedError

    model, prompt, streamer = tiny_model(), torch.tensor([[5, 6, 7]]), Streamer()
    before = model.generate(prompt, max_new_tokens=5, do_sample=False)
    with pytest.raises(EndedError):
        model.generate(prompt, max_new_tokens=50, do_sample=False, streamer=streamer)
    assert streamer.puts == 3
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), before)


def test_events_of_a_response_parser():
    """serve/fallback_answers.Writer and answer_template: otherwise reasoning and tool calls are not separated from text."""
    text = {"content": "text", "content_args": {"strip": False}, "repeats": True, "join": ""}
    call = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
    fields = {
        "reasoning_content": text | {"open_pattern": r"\A<think>", "close_pattern": "</think>"},
        "tool_calls": {
            "open_pattern": r"<call (?P<name>\w+)>(?=.*?</call>)", "close_pattern": "</call>", "content": "json",
            "content_args": {"allow_non_json": True}, "repeats": True, "transform": call,
        },
        "content": text | {"close_pattern": "<end>"},
    }  # fmt: skip
    template = {"defaults": {"role": "assistant"}, "start_anchor_pattern": r"(?=<think>\Z)", "fields": fields}
    parser = ResponseParser(template, prefix="<call no>{}</call><think>", tools=[])
    events = (
        parser.initial_events + parser.feed('a</think>b<call f>{"x": 1}</call><call g>?</call><call') + parser.finalize()[1]
    )
    assert {event["type"] for event in events} == {"region_open", "region_chunk", "region_close"}
    shown = [(event["field"], event["text"]) for event in events if event["type"] == "region_chunk" and not event["dirty"]]
    assert shown == [("reasoning_content", "a"), ("content", "b"), ("content", "<call")]
    called = [event["value"] for event in events if event["type"] == "region_close" and event["field"] == "tool_calls"]
    assert [(made["function"]["name"], made["function"]["arguments"]) for made in called] == [("f", {"x": 1}), ("g", "?")]
