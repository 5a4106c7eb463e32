"""GGUF files by our keys, read by transformers' own reader and by the gguf package: what is in them is the model."""

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import WeightRenaming
from transformers.integrations.gguf import gguf_config_mapping, gguf_conversion_mapping

from parloop import cli
from parloop.errors import ExportError
from parloop.export.export import export
from parloop.export.gguf import NAMES
from tests.helpers.models import tiny_model

CASES = sorted(path.parent for path in (Path(__file__).parents[1] / "parity").glob("*/cases.npz"))
TOLERANCE = 1e-4


def plt_weights(config):
    """GGUF's names to ours. Longer ones first: renamings are applied in order."""
    ours = [(theirs, name) for name, theirs in sorted(NAMES.items(), key=lambda item: -len(item[1]))]
    return [WeightRenaming(rf"(^|\.){re.escape(theirs)}\.", rf"\1{name}.") for theirs, name in ours] + [
        WeightRenaming(r"^blk\.", "model.layers.")
    ]


def plt_fields(metadata, names):
    def read(key):
        return metadata[f"plt.{key}"]

    return {
        "model_type": "iquestpltcoder", "architectures": ["IQuestPLTCoderForCausalLM"], "vocab_size": read("vocab_size"),
        "hidden_size": read("embedding_length"), "intermediate_size": read("feed_forward_length"), "num_hidden_layers": read("block_count"),
        "num_attention_heads": read("attention.head_count"), "num_key_value_heads": read("attention.head_count_kv"),
        "head_dim": read("attention.key_length"), "rms_norm_eps": read("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": read("context_length"), "rope_theta": read("rope.freq_base"),
        "tie_word_embeddings": "output.weight" not in names, "plt_num_loops": read("loop.count"),
        "plt_window_size": [read("attention.sliding_window") - 1, 0], "plt_normalize_per_loop": read("loop.norm_per_loop"),
        "plt_emb_scale": read("loop.embedding_scale"), "plt_hidden_scale": read("loop.hidden_scale"),
        "plt_gate_use_hidden_states": read("loop.gate_input") == "hidden",
    }  # fmt: skip


@pytest.fixture(autouse=True)
def _architecture(monkeypatch):
    """Add the architecture to the tables of transformers' reader: two entries."""
    monkeypatch.setitem(gguf_conversion_mapping.GGUF_ARCHS, "plt", plt_weights)
    monkeypatch.setitem(gguf_config_mapping.GGUF_CONFIG_ARCHS, "plt", plt_fields)


def read_back(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval()


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_a_file_of_float32_is_the_vendors_model(tmp_path, folder):
    model, outputs = read_back(export(folder, tmp_path / "out", to="gguf")), np.load(folder / "cases.npz")
    for T in (1, 5, 40, 200):
        with torch.no_grad():
            found = model(torch.tensor(outputs[f"ids_{T}"])[None]).logits[0].log_softmax(-1)
        np.testing.assert_allclose(found, outputs[f"logprobs_{T}"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("bits", "form", "error"), [(8, "Q8_0", 0.01), (4, "Q4_0", 0.2)])
def test_matrices_are_quantised_and_gates_and_norms_are_not(tmp_path, bits, form, error):
    folder = CASES[-1]
    out = export(folder, tmp_path / "out", to="gguf", bits=bits)
    forms = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out / "model.gguf").tensors}
    kept = {name for name in forms if "norm" in name or "loop_gate" in name}
    assert len(kept) == 5 * 3 + 1
    assert all(forms[name] == ("F32" if name in kept else form) for name in forms)
    ours, exact = read_back(out).state_dict(), AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert ours.keys() == exact.keys()
    for name, weight in exact.items():
        relative = (ours[name] - weight).norm() / weight.norm()
        assert relative == 0 if "norm" in name or "plt_gate" in name else 0 < relative < error


def test_other_options_and_the_other_name_of_gates(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny_model(dtype=torch.float32, tie_word_embeddings=True, attention_bias=True, qk_norm=True, plt_num_loops=3)
    model.save_pretrained(tmp_path / "in")
    weights = load_file(tmp_path / "in" / "model.safetensors")
    renamed = {name.replace("plt_gate", "loop_gate_proj"): weight for name, weight in weights.items()}
    save_file(renamed, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    out = export(tmp_path / "in", tmp_path / "out", to="gguf")
    found = {tensor.name for tensor in gguf.GGUFReader(out / "model.gguf").tensors}
    assert "output.weight" not in found
    assert {"blk.1.loop_gate.bias", "blk.0.attn_q.bias", "blk.0.attn_k_norm.weight", "blk.1.loop_gate_norm.weight"} <= found
    assert len(found) == len(weights)


def test_the_command_warns_that_no_engine_runs_it(tmp_path, capsys):
    cli.app(["export", str(CASES[0]), "--to", "gguf", "--out", str(tmp_path / "out")], result_action="return_value")
    assert "No engine runs this file yet" in " ".join(capsys.readouterr().out.split())


def test_what_the_proposal_does_not_cover(tmp_path):
    tiny_model(
        dtype=torch.float32, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ).save_pretrained(tmp_path / "in")
    for folder, options, told in ((tmp_path / "in", {}, "linear"), (CASES[0], {"bits": 5}, "bits=5")):
        with pytest.raises(ExportError, match=told):
            export(folder, tmp_path / "out", to="gguf", **options)
    assert not (tmp_path / "out").exists()
