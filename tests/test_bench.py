"""The bench at tiny size: it runs, its numbers are all there and refer to what they say. Never how long anything took."""

import copy
import math
import os
import shutil
import subprocess
import sys
from unittest.mock import ANY

import pytest
import torch
from rich.console import Console
from torch._dynamo.utils import counters
from transformers import CompileConfig
from transformers.cache_utils import StaticCache

from parloop import PLTForCausalLM, cache_bytes, make_cache
from parloop.bench import BenchResult, bench, measure, models, run_bench, settings
from parloop.bench.measure import Block, expected_cache_bytes, fill_cache
from parloop.bench.report import draw, write_report
from parloop.bench.variants import PASS_PER_LOOP, Variant, decode_variants
from parloop.checkpoints import load_model
from parloop.errors import BenchError, CheckpointError, OutputError
from parloop.folder import BENCH, claimed
from parloop.quantize.quantization import quantize
from parloop.timing import Spread
from tests.helpers.models import tiny_config, tiny_model

QUIET = Console(quiet=True)
TINY = {
    "shape": "tiny",
    "loops": [1, 2, 3],
    "contexts": [6, 40],
    "batch_sizes": [1, 2],
    "prefill_lengths": [33],
    "steps": 3,
    "repeats": 2,
    "device": "cpu",
    "threads": 1,
    "read_bytes": 2**16,
    "console": QUIET,
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return folder, run_bench(**TINY, output=folder, command="parloop bench")


def is_spread(value):
    return 0 < value.low <= value.median <= value.high < math.inf


def test_results_are_complete(measured):
    _, result = measured
    assert result.settings.loops == (1, 2, 3)
    assert result.environment["threads"] == 1
    assert result.model["parameters"] == 107_464
    assert all(value > 0 for value in result.read_bandwidth.values())
    assert result.skipped == []
    assert result.commands == ["parloop bench"]
    blocks = [(block.phase, block.batch_size, block.tokens) for block in result.blocks]
    assert blocks == [("decode", b, n) for b in (1, 2) for n in (6, 40)] + [("prefill", b, 33) for b in (1, 2)]
    for block in result.blocks:
        decode = block.phase == "decode"
        assert block.context_range == ([block.tokens + 1, block.tokens + 3] if decode else None)
        assert is_spread(block.read_bytes_per_second)
        labels = [row.label for row in block.rows]
        others = ", pass per loop" if decode else ", whole prompt"
        assert labels == ["Llama", "R = 1", "R = 2", "R = 3", "R = 2" + others, "R = 3" + others]
        for row in block.rows:
            assert all(map(is_spread, (row.ms, row.over_one_loop, row.over_llama)))
            of_decode = row.weight_bytes, row.weight_bytes_per_second, row.bandwidth_share
            assert all(value is None for value in of_decode) or decode
            assert not decode or (row.weight_bytes > 0 and all(map(is_spread, of_decode[1:])))
            assert len(row.ms_rounds) == 2
            assert row.kind == PASS_PER_LOOP or row.variant.one_pass
            assert row.cache.over_formula == 1
            assert row.peak_bytes > 0
        rows = {row.label: row for row in block.rows}
        assert rows["R = 1"].over_one_loop == Spread(1, 1, 1)
        ratios = [a / b for a, b in zip(rows["R = 3"].ms_rounds, rows["R = 1"].ms_rounds)]
        assert rows["R = 3"].over_one_loop.median == pytest.approx(sum(ratios) / 2)


def test_quantised_weights_are_lines_beside_the_plain_ones(tmp_path, monkeypatch):
    """Compared with one loop on the same weights, and with the plain weights at the same loop count."""
    seconds = iter(range(1, 10_000))
    monkeypatch.setattr(measure, "timer", lambda: 1e-6 * next(seconds) ** 2)  # no two lines take equally long
    changes = {"loops": [1, 2], "contexts": [6], "batch_sizes": [1], "repeats": 1, "weights": ["bf16", "int8", "int4+head"]}
    result = run_bench(**(TINY | changes), output=tmp_path)
    assert result.settings.weights == ("int8", "int4+head")
    for block in result.blocks:
        ms = {row.label: row.ms.median for row in block.rows}
        own = [f"R = {n}, {name}" for name in ("int8", "int4+head") for n in (1, 2)]
        assert list(ms)[-4:] == own
        for row in block.rows:
            plain, _, packed = row.label.partition(", int")
            assert (row.over_plain is not None) == bool(packed)
            if packed:
                assert row.over_plain.median == pytest.approx(ms[row.label] / ms[plain])
                assert row.over_one_loop.median == pytest.approx(ms[row.label] / ms[f"R = 1, int{packed}"])
    (decode,) = (block for block in result.blocks if block.phase == "decode")
    read = {row.label: row.weight_bytes for row in decode.rows}
    assert read["R = 1, int4+head"] < read["R = 1, int8"] < read["R = 1"]
    text = result.format(100)
    assert "…" not in text
    assert "over plain weights" in " ".join(text.split())
    assert BenchResult.load(tmp_path) == result


@pytest.mark.parametrize("weights", ["int8", "int4", "int4+head"])
def test_quantised_twins_hold_what_parloop_quantize_writes(weights, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": 64, "attention_bias": True}
    model = tiny_model(dtype=torch.bfloat16, **sizes)
    model.save_pretrained(tmp_path / "plain")
    quantize(tmp_path / "plain", tmp_path / "packed", bits=int(weights[3]), head="head" in weights)
    expected, state = load_model(tmp_path / "packed", "cpu").state_dict(), models.packed_twin(model, weights).state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    shared = [name for name in state if "weight_" not in name]
    assert all(state[name].data_ptr() == model.state_dict()[name].data_ptr() for name in shared)


def test_weights_that_cannot_be_measured(tmp_path):
    for changes, message in (
        ({"weights": ["int3"]}, "--weights 'int3' is unknown: use some of bf16, int8"),
        ({"weights": ["int4"], "dtype": "float32"}, "--weights int4 with --dtype float32.*bfloat16 only"),
    ):
        with pytest.raises(BenchError, match=message):
            run_bench(**(TINY | changes), output=tmp_path)
    with pytest.raises(BenchError, match="layers have 48 inputs, which groups of 32 weights do not divide"):
        models.packed_twin(tiny_model(dtype=torch.bfloat16), "int4")
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    quantize(tmp_path / "plain", tmp_path / "packed", bits=8)
    with pytest.raises(BenchError, match="is quantised already: leave --weights out"):
        models.build(str(tmp_path / "packed"), None, "bfloat16", torch.device("cpu"), ["int4"])


def test_the_result_is_in_the_folder_as_it_was_returned(measured):
    """With its figure, and without the command line."""
    folder, result = measured
    assert BenchResult.load(folder) == result
    assert BenchResult.load(folder).folder == result.folder == folder
    assert BenchResult.from_json(result.to_json()) == result
    assert (folder / "bench.png").stat().st_size > 5000


def test_tables_and_figure(measured):
    _, result = measured
    wide = copy.deepcopy(result)  # as of a large model on a slow machine
    for row in (row for block in wide.blocks for row in block.rows):
        row.ms, row.over_one_loop, row.peak_bytes = Spread(3210.9, 1234.5, 43210.9), Spread(12.3, 10.1, 23.4), 123e9
    for shown in (result, wide):
        text = shown.format()
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= 100
        assert "the scheme of the vendor's server, not their code" in text
        assert "compiled:" not in text
    figure = draw(result)
    figure.draw_without_rendering()
    for axes in figure.axes:  # legends lie on no data
        assert axes.get_legend().get_window_extent().y1 <= axes.xaxis.label.get_window_extent().y0
    ratios, times, _ = figure.axes
    assert [container.get_label() for container in ratios.containers] == [
        "6 tokens", "40 tokens", "6 tokens, batch 2", "40 tokens, batch 2", "a pass per loop (dotted)", *[ANY] * 3
    ]  # fmt: skip
    assert [line.get_label() for line in times.get_lines()] == ["Llama", "R = 1", "R = 2", "R = 3"]
    only = copy.deepcopy(result)
    only.blocks = [block for block in result.blocks if block.phase == "prefill"]
    assert [axes.get_title() for axes in draw(only).axes] == ["prefill"]
    assert "weights GB/s" not in only.legend()


def test_finished_blocks_are_kept(measured, tmp_path, monkeypatch):
    """Interrupted after two blocks, the run goes on with the third; other lengths join the folder."""
    calls, original = [], bench.measure_block

    def interrupted(settings, models, key, *args, **kwargs):
        calls.append(key)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(settings, models, key, *args, **kwargs)

    monkeypatch.setattr(bench, "measure_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_bench(**TINY, output=tmp_path)
    before = BenchResult.load(tmp_path).blocks
    assert len(before) == 2
    result = run_bench(**TINY, output=tmp_path)
    assert len(result.blocks) == len(calls) - 1 == 6
    assert all(block in result.blocks for block in before)
    assert len(run_bench(**TINY | {"contexts": [9]}, output=tmp_path).blocks) == 8
    calls.clear()
    assert len(run_bench(**TINY, output=tmp_path).blocks) == 8
    assert calls == []


def test_another_bench_is_refused_and_can_be_replaced(measured, tmp_path):
    less = TINY | {"contexts": [4], "prefill_lengths": [0], "batch_sizes": [1], "repeats": 1}
    run_bench(**less, output=tmp_path)
    with pytest.raises(BenchError, match=r"dtype was bfloat16, is float32.*--fresh"):
        run_bench(**less, dtype="float32", output=tmp_path)
    assert run_bench(**less, dtype="float32", output=tmp_path, fresh=True).settings.dtype == "float32"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"settings": {}, "environment": {}, "commands": [], "blocks": []}', "its format is 1, and this version of parloop reads 2"),
        ('{"format": 2, "settings": {"steps": "x"}, "environment": {}, "blocks": []}', "steps is 'x', not int"),
        ('{"format": 2, "environment": {}}', "it has no settings"),
    ],
)  # fmt: skip
def test_results_of_another_version_are_not_continued(tmp_path, content, why):
    less = TINY | {"contexts": [4], "prefill_lengths": [0], "batch_sizes": [1], "repeats": 1}
    with claimed(tmp_path, BENCH) as out:
        out.write("results.json", content)
    with pytest.raises(
        BenchError, match=rf"results.json is not from a bench \(.*{why}\): choose another --output, or --fresh"
    ):
        run_bench(**less, output=tmp_path)
    assert run_bench(**less, output=tmp_path, fresh=True).blocks


def test_static_caches_and_a_checkpoint(tmp_path):
    """With its own loop count, short texts, and default lengths cut to them."""
    tiny_model(plt_num_loops=2, dtype=torch.float32, max_position_embeddings=32).save_pretrained(tmp_path / "checkpoint")
    options = TINY | {"shape": None, "contexts": None, "prefill_lengths": None, "batch_sizes": [2], "repeats": 1}
    result = run_bench(str(tmp_path / "checkpoint"), **options, static=True, output=tmp_path / "out")
    assert [(block.phase, block.tokens) for block in result.blocks] == [("decode", 29), ("prefill", 32)]
    for row in (row for block in result.blocks for row in block.rows):
        assert row.cache.over_formula == 1
        assert row.cache.storage_bytes == row.cache.bytes


def test_compiled_decoding(tmp_path, monkeypatch):
    """Compiled lines are compared with each other, and everything is compiled while warming up."""
    monkeypatch.setattr(measure, "CompileConfig", lambda: CompileConfig(backend="eager", mode=None))
    graphs, original = [], Block.run
    monkeypatch.setattr(Block, "run", lambda *args: (original(*args), graphs.append(counters["stats"]["unique_graphs"]))[0])
    options = TINY | {"loops": [2, 3], "contexts": [4, 20], "batch_sizes": [1], "prefill_lengths": [0]}
    result = run_bench(**options, compile=True, output=tmp_path)
    runs = len(result.blocks[0].rows)
    assert graphs[runs - 1] == graphs[3 * runs - 1]
    assert graphs[4 * runs - 1] == graphs[6 * runs - 1]
    for block in result.blocks:
        rows = {row.label: row for row in block.rows}
        assert {label for label in rows if "compiled" in label} == {
            f"{name}, compiled" for name in ("Llama", "R = 1", "R = 2", "R = 3")
        }
        ratios = [a / b for a, b in zip(rows["R = 2, compiled"].ms_rounds, rows["R = 1, compiled"].ms_rounds)]
        assert rows["R = 2, compiled"].over_one_loop.median == pytest.approx(sum(ratios) / 2)
    assert "compiled:" in result.legend()
    assert "compiled (dashed)" in [container.get_label() for container in draw(result).axes[0].containers]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": "7b"}, "'7b' is unknown: use one of 600m, loopcoder-v2, tiny"),
        ({"checkpoint": "some/where"}, r"both a checkpoint \(some/where\) and --shape tiny"),
        ({"loops": [0, 2]}, "--loops 0 must be at least 1"),
        ({"contexts": [4096]}, "--contexts 4096 and 3 --steps are more than the 2048 tokens.*at most 2045"),
        ({"prefill_lengths": [2049]}, "--prefill-lengths 2049 are more than the 2048 tokens.*at most 2048"),
        ({"contexts": [-1]}, "--contexts -1 must be at least 2"),
        ({"contexts": [0], "prefill_lengths": [0]}, "nothing to measure"),
        ({"batch_sizes": [0]}, "--batch-sizes 0 must be at least 1"),
        ({"steps": 0}, "--steps 0 must be at least 1"),
        ({"threads": 0}, "--threads 0 must be at least 1"),
        ({"threads": 10**30}, "--threads 10+ must be at least 1, and below"),
        ({"dtype": "int8"}, "'int8' is unknown: use one of bfloat16"),
        ({"device": "x"}, "device='x' is not available"),
    ],
)
def test_impossible_settings(tmp_path, change, message):
    with pytest.raises((BenchError, CheckpointError), match=message):
        run_bench(**TINY | change, output=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"settings": 3}', "[" * 50_000], ids=lambda text: text[:4])
def test_results_that_are_no_benchs(tmp_path, content):
    with claimed(tmp_path, BENCH) as out:
        out.write("results.json", content)
    with pytest.raises(BenchError, match=r"results.json is not from a bench .*: choose another --output, or --fresh"):
        run_bench(**TINY, output=tmp_path)
    assert (tmp_path / "results.json").read_text() == content


def test_what_is_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        run_bench(**TINY | {"shape": None, "checkpoint": str(tmp_path)}, output=tmp_path)


def test_too_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "available_bytes", lambda device: 10**6)
    with pytest.raises(BenchError, match=r"shape 'tiny' needs 0\.5 GB: .* 0\.0 GB are free on cpu"):
        run_bench(**TINY, output=tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(settings, "available_bytes", lambda device: 600_000)
    result = run_bench(**TINY | {"contexts": [2, 2000], "prefill_lengths": [0], "batch_sizes": [1]}, output=tmp_path)
    assert [block.tokens for block in result.blocks] == [2]
    assert [(skipped.tokens, skipped.reason[:14]) for skipped in result.skipped] == [(2000, "it needs about")]


def test_the_released_shape():
    config = models.config_of(None, "loopcoder-v2", 2)
    assert sum(p.numel() for p in models.on_meta(config, torch.bfloat16).parameters()) == 7_615_749_680
    assert config.rope_parameters["rope_theta"] == 500000


def test_random_weights_and_the_twin_share_memory_and_agree():
    """Llama's logits are those of one loop; nothing is left as it came from the meta device."""
    model = models.random_model(tiny_config(plt_num_loops=3), torch.float32, torch.device("cpu"))
    llama = models.llama_twin(model)
    weights = dict(model.named_parameters())
    for name, parameter in llama.named_parameters():
        assert parameter.data_ptr() == weights[name].data_ptr()
    proper = PLTForCausalLM(tiny_config())
    assert torch.equal(model.model.rotary_emb.inv_freq, proper.model.rotary_emb.inv_freq)
    ids = torch.randint(61, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(ids, num_loops=1).logits, llama(ids).logits, atol=1e-6, rtol=1e-5)
    assert (
        models.random_model(tiny_config(), torch.bfloat16, torch.device("cpu")).model.rotary_emb.inv_freq.dtype
        == torch.float32
    )


@pytest.mark.parametrize("tied", [False, True])
def test_tied_heads(tied):
    config = tiny_config(tie_word_embeddings=tied)
    llama = models.llama_twin(PLTForCausalLM(config).eval())
    assert (llama.lm_head.weight.data_ptr() == llama.model.embed_tokens.weight.data_ptr()) == tied


def test_one_loop_computes_no_gate():
    model, calls = tiny_model(plt_num_loops=3), []
    for layer in model.model.layers:
        layer.self_attn.plt_gate.register_forward_hook(lambda *args: calls.append(args))
    for steps in (0, 2):  # prefill, decode
        block = Block({"plt": model}, 12, 1, steps, static=False)
        block.run(Variant(1))
        assert calls == []
        block.run(Variant(2))
        assert calls != []
        calls.clear()


def test_bytes_of_weights_that_a_step_reads():
    model = tiny_model(plt_num_loops=3, dtype=torch.float32)
    L, D, V, F, H, K, G, size = 2, 32, 61, 48, 4, 8, 2, 4
    stack = L * (2 * D * H * K + 2 * D * G * K + 3 * D * F + 2 * D) + D
    gates = L * (H * D + H + D)
    for loops, passes, expected in ((1, 1, stack), (3, 1, stack + gates), (3, 3, 3 * stack + 2 * gates)):
        assert models.bytes_read(model, loops, 5, passes) == size * (expected + V * D + 5 * D)


@pytest.mark.parametrize("w", [0, 4])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("R", [1, 2, 3])
def test_a_filled_cache_is_like_one_after_a_prefill(R, static, w):
    """After a step: the same layers, shapes, strides, lengths and bytes, whether S is below or above the window."""
    model = tiny_model(plt_num_loops=3, plt_window_size=[w, 0])
    for S in (1, 2, 4, 5, 6, 30):
        caches = [make_cache(model.config, R, S + 1 if static else None) for _ in range(2)]
        k, v, carry = torch.randn(2, 2, S, 8), torch.randn(2, 2, S, 8), torch.randn(2, 32, 1)
        fill_cache(caches[0], model.config, R, k.double(), v.double(), carry.double())
        with torch.no_grad():
            model(torch.ones(2, S, dtype=int), past_key_values=caches[1], num_loops=R)
            for cache in caches:
                model(torch.ones(2, 1, dtype=int), past_key_values=cache, num_loops=R)
        described = []
        for cache in caches:
            layers = []
            for layer in cache.layers:
                tensors = [getattr(layer, "keys", None), *getattr(layer, "conv_states", {}).values()]
                shapes = [(t.shape, t.stride(), t.dtype) for t in tensors if t is not None]
                layers.append(
                    (type(layer), shapes, int(layer.get_seq_length()) if hasattr(layer, "get_seq_length") else None)
                )
            described.append((layers, cache_bytes(cache)))
        assert described[0] == described[1]
        expected = expected_cache_bytes(model.config, R, 2, S + 1, 8, static)
        assert cache_bytes(caches[0]) == expected
        pointers = [t.data_ptr() for layer in caches[0].layers[:2] for t in (layer.keys, layer.values)]
        assert len(set(pointers)) == 4  # layers sharing memory would be read faster


def test_static_caches_of_all_loop_counts_share_loop_one():
    """A large model has no room for one full cache per variant; a Llama keeps its own, a stock one."""
    model = tiny_model(plt_num_loops=3, dtype=torch.float32)
    block = Block({"plt": model, "llama": models.llama_twin(model)}, 12, 1, 2, static=True)
    for variant in decode_variants([1, 2, 3], True, False):
        for _ in range(2):
            _, cache = block.run(variant)
            assert int(cache.get_seq_length()) == 14
    assert len(block.held) == 4
    assert len({cache.layers[0].keys.data_ptr() for cache in block.held.values()}) == 2
    assert type(block.held[True, 1]) is StaticCache


def test_the_command_line(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "100"}

    def parloop(*arguments):
        command = [sys.executable, "-m", "parloop", "bench", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=240)

    lengths = ["--contexts", "8", "--prefill-lengths", "16", "--steps", "2", "--repeats", "1", "--threads", "1"]
    done = parloop("--shape", "tiny", "--loops", "1", "2", *lengths)
    assert done.returncode == 0, done.stderr
    assert "results: runs/bench-tiny/results.json, runs/bench-tiny/bench.png" in done.stdout
    assert (tmp_path / "runs/bench-tiny/bench.png").exists()
    assert "the scheme of the vendor's server, not their code" in done.stdout
    done = parloop("--shape", "tiny", "--contexts", "5000")
    assert done.returncode == 2
    assert "more than the 2048 tokens this model was made for" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["results.json", "bench.png", "thesis.tex"])
def test_a_folder_of_somebody_else_is_refused_before_anything_is_measured(tmp_path, monkeypatch, name, fresh):
    monkeypatch.setattr(bench, "measure_all", None)
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(OutputError, match=rf"is not empty and holds no bench \({name}\): choose another folder"):
        run_bench(**TINY, output=tmp_path, fresh=fresh)
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{"mine": 1}']


def test_a_figure_that_was_changed_since_is_not_written_over(measured, tmp_path):
    shutil.copytree(measured[0], tmp_path / "bench")
    write_report(measured[1], tmp_path / "bench")
    write_report(measured[1], tmp_path / "bench")
    (tmp_path / "bench" / "bench.png").write_text("mine")
    with pytest.raises(OutputError, match=r"holds bench.png, which parloop did not write, or which was changed since"):
        run_bench(**TINY, output=tmp_path / "bench")
    assert (tmp_path / "bench" / "bench.png").read_text() == "mine"
