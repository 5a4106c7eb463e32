"""`parloop convert`: the same function at every loop count, the same bytes on the way back, and everything else is refused."""

import errno
import json
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
)

from parloop import PLTForCausalLM
from parloop.convert import convert
from parloop.convert.families import FAMILIES, source_config
from parloop.convert.weights import copy_tensors
from parloop.corpus.tokenizer import text_ids
from parloop.errors import ConvertError, OutputError, SourceError
from tests.helpers.dense import SOURCES, TEXT, make_source
from tests.helpers.models import random_ids


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def tensors_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("kind", SOURCES)
def test_the_same_function_there_and_the_same_bytes_back(kind, tmp_path):
    source = make_source(tmp_path / "source", kind)
    dense = AutoModelForCausalLM.from_pretrained(source)
    ids = random_ids(2, 90)
    with torch.no_grad():
        expected = dense(ids).logits
        padded = dense(ids, attention_mask=(mask := torch.ones_like(ids).index_fill(1, torch.arange(5), 0))).logits[:, 5:]
    wanted = dense.generate(ids[:1], max_new_tokens=12, do_sample=False, eos_token_id=None)
    for loops in (1, 2, 3):
        out = tmp_path / f"r{loops}"
        convert(source, out, loops=loops, window=4)
        model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert isinstance(model, PLTForCausalLM)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert (model.config.eos_token_id, model.config.pad_token_id) == (2, 0)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(model(ids, attention_mask=mask).logits[:, 5:], padded, atol=1e-5, rtol=0)
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        assert model.generate(ids[:1], **options).tolist() == wanted.tolist()
    convert(tmp_path / "r3", tmp_path / "back", to="dense")
    before, after = tensors_of(source), tensors_of(tmp_path / "back")
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is type(dense) or kind == "mistral"
    with torch.no_grad():
        assert torch.equal(back(ids).logits, expected)


def test_exact_is_not_saturated():
    """A gate of exactly 1 has no gradient."""
    from parloop.convert.opening import EXACT_BIAS

    bias = torch.tensor(EXACT_BIAS, requires_grad=True)
    bias.sigmoid().backward()
    assert bias.grad > 1e-7
    assert bias.sigmoid() < 1


@pytest.mark.parametrize("start", ["exact", "open"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_it_trains(kind, start, tmp_path):
    source = make_source(tmp_path / "source", kind)
    convert(source, tmp_path / "plt", loops=2, window=8, start=start, samples=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plt").train()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plt")
    ids = torch.tensor([text_ids(tokenizer, TEXT)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-15)
    losses = []
    for _ in range(50):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    gate = model.model.layers[0].self_attn.plt_gate
    assert gate.weight.any()  # it learned, too
    model.eval()
    model.save_pretrained(tmp_path / "trained")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    options = {"max_new_tokens": 8, "do_sample": False}
    assert loaded.generate(ids[:, :9], **options).tolist() == model.generate(ids[:, :9], **options).tolist()


def test_what_comes_along(tmp_path):
    source = make_source(tmp_path / "source", "qwen3")
    (source / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true}')
    (source / "LICENSE").write_text("yours")
    (source / "tokenization_evil.py").write_text("raise RuntimeError")
    (source / "pytorch_model.bin").write_text("pickled")
    convert(source, tmp_path / "plt", window=8)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        assert (tmp_path / "plt" / name).read_bytes() == (source / name).read_bytes()
    assert not list((tmp_path / "plt").glob("*.py")) + list((tmp_path / "plt").glob("*.bin"))
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "plt"))
    assert old(TEXT)["input_ids"] == new(TEXT)["input_ids"]
    message = [{"role": "user", "content": "x"}]
    assert old.apply_chat_template(message, tokenize=False) == new.apply_chat_template(message, tokenize=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plt")
    assert model.generation_config.temperature == 0.6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_and_dtypes_are_kept(tmp_path, dtype):
    source = make_source(tmp_path / "source", "qwen2", shard="30KB", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(source).to(dtype)
    model.save_pretrained(source, max_shard_size="30KB")
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) > 2
    done = convert(source, tmp_path / "plt", loops=2, window=8)
    assert done.files == len(shards) + 1
    for before, after in zip(shards, sorted((tmp_path / "plt").glob("*.safetensors"))):
        assert load_file(before).keys() == load_file(after).keys()
    index = json.loads((tmp_path / "plt/model.safetensors.index.json").read_text())
    written = tensors_of(tmp_path / "plt")
    assert set(index["weight_map"]) == set(written)
    assert index["metadata"]["total_size"] == done.weights_bytes == sum(tensor.nbytes for tensor in written.values())
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plt")
    assert loaded.dtype == dtype
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    convert(tmp_path / "plt", tmp_path / "back", to="dense")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) == len(shards)


def test_computed_buffers_of_old_files_are_left_out(tmp_path):
    source = make_source(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "plt", loops=1)
    assert not any("inv_freq" in name for name in tensors_of(tmp_path / "plt"))


def test_a_trained_plt_of_one_loop_is_a_source_too(tmp_path):
    convert(make_source(tmp_path / "source", "qwen3"), tmp_path / "r1", loops=1)
    convert(tmp_path / "r1", tmp_path / "r2", loops=2, window=4)
    ids = random_ids(1, 40)
    with torch.no_grad():
        one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("r1", "r2"))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


REFUSED = [
    ("llama", {"model_type": "gpt2"}, "model_type 'gpt2' is not supported: the PLT's layers are Llama's"),
    ("llama", {"model_type": "mixtral", "num_local_experts": 8}, "the PLT's layers have no mixture of experts"),
    ("llama", {"model_type": "gemma2", "final_logit_softcapping": 30.0}, "scaled or capped logits"),
    (
        "llama",
        {"final_logit_softcapping": 30.0},
        r"final_logit_softcapping=30.0.*capped logits.*Remove those that change nothing",
    ),
    ("llama", {"num_experts": 8}, "num_experts=8"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "part of a head",
    ),
    ("llama", {"residual_multiplier": 0.2}, "scaled embeddings or residuals"),
    ("llama", {"vision_config": {"depth": 2}}, "images or sound"),
    ("llama", {"never_heard_of": 1}, "never_heard_of=1"),
    ("llama", {"sliding_window": 16}, "attends through sliding windows"),
    ("llama", {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "code of its own"),
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "the source is quantised"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "use LlamaForCausalLM"),
    ("llama", {"hidden_size": "many"}, "describes no llama"),
    ("llama", {"hidden_act": "swish9"}, "hidden_act='swish9'"),
    ("llama", {"num_hidden_layers": 3}, "the weights lack model.layers.2"),
    ("llama", {"num_hidden_layers": 1}, "hold model.layers.1.* and 6 more, which the PLT"),
    ("llama", {"intermediate_size": 50}, r"shape \[.*\], but config.json says"),
    ("llama", {"attention_bias": True}, "lack model.layers.0.self_attn.k_proj.bias"),
    ("llama", {"tie_word_embeddings": True}, "lm_head.weight and model.embed_tokens.weight differ"),
    ("mistral", {"sliding_window": 16}, "sliding_window=16"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "layer_types": None},
        "sliding windows",
    ),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True}, "sliding windows"),
    ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, "sliding windows|describes no qwen3"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_would_be_another_function_is_refused(kind, changes, message, tmp_path):
    source = edit(make_source(tmp_path / "source", kind), **changes)
    with pytest.raises(ConvertError, match=message):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_window_that_no_layer_uses_is_fine(tmp_path):
    source = make_source(tmp_path / "source", "qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=2)
    convert(source, tmp_path / "plt", window=4)
    ids = random_ids(1, 60)
    with torch.no_grad():
        dense, plt = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("source", "plt"))
    torch.testing.assert_close(plt, dense, atol=1e-5, rtol=0)


def test_options_and_folders(tmp_path):
    source = make_source(tmp_path / "source")
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes").write_text("mine")
    for options, message in [
        ({"out": full}, "exists and is not empty"),
        ({"out": full / "notes"}, "exists and is not empty"),
        ({"source": tmp_path / "no"}, "is not a folder"),
        ({"source": full}, "no config.json"),
        ({"loops": 0}, "loops=0 must be an integer of at least 1"),
        ({"start": "shut"}, "start='shut' must be exact or open"),
        ({"to": "moe"}, "to='moe' must be plt or dense"),
        ({"window": -1}, "window=-1"),
        ({"gate_bias": float("nan")}, "gate_bias=nan"),
        ({"gate_bias": 1e308}, "gate_bias=1e.308 must be from -1000 to 1000"),
        ({"to": "dense"}, "is dense already"),
        ({"start": "open", "data": str(tmp_path / "no")}, "no"),
        ({"to": "dense", "loops": 2}, "says nothing to --to dense"),
    ]:
        with pytest.raises((ConvertError, OutputError, SourceError), match=message):
            convert(**({"source": source, "out": tmp_path / "out"} | options))
    for name, content in (("config.json", "[]"), ("config.json", '{"a":' * 50_000), ("model.safetensors.index.json", "[]")):
        odd = shutil.copytree(source, tmp_path / "odd")
        (odd / "model.safetensors").rename(odd / "elsewhere")
        (odd / name).write_text(content)
        with pytest.raises(
            ConvertError, match=r"no config.json that|does not hold a JSON object|weights in .* cannot be read"
        ):
            convert(odd, tmp_path / "out")
        shutil.rmtree(odd)
    (source / "tokenizer.json").rename(source / "elsewhere")
    with pytest.raises(ConvertError, match="no tokenizer to measure a loss with: use --samples 0"):
        convert(source, tmp_path / "out", start="open")
    convert(source, tmp_path / "plt")
    with pytest.raises(ConvertError, match="is a PLT with 2 loops"):
        convert(tmp_path / "plt", tmp_path / "out", loops=3)
    (source / "model.safetensors").rename(source / "model.bin")
    with pytest.raises(ConvertError, match="only safetensors are read"):
        convert(source, tmp_path / "out")
    (source / "model.safetensors").write_text("half of")
    with pytest.raises(ConvertError, match="cannot be read"):
        convert(source, tmp_path / "out")
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "model-1.safetensors"}}')
    with pytest.raises(ConvertError, match="cannot be read"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    from parloop.convert import weights as module

    source = make_source(tmp_path / "source", shard="30KB")
    copied = []

    def stop_at_the_second(*args):
        if copied:
            raise KeyboardInterrupt
        copied.append(copy_tensors(*args))
        return copied[0]

    monkeypatch.setattr(module, "copy_tensors", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_back_to_a_family_that_has_the_options(tmp_path):
    source = make_source(tmp_path / "source", "qwen3")
    convert(source, tmp_path / "plt")
    edit(tmp_path / "plt", attention_output_bias=True)
    with pytest.raises(ConvertError, match=r"no model of transformers among .* attention_output_bias=True"):
        convert(tmp_path / "plt", tmp_path / "out", to="dense")


def test_every_family_is_one_of_transformers():
    import transformers

    for kind, family in FAMILIES.items():
        assert hasattr(transformers, family.architecture) or kind == "iquestpltcoder"


def test_an_absent_window_of_mistral_is_on(tmp_path):
    """In config.json; transformers' default is 4096 tokens."""
    source = make_source(tmp_path / "source", "mistral")
    config = json.loads((source / "config.json").read_text())
    config.pop("sliding_window")
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConvertError, match="sliding_window=4096"):
        source_config(source)


def test_the_command(tmp_path):
    source, text = make_source(tmp_path / "source", shard="30KB"), tmp_path / "text.py"
    text.write_text(TEXT)
    script = "import sys; from parloop.cli import main; sys.argv[0] = 'parloop'; main()"

    def run(*arguments):
        done = subprocess.run([sys.executable, "-c", script, "convert", *arguments], capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    options = [str(source), "--loops", "3", "--start", "open", "--window", "8", "--data", str(text)]
    code, said = run(*options, "--out", str(tmp_path / "plt"))
    assert code == 0, said
    assert "loss on the sample:" in said
    assert "loops: 3, window 8 tokens, c = " in said
    code, said = run(str(tmp_path / "plt"), "--to", "dense", "--out", str(tmp_path / "dense"))
    assert code == 0, said
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")) is LlamaForCausalLM
    code, said = run(str(source), "--out", str(tmp_path / "plt"))
    assert code == 2
    assert "is not empty: choose another folder" in " ".join(said.split())
    assert "Traceback" not in said
    code, said = run("--help")
    assert code == 0
    assert "And back: parloop convert qwen3-plt --to dense --out qwen3" in " ".join(said.split())


def test_a_disk_without_room_is_found_out_before_converting(tmp_path, monkeypatch):
    import shutil

    from parloop.convert import conversion as module

    source = make_source(tmp_path / "source")
    monkeypatch.setattr(module, "write_weights", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1000))
    with pytest.raises(
        OutputError, match=r"the converted model takes .* GB, and the disk of .* has 1e-06 GB free: make room, or"
    ):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_disk_that_is_full_leaves_nothing(tmp_path, monkeypatch):
    from parloop.convert import weights as module

    source = make_source(tmp_path / "source")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "copy_tensors", full)
    with pytest.raises(OutputError, match=r"the disk of .*out is full: make room, and run the same command again"):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_converted_models_have_a_card(tmp_path):
    """It names no path of this machine."""
    source = make_source(tmp_path / "source")
    result = convert(source, tmp_path / "plt", loops=3)
    convert(tmp_path / "plt", tmp_path / "dense", to="dense")
    plt, dense = (ModelCard.load(tmp_path / name / "README.md") for name in ("plt", "dense"))
    assert "Converted from `source` (llama), and not trained since" in plt.text
    assert "| loops R | 3 |" in plt.text
    assert (result.folder, result.model_type) == (tmp_path / "plt", "iquestpltcoder")
    assert "`model_type: llama`" in dense.text
    assert "parallel-loop-transformer" in plt.data.tags
    assert "parallel-loop-transformer" not in dense.data.tags
    assert str(tmp_path) not in plt.text + dense.text
