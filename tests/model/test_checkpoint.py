"""Configuration and checkpoints: what is refused, what is loaded by name alone, what is written back."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import parloop
from parloop import PLTConfig, PLTForCausalLM, PLTModel
from tests.helpers.models import tiny_config, tiny_model
from tests.helpers.parity import CASES

BAD = [
    ({"plt_window_size": [64]}, r"plt_window_size=\[64\] must be \[w, 0\]"),
    ({"plt_window_size": [64, 1]}, r"plt_window_size=\[64, 1\] must be \[w, 0\]"),
    ({"plt_window_size": [-1, 0]}, r"plt_window_size=\[-1, 0\] must be \[w, 0\]"),
    ({"plt_window_size": 64}, r"plt_window_size=64 must be \[w, 0\]"),
    ({"plt_window_size": [1.5, 0]}, r"plt_window_size=\[1.5, 0\] must be \[w, 0\]"),
    ({"plt_num_loops": 0}, "plt_num_loops=0 must be an integer of at least 1"),
    ({"num_loops": -3}, "plt_num_loops=-3 must be"),
    ({"plt_num_loops": 2.0}, r"plt_num_loops=2.0 must be"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3 must be a positive divisor of num_attention_heads=4"),
    (
        {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": None},
        "num_attention_heads=5 must be a positive divisor",
    ),
    ({"head_dim": 7}, "head_dim=7 must be an even integer"),
    ({"plt_gate_use_hidden_states": "query"}, "plt_gate_use_hidden_states='query' is not a known gate mode"),
    ({"plt_normalize_per_loop": None}, "plt_normalize_per_loop=None must be true or false"),
    ({"plt_emb_scale": "0.7"}, "plt_emb_scale='0.7' must be a number"),
    ({"hidden_act": "swish2"}, "hidden_act='swish2' is not known"),
    ({"rope_scaling": {"rope_type": "yaarn"}}, "rope_type='yaarn', which transformers does not know"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "factor"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling=.*'linear'.* lacks a field: .*'factor'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be an integer of at least 1"),
    ({"dtype": "foo"}, "dtype='foo' is not a dtype of models: use 'bfloat16'"),
    ({"dtype": "int8"}, "dtype='int8' is none"),
    ({"dtype": "nn"}, "dtype='nn' is none"),
    ({"torch_dtype": 3}, "dtype=3 is none"),
    ({"rope_theta": "abc"}, "rope_theta='abc', of RoPE, must be a finite number"),
    ({"rope_theta": None}, "rope_theta=None must be a number above 0"),
    ({"rope_theta": 0}, "rope_theta=0 must be a number above 0"),
    ({"rope_theta": float("nan")}, "rope_theta=nan, of RoPE, must be a finite number"),
    ({"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
    ({"rope_parameters": [1]}, r"=\[1\] must be an object"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "x"}}, "factor='x', of RoPE, must be a finite number"),
    ({"architectures": 3}, "architectures=3 must be a list of names"),
    ({"hidden_act": ["silu"]}, r"hidden_act=\['silu'\] is not known"),
    ({"rms_norm_eps": "x"}, "rms_norm_eps='x' must be a finite number"),
    ({"plt_hidden_scale": float("inf")}, "plt_hidden_scale=inf must be a finite number"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' must be true or false"),
    ({"pad_token_id": 61}, "pad_token_id=61 must be one of the vocab_size=61 token ids"),
    ({"pad_token_id": "x"}, "pad_token_id='x' must be one of"),
    *(
        ({name: value}, f"{name}={value!r} must be an integer of at least 1")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
        for value in (0, -1, 1.0, "8", None)
    ),
    *(({"head_dim": value}, f"head_dim={value!r} must be an even integer of at least 2") for value in (0, -2, 1, 8.0, "8")),
    *(
        ({"num_key_value_heads": value}, f"num_key_value_heads={value!r} must be a positive")
        for value in (0, -1, 8, 2.0, "2")
    ),
    *(
        (
            {"num_attention_heads": value, "num_key_value_heads": 1, "head_dim": None},
            "must be a positive divisor of hidden_size=32",
        )
        for value in (0, -4, 3, 4.0, "4")
    ),
    *(
        ({"plt_num_loops": value}, f"plt_num_loops={value!r} must be an integer of at least 1")
        for value in (-1, True, "2", None)
    ),
    *(
        ({"plt_trained_loops": value}, "must be a list of loop counts, each at least 1, or null")
        for value in ([], "12", {1, 2}, 3)
    ),
    *(
        ({"plt_trained_loops": [2, value]}, f"plt_trained_loops: each={value!r} must be an integer")
        for value in (0, True, 2.0)
    ),
    *(({"plt_offset": value}, f"plt_offset={value!r} must be an integer of at least 0") for value in (-1, True, 1.0, None)),
    *(
        ({"plt_window_size": value}, r"must be \[w, 0\] with w >= 0")
        for value in ([4, -1], [True, 0], [4, False], [4, 0.0], ["4", 0], "40", [4, 0, 0], [], {"4": 0, "5": 0})
    ),
    *(
        ({name: value}, f"{name}={value!r} must be a number, or null")
        for name in ("plt_emb_scale", "plt_hidden_scale")
        for value in (True, False, "1")
    ),
    *(
        ({name: value}, f"{name}={value!r} must be true or false")
        for name in ("plt_normalize_per_loop", "attention_bias", "mlp_bias", "qk_norm")
        for value in (1, 0, None, "true")
    ),
    *(({"plt_gate_use_hidden_states": value}, "is not a known gate mode") for value in (1, 0, None)),
    *(({"attention_output_bias": value}, "must be true, false, or null") for value in (2, "true", [])),
]
GOOD = [
    {"vocab_size": 1, "intermediate_size": 1, "num_hidden_layers": 1, "max_position_embeddings": 1},
    {"hidden_size": 1, "head_dim": 2},
    {"num_key_value_heads": 1},
    {"num_key_value_heads": 4},
    {"num_attention_heads": 3, "num_key_value_heads": 3},  # no divisor of the hidden size: head_dim says how wide they are
    {"plt_num_loops": 1},
    *({"plt_trained_loops": value} for value in (None, [1], (1, 3))),
    *({"plt_window_size": value} for value in ([0, 0], (3, 0))),
    *({"plt_emb_scale": value, "plt_hidden_scale": value} for value in (None, 0, 1, -0.5)),
    *({"attention_output_bias": value} for value in (None, True, False)),
    *({"eos_token_id": value} for value in (None, 3, [3, 4])),
    {"hidden_act": "gelu"},
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[str(change) for change, _ in BAD])
def test_bad_configurations_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**change)


@pytest.mark.parametrize("change", GOOD, ids=str)
def test_configurations_at_the_edge_of_what_is_possible(change):
    config = tiny_config(**change)
    assert {name: getattr(config, name) for name in change} == change


def test_what_follows_from_other_fields():
    config = tiny_config(
        num_key_value_heads=None, head_dim=None, num_attention_heads=4, hidden_size=48, plt_window_size=None
    )
    assert (config.num_key_value_heads, config.head_dim, config.plt_window_size) == (4, 12, [64, 0])
    assert tiny_config(eos_token_id=(3, 4)).eos_token_id == [3, 4]
    assert tiny_config(plt_num_loops=3).trained_loops == [3]
    assert tiny_config(plt_num_loops=3, plt_trained_loops=(1, 2)).trained_loops == [1, 2]
    for both, output, expected in ((False, None, False), (True, None, True), (True, False, False), (False, True, True)):
        assert tiny_config(attention_bias=both, attention_output_bias=output).output_bias is expected


def test_configurations_are_equal_if_their_fields_are(tmp_path):
    assert tiny_config() == tiny_config()
    tiny_config().save_pretrained(tmp_path)
    loaded = PLTConfig.from_pretrained(tmp_path)
    assert loaded == tiny_config()
    assert json.dumps(loaded.to_dict()) == json.dumps(tiny_config().to_dict())
    assert tiny_config() != tiny_config(plt_num_loops=3)
    assert tiny_config() != tiny_config().to_dict()


def test_fields_set_later_are_checked_too(tmp_path):
    config = tiny_config()
    for change, message in BAD:
        if len(change) > 1 or change.keys() & {"rope_scaling", "rope_theta"}:  # names in files only
            continue
        before = config.to_dict()
        with pytest.raises(ValueError, match=message):
            setattr(config, *next(iter(change.items())))
        assert config.to_dict() == before
    with pytest.raises(ValueError, match="plt_num_loops=0"):
        config.num_loops = 0
    with pytest.raises(ValueError, match="yaarn"):
        config.rope_parameters = {"rope_type": "yaarn", "rope_theta": 1e4}
    assert config == tiny_config()
    config.plt_num_loops = 5
    assert config.num_loops == 5
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="plt_window_size"):
        AutoConfig.from_pretrained(tmp_path, plt_window_size=[3, 3])


def test_absent_fields_mean_what_the_release_says():
    config = PLTConfig()
    assert (config.plt_num_loops, config.plt_window_size, config.window_tokens) == (2, [64, 0], 64)
    assert config.plt_emb_scale is None
    assert config.plt_hidden_scale is None
    assert config.plt_gate_use_hidden_states is False
    assert config.plt_normalize_per_loop is True
    assert config.vocab_size == 75904
    assert config.head_dim == 128
    assert config.rope_parameters["rope_theta"] == 500000.0
    assert PLTConfig(num_loops=3).plt_num_loops == PLTConfig(plt_num_loops=3).num_loops == 3


def copy_case(folder, tmp_path, **config_changes):
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    config = json.loads((source / "config.json").read_text()) | config_changes
    (source / "config.json").write_text(json.dumps(config))
    return source


@pytest.mark.parametrize("trust_remote_code", [None, True])
def test_loads_by_name_and_wins_over_auto_map(tmp_path, trust_remote_code):
    """The repository's own code is never run, asked for or not."""
    auto_map = {"AutoConfig": "configuration_iquestpltcoder.IQuestPLTCoderConfig", "AutoModelForCausalLM": "evil.Model"}
    source = copy_case(CASES[0], tmp_path, auto_map=auto_map)
    for name in ("configuration_iquestpltcoder", "evil"):
        (source / f"{name}.py").write_text("raise RuntimeError('remote code was run')\n")
    options = {} if trust_remote_code is None else {"trust_remote_code": trust_remote_code}
    assert type(AutoConfig.from_pretrained(source, **options)) is PLTConfig
    assert type(AutoModelForCausalLM.from_pretrained(source, **options)) is PLTForCausalLM
    assert type(AutoModel.from_pretrained(source, **options)) is PLTModel


def test_a_configuration_has_an_auto_map_for_those_who_read_it(tmp_path):
    """TRL and others read it of every model that transformers does not bring itself. Empty, it is not written."""
    from trl.trainer.utils import create_model_from_path

    model = tiny_model(dtype=torch.float32)
    assert model.config.auto_map == {}
    model.save_pretrained(tmp_path / "new")
    assert "auto_map" not in json.loads((tmp_path / "new/config.json").read_text())

    loaded = create_model_from_path(str(tmp_path / "new"))
    assert type(loaded) is PLTForCausalLM
    assert loaded.config.auto_map == {}
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "new/config.json").read_text()
    read, asked = (AutoConfig.from_pretrained(tmp_path / "new") for _ in range(2))
    assert asked.auto_map == {}
    assert asked == read


def test_an_auto_map_that_a_file_or_a_user_gave_is_kept(tmp_path):
    """Each configuration has its own: what one is given, another does not get."""
    given = {"AutoModelForCausalLM": "modeling.Model"}
    source = copy_case(CASES[0], tmp_path, auto_map=given)
    config = AutoConfig.from_pretrained(source)
    assert config.auto_map == given
    config.save_pretrained(tmp_path / "kept")
    assert json.loads((tmp_path / "kept/config.json").read_text())["auto_map"] == given

    config = tiny_config()
    config.auto_map["AutoConfig"] = "configuration.Config"  # as register_for_auto_class() does when a model is saved
    assert tiny_config().auto_map == {}
    config.save_pretrained(tmp_path / "given")
    assert json.loads((tmp_path / "given/config.json").read_text())["auto_map"] == {"AutoConfig": "configuration.Config"}


ORDERS = {  # of imports, and what is there at once
    "transformers first": "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM; import parloop",
    "parloop first": "import parloop; from transformers import AutoConfig, AutoModel, AutoModelForCausalLM",
    "a class of ours first": "from parloop import PLTForCausalLM; from transformers import AutoConfig, AutoModel, AutoModelForCausalLM",
    "a module of ours first": "import parloop.model.modeling; from transformers import AutoConfig, AutoModel, AutoModelForCausalLM",
    "the configuration that it extends first": "import parloop; from transformers import LlamaConfig, AutoConfig, AutoModel, AutoModelForCausalLM",
    "the module that it extends first": """
import parloop
import transformers.modeling_layers
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
""",
    "a native class there before": """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
class Native(LlamaConfig):
    model_type = "iquestpltcoder"
class NativeModel(LlamaModel):
    config_class = Native
class NativeForCausalLM(LlamaForCausalLM):
    config_class = Native
AutoConfig.register("iquestpltcoder", Native)
AutoModel.register(Native, NativeModel)
AutoModelForCausalLM.register(Native, NativeForCausalLM)
import parloop
""",
}


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_find_the_model_in_any_order_of_imports(order):
    """Also where a later transformers brings its own class under this name: ours is exact."""
    program = f"""{ORDERS[order]}
for auto, name in ((AutoModel, "PLTModel"), (AutoModelForCausalLM, "PLTForCausalLM")):
    model = auto.from_pretrained({str(CASES[0])!r})
    assert type(model) is getattr(parloop, name), type(model)
assert type(AutoConfig.from_pretrained({str(CASES[0])!r})) is parloop.PLTConfig
"""
    if "import parloop" not in program:
        program = f"import parloop\n{program}"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_torchao_does_not_complain_of_a_machine_without_a_gpu():
    program = "import parloop; from transformers import AutoModelForCausalLM; import torchao"
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "Failed to load" not in result.stderr


def test_importing_the_package_imports_no_torch():
    program = "import sys, parloop; assert not {'torch', 'transformers'} & set(sys.modules); parloop.PLTConfig; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="no attribute 'PLTForCausalLLM'"):
        parloop.PLTForCausalLLM  # noqa: B018
    assert {"PLTForCausalLM", "diagnose", "make_cache"} <= set(dir(parloop))


@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", ["plt_gate", "loop_gate_proj"])
def test_saves_what_it_read(folder, tmp_path, dtype, gate):
    """Names, dtypes, values and configuration, bit for bit."""
    source = copy_case(folder, tmp_path, torch_dtype=str(dtype).removeprefix("torch."))
    read = load_file(source / "model.safetensors")
    read = {name.replace("plt_gate", gate): tensor.to(dtype) for name, tensor in read.items()}
    save_file(read, source / "model.safetensors", metadata={"format": "pt"})

    model, report = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    model.save_pretrained(tmp_path / "saved")
    written = load_file(tmp_path / "saved" / "model.safetensors")
    assert set(written) == set(read)
    for name, tensor in read.items():
        assert written[name].dtype == dtype
        assert torch.equal(written[name], tensor), name
    assert json.loads((tmp_path / "saved/config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_the_gate_names_are_one_model(tmp_path):
    source = copy_case(CASES[0], tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(source).state_dict()
    weights = load_file(source / "model.safetensors")
    save_file(
        {name.replace("plt_gate", "loop_gate_proj"): tensor for name, tensor in weights.items()},
        source / "model.safetensors",
        metadata={"format": "pt"},
    )
    for name, tensor in AutoModelForCausalLM.from_pretrained(source).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_new_configuration_is_written_in_the_released_names(tmp_path):
    model = tiny_model(rope_scaling={"rope_type": "linear", "factor": 2.0}, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["IQuestPLTCoderForCausalLM"]
    assert config["model_type"] == "iquestpltcoder"
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert config["torch_dtype"] == "bfloat16"
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()


def test_a_new_model_saves_its_gates_under_the_released_name(tmp_path):
    """Not under the alias that loading accepts: a run that resumed from such a checkpoint lost its gates."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    model.model.save_pretrained(tmp_path / "base")
    assert set(load_file(tmp_path / "base" / "model.safetensors")) == set(model.model.state_dict())


def test_a_changed_field_is_written_and_the_rest_as_read(tmp_path):
    config = PLTConfig.from_pretrained(CASES[0], plt_num_loops=5)
    config.save_pretrained(tmp_path)
    read, written = (json.loads((folder / "config.json").read_text()) for folder in (CASES[0], tmp_path))
    assert written == read | {"plt_num_loops": 5}
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["rope_theta"], written["rope_scaling"]) == (1e4, {"rope_type": "linear", "factor": 2.0})


def test_sharded_checkpoints(tmp_path):
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_tied_embeddings(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_gates_start_at_an_even_blend():
    model = PLTForCausalLM(tiny_config())
    for layer in model.model.layers:
        assert not layer.self_attn.plt_gate.weight.any()
        assert not layer.self_attn.plt_gate.bias.any()


def released_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released checkpoint, written down from its specification."""
    D, F, H, G, K, V, L = 5120, 27648, 40, 8, 128, 76800, 14
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for n in range(L):
        shapes |= {
            f"model.layers.{n}.input_layernorm.weight": (D,),
            f"model.layers.{n}.post_attention_layernorm.weight": (D,),
            f"model.layers.{n}.self_attn.q_proj.weight": (H * K, D),
            f"model.layers.{n}.self_attn.k_proj.weight": (G * K, D),
            f"model.layers.{n}.self_attn.v_proj.weight": (G * K, D),
            f"model.layers.{n}.self_attn.o_proj.weight": (D, H * K),
            f"model.layers.{n}.self_attn.plt_gate.weight": (H, D),
            f"model.layers.{n}.self_attn.plt_gate.bias": (H,),
            f"model.layers.{n}.self_attn.plt_gate.gate_norm.weight": (D,),
            f"model.layers.{n}.mlp.gate_proj.weight": (F, D),
            f"model.layers.{n}.mlp.up_proj.weight": (F, D),
            f"model.layers.{n}.mlp.down_proj.weight": (D, F),
        }
    return shapes


def test_the_released_shape_on_the_meta_device():
    config = PLTConfig(
        vocab_size=76800,
        head_dim=128,
        plt_num_loops=2,
        plt_window_size=[64, 0],
        plt_emb_scale=0.707,
        plt_hidden_scale=0.053,
        plt_gate_use_hidden_states=True,
        torch_dtype="bfloat16",
    )
    with torch.device("meta"):
        model = PLTForCausalLM(config)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == released_shapes()
    assert sum(p.numel() for p in model.parameters()) == 7_615_749_680  # "7.6B"
