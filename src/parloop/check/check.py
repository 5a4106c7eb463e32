"""`parloop check`: compare a server's greedy answers with known ones.

The server runs a small checkpoint that we ship (probe/). Its answers are compared with those of the right model, and with those of models
that lack a mechanism or two. All are recorded in probe/answers.json (made by tests/check/make_probe.py, from the equations), so checking
needs no model here, and no torch.

The probe has two loops, a window of 4 tokens, random gates and norms far from 1, and one token per character. Its prompts were chosen for
right answers with wide margins: rounding to 16 bits does not change them, and every fault does.
"""

import json
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import PortCheckError

PROBE = Path(__file__).with_name("probe")
PARTS = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
ROUNDING = 0.1  # mean difference of log-probabilities that 16 bits can explain: bfloat16 gives 0.02 on the probe
NEAR = 0.6  # share of the tokens that a faulty model must explain to be named as the nearest
SECONDS = 120  # timeout of one answer

# Description of each fault in probe/answers.json, for the author of an engine.
MEANING = {
    "one loop": "one loop only: the stack runs once, as in a Llama",
    "no shift": "no shift: loop 2 reads the state of the same token, not of the one before",
    "shift by two": "the shift is done twice: loop 2 reads the state of two tokens before",
    "window one short": "window off by one: w keys, where the token itself and the w before it are w + 1",
    "window one long": "window off by one: w + 2 keys, where the token itself and the w before it are w + 1",
    "no window": "no window: local attention reads all of its loop's keys",
    "gate reads the normed input": "the gate reads the layer's normed input: it should read the input before the layer's own norm",
    "gate without its norm": "the gate's own norm (gate_norm) is missing",
    "gates even": "no gate: local and global attention are blended evenly, as by weights of zero",
    "global only": "no gate, and no local attention: loop 2 reads loop 1's keys only",
    "local only": "no gate, and no global attention: loop 2 reads its own window only",
    "gates exchanged": "the gate is inverted: g should be the share of global attention, 1 - g of local",
    "own keys": "global attention of loop 2 reads loop 2's keys and values: it should read loop 1's",
    "norm at the end": "the final norm runs at the end only: it should run after every loop, before the shift",
    "no scales": "plt_emb_scale and plt_hidden_scale are left out",
    "neighbouring pairs": "RoPE rotates neighbouring pairs (0, 1), (2, 3), ..: it should rotate (i, i + head_dim / 2)",
}


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        text: its text, one character per token.
        logprobs: log-probability of each token, if the server reports it.
        prompt_tokens: number of the prompt's tokens, if the server reports it.
    """

    text: str
    logprobs: tuple[float, ...] | None = None
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class Verdict:
    """Result of a check.

    Attributes:
        right: whether the engine computes a PLT.
        headline: the result in one line.
        faults: names in MEANING, or "zero carry"; empty if the model is right, or wrong in an unknown way.
        details: the evidence.
    """

    right: bool
    headline: str
    faults: tuple[str, ...] = ()
    details: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Fit:
    """Agreement of a server's answers with expected ones.

    Attributes:
        matched: number of tokens that agree, from each answer's beginning to the first difference.
        asked: number of all tokens.
        mean: mean difference of the log-probabilities of matched tokens, or None.
        largest: largest of these differences, or None.
    """

    matched: int
    asked: int
    mean: float | None
    largest: float | None

    @property
    def explains(self) -> bool:
        """Whether the expected answers explain the server's."""
        return self.matched == self.asked and (self.mean or 0.0) <= ROUNDING

    @property
    def order(self) -> tuple[float, float]:
        """Sort key: the best agreement first."""
        return -self.matched, self.mean or 0.0

    @property
    def said(self) -> str:
        """The agreement in words."""
        tokens = f"{self.matched} of {self.asked} tokens"
        if self.largest is None:
            return f"{tokens}, by their text: the server gives no log-probabilities"
        return f"{tokens}, log-probabilities within {self.largest:.2g} (mean {self.mean:.2g})"


def fit(found: Sequence[Answer], expected: Sequence[dict[str, Any]]) -> Fit:
    """Compare a server's answers with expected ones.

    Args:
        found: the server's answers.
        expected: {"text", "logprobs"} of each expected answer.
    """
    matched, differences = 0, []
    for answer, record in zip(found, expected):
        pairs = zip(answer.text, record["text"])
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(answer.text), len(record["text"])))
        matched += same
        differences += [abs(a - b) for a, b in zip((answer.logprobs or ())[:same], record["logprobs"])]
    asked = sum(len(record["text"]) for record in expected)
    if not differences:
        return Fit(matched, asked, None, None)
    return Fit(matched, asked, sum(differences) / len(differences), max(differences))


def check(complete: Callable[[str, int], Answer]) -> Verdict:
    """Ask for greedy answers, and judge by them whether the engine computes a PLT.

    Args:
        complete: function of a prompt and a number of tokens that returns a greedy answer.
    """
    records = json.loads((PROBE / "answers.json").read_text(encoding="utf-8"))
    found = [complete(prompt, records["tokens"]) for prompt in records["prompts"]]
    fits = {tuple(variant["faults"]): fit(found, variant["answers"]) for variant in records["variants"]}
    if fits[()].explains:
        return _check_reuse(complete, records["again"], fits[()])
    if explaining := {faults: one for faults, one in fits.items() if one.explains}:
        best = min(explaining.values(), key=lambda one: one.order)
        alike = [faults for faults, one in explaining.items() if (one.mean or 0.0) - (best.mean or 0.0) < 0.01]
        faults, *others = sorted(alike, key=len)  # of faults that no answer distinguishes, the simplest is named
        others = [other for other in others if len(other) == len(faults)]
        return Verdict(
            False, _named(faults), faults, [f"explains {best.said}", *(f"or: {_named(other)}" for other in others)]
        )
    before = fit(
        found, records["asked_before"]
    )  # after an earlier check, by an engine that reuses prompts with a zero carry
    if before.explains:
        headline = "prefix reuse with a zero carry: the last token of a prompt that was asked before reads zeros instead of its predecessor's state"
        return Verdict(False, headline, ("zero carry",), [f"explains {before.said}"])
    return _nearest(fits, found, len(records["prompts"][0]))


def _nearest(fits: dict[tuple[str, ...], Fit], found: Sequence[Answer], prompt_tokens: int) -> Verdict:
    """Name the fault that explains most answers, if it stands out, where no known one explains all."""
    details = [f"the right model would explain {fits[()].said}"]
    made = {answer.prompt_tokens for answer in found if answer.prompt_tokens is not None}
    if made - {prompt_tokens}:
        details.append(
            f"the server turns a prompt of {prompt_tokens} characters into {max(made)} tokens: its tokenizer is not the probe's, or adds a "
            f"token at the beginning"
        )
    faults, nearest = min(fits.items(), key=lambda item: item[1].order)
    second = max(one.matched for name, one in fits.items() if name != faults)
    if nearest.matched < NEAR * nearest.asked or nearest.matched == second:
        hint = (
            "weights in fewer than 8 bits cannot be checked: use 16 or 32. Otherwise compare names and layouts of weights, RoPE and "
            "the tokenizer first; see docs/porting.md"
        )
        return Verdict(False, "wrong, in none of the known ways", (), [*details, hint])
    if not faults:
        return Verdict(
            False,
            "close to the right model, but not equal: are weights or caches rounded to fewer than 8 bits?",
            (),
            details,
        )
    return Verdict(False, f"most like this: {_named(faults)}", faults, [f"explains {nearest.said}", *details])


def _named(faults: Sequence[str]) -> str:
    return "; and ".join(MEANING[name] for name in faults) if faults else "the right model"


def _check_reuse(complete: Callable[[str, int], Answer], again: list[dict[str, Any]], fresh: Fit) -> Verdict:
    """Ask a long prompt, the same prompt again, and a continuation, so that engines with a prefix cache reuse it."""
    long, more = again
    for record, when in (
        (long, "a prompt of 129 tokens"),
        (long, "the same prompt once more"),
        (more, "a conversation that continues"),
    ):
        found = [complete(record["prompt"], len(record["right"]["text"]))]
        right = fit(found, [record["right"]])
        if right.explains:
            continue
        details = [f"{when}: the right model explains {right.said}", f"single prompts are right: {fresh.said}"]
        for at, answer in record["zero_carry_at"].items():
            if (wrong := fit(found, [answer])).explains:
                headline = (
                    f"prefix reuse with a zero carry: token {at} of a prompt, the first that is not reused, reads zeros instead of its "
                    f"predecessor's state"
                )
                return Verdict(False, headline, ("zero carry",), [f"{when}: that explains {wrong.said}", *details])
        if when.startswith("a prompt"):
            return Verdict(
                False,
                "short prompts are right, and a prompt of 129 tokens is not: are long ones cut into chunks?",
                (),
                details,
            )
        return Verdict(
            False, "reuse of earlier prompts changes the answers, in another way than a zero carry would", (), details
        )
    return Verdict(True, "right: nothing is missing", (), [fresh.said, "the same where beginnings of prompts may be reused"])


# Servers


class Endpoint:
    """`/v1/completions` of an OpenAI server, with any of the usual forms of log-probabilities."""

    FORMS: tuple[dict[str, Any], ...] = (
        {"logprobs": 1},
        {"logprobs": True},
        {},
    )  # for OpenAI's completions and vLLM; for mlx-lm; for servers that refuse the field

    def __init__(self, url: str, model: str):
        self.url, self.model, self.forms = url.rstrip("/"), model, list(self.FORMS)

    def complete(self, prompt: str, tokens: int) -> Answer:
        """Return the server's greedy answer of `tokens` tokens to a prompt.

        Raises:
            PortCheckError: the server does not answer, or answers with an error.
        """
        while True:
            request = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, **self.forms[0]}
            try:
                answer = self._post("/completions", request)
                choice = answer["choices"][0]
                text, logprobs = str(choice["text"]), _logprobs(choice)
            except urllib.error.HTTPError as error:
                if error.code in (400, 422) and len(self.forms) > 1:
                    self.forms.pop(0)
                    continue
                said = error.read().decode(errors="replace").strip()
                raise PortCheckError(f"{self.url}/completions, model {self.model!r}: {error.code} {said}") from error
            except (OSError, ValueError) as error:
                raise PortCheckError(
                    f"{self.url}/completions gives no answer ({error}): is the server there, and /v1 in the URL?"
                ) from error
            except (KeyError, IndexError, TypeError) as error:
                raise PortCheckError(
                    f"{self.url}/completions does not answer as OpenAI's do: there is no choices[0].text."
                ) from error
            if logprobs is None and len(self.forms) > 1:
                self.forms.pop(0)
                continue
            return Answer(text, logprobs, (answer.get("usage") or {}).get("prompt_tokens"))

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Authorization": "Bearer none"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return json.loads(response.read())


def _logprobs(choice: dict[str, Any]) -> tuple[float, ...] | None:
    given = choice.get("logprobs") or {}
    if given.get("token_logprobs"):
        return tuple(map(float, given["token_logprobs"]))
    return tuple(float(token["logprob"]) for token in given["content"]) if given.get("content") else None


def check_endpoint(url: str, model: str) -> Verdict:
    """Check a server that runs the probe, see `write_probe`.

    Args:
        url: address of the server, with /v1.
        model: the probe's name at the server.

    Raises:
        PortCheckError: it does not answer.
    """
    return check(Endpoint(url, model).complete)


def check_checkpoint(checkpoint: str | Path | None = None, engine: str = "auto", console: Console | None = None) -> Verdict:
    """Check `parloop serve` on the probe, or on a folder that was made from it (quantised, exported, ..).

    Args:
        checkpoint: the folder; default: the probe itself.
        engine: engine of `parloop serve`.
        console: where progress is printed; default: the standard error.

    Raises:
        PortCheckError: the folder was not made from the probe.
        EvaluationError: the server did not start.
    """
    from ..evaluate.serving import serving

    folder = Path(checkpoint or PROBE)
    ours = json.loads((PROBE / "config.json").read_text(encoding="utf-8"))
    try:
        config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise PortCheckError(f"checkpoint {str(folder)!r} has no config.json that can be read ({error}).") from error
    if any(config.get(name) != ours[name] for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")):
        raise PortCheckError(
            f"checkpoint {str(folder)!r} is not made from the probe, whose answers are known. Write and convert the probe: parloop check --write FOLDER"
        )
    with tempfile.TemporaryDirectory(prefix="parloop-check-") as scratch:
        log, options = Path(scratch, "server.log"), ["--engine", engine]
        loops = config.get("plt_num_loops", 2)
        with serving(str(folder), loops, log, options, console or Console(stderr=True)) as server:
            return check_endpoint(server.url, server.model)


def write_probe(folder: str | Path) -> Path:
    """Copy the probe, in the released format, so that the engine to check can convert and serve it. Return the folder.

    Raises:
        PortCheckError: the folder is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PortCheckError(f"--write {str(folder)!r} exists and is not empty: choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    for name in PARTS:
        shutil.copyfile(PROBE / name, folder / name)
    return folder
