"""`parloop check`: right engines are called right, and each wrong port by what it lacks.

Wrong ports are the equations with a mechanism left out (oracle.py), served over HTTP with and without log-probabilities; and, so that not
everything hangs on one hand, transformers' model with a changed configuration or changed gates.
"""

import json
import threading
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from parloop import cli
from parloop.check import Answer, check, check_checkpoint, check_endpoint, write_probe
from parloop.check.check import MEANING, PROBE
from parloop.errors import ParloopError, PortCheckError
from tests.helpers.oracle import FAULTS, greedy

CONFIG = json.loads((PROBE / "config.json").read_text())
RECORDS = json.loads((PROBE / "answers.json").read_text())
WEIGHTS = {name: weight.double() for name, weight in load_file(PROBE / "model.safetensors").items()}
TOKENIZER = AutoTokenizer.from_pretrained(PROBE)


@lru_cache(None)
def oracle(prompt: str, tokens: int, faults: tuple = (), zero_carry_at: int | None = None, beginning: str = "") -> Answer:
    ids = TOKENIZER(beginning + prompt)["input_ids"]
    chosen, logprobs, _ = greedy(WEIGHTS, CONFIG, ids, tokens, faults, zero_carry_at)
    return Answer(TOKENIZER.decode(chosen), tuple(logprobs), len(ids))


class WrongPort(ThreadingHTTPServer):
    """An OpenAI server of the equations with faults.

    form: how it takes and gives log-probabilities: openai, mlx, none (refused) or ignored. reuse: with a zero carry, of "blocks" of 16
    tokens or of all "tokens" but the last; None: nothing is reused.
    """

    daemon_threads = True

    def __init__(self, faults=(), form="openai", reuse=None, beginning=""):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.form, self.reuse, self.beginning = faults, form, reuse, beginning
        self.seen: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def answer(self, prompt: str, tokens: int) -> Answer:
        zero = None
        if self.reuse is not None:
            shared = max((len_shared(prompt, text) for text in self.seen), default=0)
            at = min(shared, len(prompt) - 1)
            zero = (at // 16 * 16 if self.reuse == "blocks" else at) or None
        answer = oracle(prompt, tokens, self.faults, zero, self.beginning)
        self.seen.append(prompt + answer.text)
        return answer


def len_shared(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


class Handler(BaseHTTPRequestHandler):
    server: WrongPort

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        form, asked = self.server.form, body.get("logprobs")
        if body["model"] != "probe":
            return self.send(404, {"error": f"no model {body['model']}"})
        if asked is not None and (form == "none" or (form == "mlx") is not isinstance(asked, bool)) and form != "ignored":
            return self.send(400, {"error": f"logprobs={asked}"})
        answer = self.server.answer(body["prompt"], body["max_tokens"])
        choice = {"index": 0, "text": answer.text, "finish_reason": "length"}
        if asked and form == "openai":
            choice["logprobs"] = {"tokens": list(answer.text), "token_logprobs": list(answer.logprobs)}
        elif asked and form == "mlx":
            choice["logprobs"] = {"content": [{"logprob": value} for value in answer.logprobs]}
        return self.send(200, {"choices": [choice], "usage": {"prompt_tokens": answer.prompt_tokens}})

    def send(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())


def verdict_on(**server):
    running = WrongPort(**server)
    try:
        return check_endpoint(running.url, "probe")
    finally:
        running.shutdown()


@pytest.mark.parametrize("form", ["openai", "mlx", "none", "ignored"])
def test_the_equations_are_right_however_log_probabilities_are_given(form):
    verdict = verdict_on(form=form)
    assert verdict.right
    assert ("log-probabilities within" in verdict.details[0]) is (form in ("openai", "mlx"))


@pytest.mark.parametrize("form", ["openai", "none"])
@pytest.mark.parametrize("fault", FAULTS)
def test_each_missing_mechanism_is_named(fault, form):
    verdict = verdict_on(faults=(fault,), form=form)
    assert not verdict.right
    assert verdict.faults == (fault,)
    assert verdict.headline == MEANING[fault]


@pytest.mark.parametrize(
    "faults", [("no shift", "window one short"), ("no shift", "norm at the end"), ("window one long", "gates even"), ("gates exchanged", "no scales")]
)  # fmt: skip
def test_two_missing_mechanisms_are_both_named(faults):
    assert verdict_on(faults=faults, form="none").faults == faults


@pytest.mark.parametrize("form", ["openai", "none"])
@pytest.mark.parametrize("reuse", ["blocks", "tokens"])
def test_prefix_reuse_with_a_zero_carry_is_named(reuse, form):
    """Also when the same server is checked again, and nothing is new to it."""
    running = WrongPort(form=form, reuse=reuse)
    for _ in range(2):
        verdict = check_endpoint(running.url, "probe")
        assert not verdict.right
        assert verdict.faults == ("zero carry",)
        assert "prefix reuse with a zero carry" in verdict.headline
    running.shutdown()


def test_reuse_that_goes_wrong_otherwise_and_long_prompts_are_told_from_it():
    def forgets(prompt, tokens, seen=[]):  # noqa: B006
        seen.append(prompt)
        return oracle(prompt[-20:] if seen.count(prompt) > 1 else prompt, tokens)

    assert "in another way than a zero carry would" in check(forgets).headline
    assert "129 tokens is not" in check(lambda prompt, tokens: oracle(prompt[-100:], tokens)).headline


def test_a_prompt_with_a_token_more_is_said_to_be_one():
    verdict = verdict_on(beginning="Q")
    assert not verdict.right
    assert any("into 16 tokens" in detail and "token at the beginning" in detail for detail in verdict.details)


def rounded(levels: int) -> dict[str, torch.Tensor]:
    def of(weight):
        scale = weight.abs().amax(-1, keepdim=True).clamp_min(1e-9) / levels
        return (weight / scale).round() * scale if weight.dim() == 2 else weight

    return {name: of(weight) for name, weight in WEIGHTS.items()}


def shuffled() -> dict[str, torch.Tensor]:
    order = torch.Generator().manual_seed(0)
    return {name: weight[torch.randperm(len(weight), generator=order)] for name, weight in WEIGHTS.items()}


@pytest.mark.parametrize(
    ("weights", "right", "told"),
    [
        (rounded(127), True, "right"),
        (rounded(63), False, "close to the right model"),
        (shuffled(), False, "in none of the known ways"),
    ],
    ids=["8-bits", "7-bits", "other-weights"],
)
def test_rounded_weights_are_right_or_close_and_other_weights_are_unknown(weights, right, told):
    """No mechanism is blamed for what rounding did."""
    verdict = check(lambda prompt, tokens: ask(weights, prompt, tokens))
    assert (verdict.right, verdict.faults) == (right, ())
    assert told in verdict.headline


def ask(weights, prompt, tokens):
    chosen, logprobs, _ = greedy(weights, CONFIG, TOKENIZER(prompt)["input_ids"], tokens)
    return Answer(TOKENIZER.decode(chosen), tuple(logprobs))


# transformers' model, and what is made of it by a line in a configuration


def transformers_model(folder=PROBE, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()

    def complete(prompt: str, tokens: int) -> Answer:
        ids = TOKENIZER(prompt, return_tensors="pt")["input_ids"]
        made = model.generate(ids, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True, output_logits=True)
        chosen = made.sequences[0, ids.shape[1] :]
        logprobs = torch.cat(made.logits).float().log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        return Answer(TOKENIZER.decode(chosen), tuple(logprobs.tolist()), ids.shape[1])

    return complete


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_is_right_in_32_and_in_16_bits(dtype):
    assert check(transformers_model(dtype=dtype)).right


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"plt_num_loops": 1}, "one loop"),
        ({"plt_window_size": [3, 0]}, "window one short"),
        ({"plt_window_size": [5, 0]}, "window one long"),
        ({"plt_window_size": [200, 0]}, "no window"),
        ({"plt_normalize_per_loop": False}, "norm at the end"),
        ({"plt_emb_scale": None, "plt_hidden_scale": None}, "no scales"),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path, changes, fault):
    folder = write_probe(tmp_path / "wrong")
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    assert check(transformers_model(folder)).faults == (fault,)


@pytest.mark.parametrize(
    ("gate", "fault"),
    [
        ((0.0, 0.0), "gates even"),
        ((0.0, 30.0), "global only"),
        ((0.0, -30.0), "local only"),
        ((-1.0, None), "gates exchanged"),
    ],
)
def test_wrong_gates_are_named(tmp_path, gate, fault):
    """Gate weights times the first, biases the second (None: times the first too)."""
    folder = write_probe(tmp_path / "wrong")
    factor, bias = gate
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith("plt_gate.weight"):
            weights[name] = weights[name] * factor
        elif name.endswith("plt_gate.bias"):
            weights[name] = weights[name] * factor if bias is None else torch.full_like(weights[name], bias)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert check(transformers_model(folder)).faults == (fault,)


# The command


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.app(["check", *map(str, arguments)])
    return ended.value.code


def test_the_command_ends_with_0_for_a_right_server_and_1_for_a_wrong_one(capsys):
    for faults, code, told in (((), 0, "nothing is missing"), (("no shift",), 1, "no shift")):
        server = WrongPort(faults)
        assert run("--endpoint", server.url, "--model", "probe") == code
        assert told in capsys.readouterr().out
        server.shutdown()


def test_the_probe_is_written_to_be_converted(tmp_path):
    cli.app(["check", "--write", str(tmp_path / "probe")], result_action="return_value")
    assert check(transformers_model(tmp_path / "probe")).right
    with pytest.raises(PortCheckError, match="not empty"):
        write_probe(tmp_path / "probe")


def test_our_server_of_transformers_is_right(capsys):
    """`parloop check` alone starts the server of this machine, here transformers', and checks it over HTTP."""
    assert run("--engine", "transformers") == 0
    assert "right: nothing is missing" in capsys.readouterr().out


def test_what_cannot_be_checked_is_said(tmp_path):
    server = WrongPort()
    with pytest.raises(PortCheckError, match=r"404 .*no model other"):
        check_endpoint(server.url, "other")
    server.shutdown()
    server.server_close()
    with pytest.raises(PortCheckError, match="is the server there"):
        check_endpoint(server.url, "probe")
    for arguments in (
        ["--endpoint", "http://127.0.0.1:1/v1"],
        ["--model", "probe"],
        [str(tmp_path), "--endpoint", "u", "--model", "m"],
    ):
        with pytest.raises(ParloopError, match="together"):
            cli.app(["check", *arguments])
    with pytest.raises(PortCheckError, match=r"no config\.json"):
        check_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 65}))
    with pytest.raises(PortCheckError, match="not made from the probe"):
        check_checkpoint(tmp_path)


# The records


def test_records_are_what_the_equations_say():
    """The shipped answers of the right model and of each fault alone, computed anew; pairs differ from both of their faults."""
    for variant in RECORDS["variants"]:
        if len(variant["faults"]) < 2:
            for prompt, recorded in zip(RECORDS["prompts"], variant["answers"]):
                assert oracle(prompt, RECORDS["tokens"], tuple(variant["faults"])).text == recorded["text"]
    assert {tuple(variant["faults"]) for variant in RECORDS["variants"]} >= {(), *((name,) for name in FAULTS)}
    assert MEANING.keys() == FAULTS.keys()


def test_the_oracle_without_faults_is_the_reference():
    from parloop.model.reference import reference_forward
    from tests.helpers.oracle import wrong_logits

    ids = torch.tensor(TOKENIZER(RECORDS["again"][0]["prompt"])["input_ids"])
    torch.testing.assert_close(wrong_logits(WEIGHTS, CONFIG, ids), reference_forward(WEIGHTS, CONFIG, ids)[1][-1])


def test_the_probe_is_small():
    assert sum(path.stat().st_size for path in PROBE.iterdir()) < 300_000
