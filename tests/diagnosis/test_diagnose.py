"""diagnose() against a slow, plain reimplementation in float64, on padded and packed rows; memory; errors."""

import json
import math

import numpy as np
import pytest
import torch

import parloop
from parloop.diagnosis import Diagnosis
from parloop.diagnosis import attention as attention_module
from parloop.diagnosis import diagnosis as module
from parloop.diagnosis.lenses import LENSES
from parloop.errors import DiagnosisError
from parloop.model.reference import reference_forward
from tests.helpers.models import random_ids, tiny_config, tiny_model


def rotate(x, theta):
    """RoPE of x [T, K], by its definition, pairs (i, i + K/2)."""
    T, K = x.shape
    out = torch.empty_like(x)
    for p in range(T):
        for i in range(K // 2):
            angle = p * (1 / torch.tensor(theta) ** (torch.tensor(2 * i) / K)).item()  # frequencies are float32
            a, b = x[p, i], x[p, i + K // 2]
            out[p, i] = a * math.cos(angle) - b * math.sin(angle)
            out[p, i + K // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def plain_loops(model, ids, R):
    """States h_0 .. h_R [T, D], and per loop and layer the distributions [H, T, T] and gates [H, T], one number at a time."""
    c = model.config
    m, T, H, G, w = model.model, len(ids), c.num_attention_heads, c.num_key_value_heads, c.window_tokens
    theta = c.rope_parameters["rope_theta"]
    e = m.embed_tokens(ids)
    states, maps, gates = [e], [], []
    shared: list = []
    for loop in range(R):
        x = e if loop == 0 else c.plt_emb_scale * e + c.plt_hidden_scale * torch.cat([0 * e[:1], states[-1][:-1]])
        maps.append([])
        gates.append([])
        for layer in m.layers:
            a = layer.self_attn
            n = layer.input_layernorm(x)
            q = [rotate(z, theta) for z in a.q_proj(n).view(T, H, -1).unbind(1)]
            k = [rotate(z, theta) for z in a.k_proj(n).view(T, G, -1).unbind(1)]
            v = a.v_proj(n).view(T, G, -1).unbind(1)
            if loop == 0:
                shared.append((k, v))
                g = torch.ones(H, T, dtype=x.dtype)
            else:
                g = (a.plt_gate.gate_norm(x) @ a.plt_gate.weight.T + a.plt_gate.bias).sigmoid().T
            k1, v1 = shared[a.layer_idx]
            mixture, heads = torch.zeros(H, T, T, dtype=x.dtype), []
            for h in range(H):
                kv = h // (H // G)
                out = torch.zeros(T, v[0].shape[-1], dtype=x.dtype)
                for i in range(T):
                    scale = q[h].shape[-1] ** -0.5
                    wide = torch.softmax(k1[kv][: i + 1] @ q[h][i] * scale, 0)
                    mixture[h, i, : i + 1] = g[h, i] * wide
                    out[i] = g[h, i] * (wide @ v1[kv][: i + 1])
                    if loop > 0:
                        first = max(0, i - w)
                        near = torch.softmax(k[kv][first : i + 1] @ q[h][i] * scale, 0)
                        mixture[h, i, first : i + 1] += (1 - g[h, i]) * near
                        out[i] += (1 - g[h, i]) * (near @ v[kv][first : i + 1])
                heads.append(out)
            maps[-1].append(mixture)
            gates[-1].append(g)
            x = x + a.o_proj(torch.cat(heads, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        states.append(m.norm(x))
    return states, maps, gates


def spread(sigma):
    p = sigma / sigma.sum()
    p = p[p > 0]
    return math.exp(-(p * p.log()).sum())


@torch.no_grad()
def plain_lenses(model, ids, R):
    """lens -> list over loops, of one text, straight from the definitions."""
    states, maps, gates = plain_loops(model, ids, R + 1)
    T, V = len(ids), model.config.vocab_size
    p = [model.lm_head(h).softmax(-1) for h in states]
    out = {name: [math.nan] * R for name in LENSES}

    def kl(a, b):
        return sum((x * (x / y).log()).item() for x, y in zip(a, b) if x > 0)

    def cosine(x, y):
        return 0.0 if min(x.norm(), y.norm()) < 1e-5 else ((x @ y) / x.norm() / y.norm()).item()

    shift = {}
    for r in range(1, R + 1):
        h, before, after = states[r], states[r - 1], states[r + 1]
        i = r - 1
        out["step_size"][i] = np.mean([(h[t] - before[t]).norm().item() for t in range(T)])
        out["fixed_point_gap"][i] = np.mean([(h[t] - after[t]).norm().item() for t in range(T)])
        rows = torch.stack([h[t] / h[t].pow(2).mean().sqrt() for t in range(T)])
        out["effective_rank"][i] = spread(torch.linalg.svd(rows).S)
        entropies, diversities, similar = [], [], []
        for a in maps[i]:
            for t in range(T):
                entropies += [-(x[x > 0] * x[x > 0].log()).sum().item() for x in a[:, t]]
                diversities.append(spread(torch.linalg.svd(a[:, t]).S))
                pairs = [(j, k) for j in range(len(a)) for k in range(len(a)) if j != k]
                similar += [torch.cosine_similarity(a[j, t], a[k, t], dim=0).item() for j, k in pairs]
        out["attention_entropy"][i] = np.mean(entropies)
        out["head_diversity"][i] = np.mean(diversities)
        out["head_similarity"][i] = np.mean(similar)
        out["output_entropy"][i] = np.mean([-(p[r][t] * p[r][t].log()).sum().item() for t in range(T)])
        out["loss"][i] = np.mean([-p[r][t, ids[t + 1]].log().item() for t in range(T - 1)])
        ranks = [1 + sum((p[r][t, v] > p[r][t, ids[t + 1]]).item() for v in range(V)) for t in range(T - 1)]
        out["token_rank"][i] = np.median(ranks)
        if r >= 2:
            steps = [(h[t] - before[t], before[t] - states[r - 2][t]) for t in range(T)]
            out["angular_change"][i] = np.mean([cosine(x, y) for x, y in steps])
            out["offset_cost"][i] = np.mean([(before[t] - before[t - 1]).norm().item() for t in range(1, T)])
            out["gate"][i] = np.mean([g.mean().item() for g in gates[i]])
            pairs = zip(maps[i], maps[i - 1])
            out["attention_kl"][i] = np.mean(
                [kl(a[j, t], b[j, t]) for a, b in pairs for j in range(len(a)) for t in range(T)]
            )
            shift[r] = [kl(p[r][t], p[r - 1][t]) for t in range(T)]
            out["output_shift"][i] = np.mean(shift[r])
    if R >= 2:
        for r in range(2, R + 1):
            out["share_output_shift"][r - 1] = out["output_shift"][r - 1] / sum(out["output_shift"][1:])
            out["share_attention_kl"][r - 1] = out["attention_kl"][r - 1] / sum(out["attention_kl"][1:])
            won = [max(shift, key=lambda n: shift[n][t]) == r for t in range(T)]
            out["share_tokens"][r - 1] = np.mean(won)
    extra = np.mean([-p[R + 1][t, ids[t + 1]].log().item() for t in range(T - 1)])
    return out, extra


def same(values, expected, rtol=1e-7):
    np.testing.assert_allclose(np.array(values, dtype=float), np.array(expected, dtype=float), rtol=rtol)


TEXTS = [random_ids(13, seed=1), random_ids(9, seed=2), random_ids(11, seed=3)]


@pytest.mark.parametrize("R", [1, 2, 3])
@pytest.mark.parametrize("w", [0, 3])
def test_against_a_plain_reimplementation_on_padded_rows(R, w, monkeypatch):
    """Blocks of a few queries and tokens, so that their seams are tested too."""
    monkeypatch.setattr(attention_module, "BLOCK_BYTES", 4 * 3 * 4 * 13 * 4)
    monkeypatch.setattr(module, "LOGIT_BYTES", 5 * 3 * 61 * 4)
    model = tiny_model(plt_num_loops=3, plt_window_size=[w, 0])
    ids = torch.zeros(3, 13, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(TEXTS):
        place = slice(13 - len(text), 13) if row == 1 else slice(0, len(text))  # one padded on the left
        ids[row, place], mask[row, place] = text, 1
    seen = parloop.diagnose(model, [{"input_ids": ids, "attention_mask": mask}], num_loops=R)
    for row, text in enumerate(TEXTS):
        expected, extra = plain_lenses(model, text, R)
        for name in LENSES:
            same(seen.values[name][row], expected[name])
        same(seen.one_more_loss[row], extra)
    assert seen.tokens.tolist() == [13, 9, 11]


@torch.no_grad()
def test_the_plain_reimplementation_is_the_reference():
    model = tiny_model(plt_num_loops=3)
    states, _, _ = plain_loops(model, TEXTS[0], 3)
    _, logits = reference_forward(model.state_dict(), model.config.to_diff_dict(), TEXTS[0])
    torch.testing.assert_close(model.lm_head(states[-1]), logits[-1], rtol=1e-8, atol=1e-8)


def test_packed_rows_count_documents_apart():
    """Two documents in a row: sums over tokens are those of the documents alone; no neighbour crosses the border."""
    model = tiny_model(plt_num_loops=3)
    first, second = TEXTS[0], TEXTS[2]
    ids = torch.cat([first, second])[None]
    positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))])[None]
    packed = parloop.diagnose(model, [{"input_ids": ids, "position_ids": positions}])
    alone = [parloop.diagnose(model, [{"input_ids": text[None]}]) for text in (first, second)]
    by_token = ("step_size", "angular_change", "attention_entropy", "attention_kl", "head_diversity", "gate", "output_shift")
    for name in by_token:
        expected = (alone[0].values[name] * len(first) + alone[1].values[name] * len(second)) / ids.shape[1]
        same(packed.values[name], expected)
    for name in ("offset_cost", "loss"):
        expected = (alone[0].values[name] * (len(first) - 1) + alone[1].values[name] * (len(second) - 1)) / (
            ids.shape[1] - 2
        )
        same(packed.values[name], expected)


def test_maps_agree_with_their_means_and_batches_do_not_matter():
    model = tiny_model(plt_num_loops=3)
    whole = parloop.diagnose(model, [{"input_ids": random_ids(4, 16)}])
    parts = parloop.diagnose(model, [{"input_ids": rows} for rows in random_ids(4, 16).split(1)])
    for name in LENSES:
        same(parts.values[name], whole.values[name])
    same(parts.head_cosines, whole.head_cosines)
    same(whole.gate_by_head[1:].mean((1, 2)), whole.values["gate"].mean(0)[1:])
    same(whole.by_layer["attention_kl"][1:].mean(1), whole.values["attention_kl"].mean(0)[1:])
    H = whole.head_cosines.shape[-1]
    off = (whole.head_cosines.sum((1, 2)) - H) / (H * (H - 1))
    same(off, whole.values["head_similarity"].mean(0))


def test_attention_backends_agree_and_none_is_changed():
    ids = random_ids(2, 20)
    seen = []
    for backend in ("sdpa", "eager"):
        model = tiny_model(attn=backend)
        seen.append(parloop.diagnose(model, [{"input_ids": ids}]))
        assert model.config._attn_implementation == backend
        assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)
    for name in LENSES:
        same(seen[0].values[name], seen[1].values[name])


def test_checkpoints_without_a_norm_per_loop_and_with_query_gates():
    model = tiny_model(plt_num_loops=2, plt_normalize_per_loop=False, plt_gate_use_hidden_states=False)
    seen = parloop.diagnose(model, [{"input_ids": random_ids(2, 20)}])
    with torch.no_grad():
        ids = random_ids(2, 20)
        loss = [model(row[None], labels=row[None]).loss.item() for row in ids]
    same(seen.values["loss"][:, 1], loss, rtol=1e-6)  # the loss of transformers is float32


def test_bfloat16_is_close():
    ids = random_ids(3, 24)
    exact = parloop.diagnose(tiny_model(), [{"input_ids": ids}])
    rough = parloop.diagnose(tiny_model(dtype=torch.bfloat16), [{"input_ids": ids}])
    for name in ("step_size", "effective_rank", "attention_entropy", "gate", "loss"):
        np.testing.assert_allclose(rough.values[name], exact.values[name], rtol=0.05)


def test_json_round_trip_keeps_every_value():
    seen = parloop.diagnose(tiny_model(plt_num_loops=3), [{"input_ids": random_ids(3, 12)}])
    again = Diagnosis.from_dict(json.loads(json.dumps(seen.to_dict(), allow_nan=False)))
    for name in LENSES:
        np.testing.assert_array_equal(again.values[name], seen.values[name])
    np.testing.assert_array_equal(again.gate_by_head, seen.gate_by_head)
    assert again.summary() == seen.summary()
    assert seen.summary()["angular_change"][0] is None
    assert seen.mean("loss", 3).low < seen.mean("loss", 3).value < seen.mean("loss", 3).high


def test_intervals_cover_samples_and_changes_are_paired():
    seen = parloop.diagnose(tiny_model(), [{"input_ids": random_ids(12, 16)}])
    loss = seen.values["loss"]
    change = seen.change("loss", 2)
    assert change.value == pytest.approx((loss[:, 1] - loss[:, 0]).mean())
    assert change.low < change.value < change.high
    one = parloop.diagnose(tiny_model(), [{"input_ids": random_ids(1, 16)}])
    assert math.isnan(one.mean("loss", 1).low)


def test_memory_of_attention_does_not_grow_with_the_square_of_the_length():
    """The largest tensor of a diagnosis, at two lengths: blocks keep it bounded."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    self.bytes = max(self.bytes, tensor.nbytes)
            return out

    model = tiny_model(dtype=torch.float32, max_position_embeddings=2048)
    old = attention_module.BLOCK_BYTES
    attention_module.BLOCK_BYTES = 2**18
    try:
        sizes = []
        for length in (256, 1024):
            with Largest() as largest:
                parloop.diagnose(model, [{"input_ids": random_ids(1, length)}])
            sizes.append(largest.bytes)
    finally:
        attention_module.BLOCK_BYTES = old
    assert sizes[1] <= 4.5 * sizes[0]
    assert sizes[1] < 4 * 1024 * 1024 * 4  # less than one H x T x T map


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no samples"),
        ([{"input_ids": random_ids(2, 1)}], "at least two tokens"),
        ([{"input_ids": random_ids(1, 300)}], "--length 256"),
        (
            [{"input_ids": random_ids(2, 4), "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]])}],
            "two neighbouring",
        ),
    ],
)
def test_impossible_samples_are_refused(batches, message):
    with pytest.raises(DiagnosisError, match=message):
        parloop.diagnose(tiny_model(), batches)


def test_other_models_and_loop_counts_are_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    )
    with pytest.raises(DiagnosisError, match="LlamaForCausalLM is not a PLTForCausalLM"):
        parloop.diagnose(llama, [{"input_ids": random_ids(1, 4)}])
    with pytest.raises(DiagnosisError, match="num_loops=0"):
        parloop.diagnose(tiny_model(), [{"input_ids": random_ids(1, 4)}], num_loops=0)


def test_one_loop_needs_no_gates():
    model = parloop.PLTForCausalLM(tiny_config(plt_num_loops=1)).double()
    seen = parloop.diagnose(model, [{"input_ids": random_ids(2, 12)}])
    assert seen.loops == 1
    assert seen.summary()["gate"] == [None]
    assert seen.summary()["loss"][0] is not None


def test_adapters_are_looked_through():
    """An adapter that changes the model changes the diagnosis; the wrapper itself is no obstacle."""
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    model, batches = tiny_model(dtype=torch.float32), [{"input_ids": random_ids(2, 12)}]
    plain = parloop.diagnose(model, batches)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    seen = parloop.diagnose(adapted, batches)
    assert np.abs(seen.values["loss"] - plain.values["loss"]).max() > 1e-3
    with adapted.disable_adapter():
        np.testing.assert_allclose(parloop.diagnose(adapted, batches).values["loss"], plain.values["loss"], rtol=1e-5)
    prompt = get_peft_model(tiny_model(dtype=torch.float32), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(DiagnosisError, match="learns a prompt"):
        parloop.diagnose(prompt, batches)


@pytest.mark.parametrize("n", [True, 2.0, "2", np.bool_(True)])
def test_what_is_no_loop_count(n):
    with pytest.raises(DiagnosisError, match=r"num_loops=.* must be an integer of at least 1"):
        parloop.diagnose(tiny_model(), [{"input_ids": random_ids(1, 4)}], num_loops=n)
    assert parloop.diagnose(tiny_model(), [{"input_ids": random_ids(1, 4)}], num_loops=np.int64(3)).loops == 3


def test_loops_that_there_are_not_are_no_loops():
    """Python's indices would count them from the end: loop 0 as loop R."""
    seen = parloop.diagnose(tiny_model(plt_num_loops=3), [{"input_ids": random_ids(4, 12)}])
    for loop in (0, -1, 4, 10**6, 1.0, True, "2", None):
        with pytest.raises(DiagnosisError, match=rf"^loop={loop!r} is not a loop of this diagnosis: there are 1 to 3\.$"):
            seen.mean("loss", loop)
    for since in (0, -2, 4):
        with pytest.raises(DiagnosisError, match=rf"^since={since} is no loop .* 1 to 3"):
            seen.change("loss", 3, since=since)
    with pytest.raises(DiagnosisError, match=r"loop=1 has no loop before it: name another one, since="):
        seen.change("loss", 1)
    with pytest.raises(DiagnosisError, match="loop=4 is no loop"):
        seen.change("loss", 4)
    assert seen.change("loss", 1, since=3).value == pytest.approx(-seen.change("loss", 3, since=1).value)
    assert seen.mean("loss", np.int64(2)).as_list() == seen.mean("loss", 2).as_list()
    one = parloop.diagnose(tiny_model(plt_num_loops=1), [{"input_ids": random_ids(4, 12)}])
    with pytest.raises(DiagnosisError, match=r"loop=2 is not a loop of this diagnosis: there are 1\."):
        one.mean("loss", 2)


def test_lenses_that_there_are_not():
    seen = parloop.diagnose(tiny_model(), [{"input_ids": random_ids(4, 12)}])
    with pytest.raises(DiagnosisError, match="there is no lens 'output_shfit': did you mean 'output_shift'"):
        seen.mean("output_shfit", 2)
    with pytest.raises(DiagnosisError, match=r"there is no lens 'xyzzy': there are step_size, .* share_tokens"):
        seen.change("xyzzy", 2)


def test_a_change_since_a_loop_that_a_lens_does_not_exist_for_is_nan():
    seen = parloop.diagnose(tiny_model(), [{"input_ids": random_ids(4, 12)}])
    assert np.isnan(seen.change("output_shift", 2).as_list()).all()
    assert np.isnan(seen.mean("output_shift", 1).as_list()).all()
