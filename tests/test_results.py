"""Results as JSON: what is documented is what is written, and what is of another form is refused."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from parloop.bench import run_bench
from parloop.diagnosis.checkpoint import diagnose_checkpoint
from parloop.diagnosis.results import DiagnosisResult
from parloop.evaluate.benchmark import benchmarks
from parloop.evaluate.compare import Comparison, Entry, PairedTest, compare
from parloop.evaluate.compare import Row as ComparedRow
from parloop.result import Result, not_kept
from parloop.statistics import Interval
from parloop.study import Arm, StudyResult
from parloop.study.results import CacheBytes, Costs, Row, Verdict
from parloop.study.task import Answers
from parloop.timing import Spread
from tests.helpers.models import tiny_model
from tests.helpers.results import BFCL, HELD_OUT, passed, saved
from tests.helpers.text import byte_tokenizer

PAGE = Path(__file__).parents[1] / "docs/results.md"


def documented(title: str) -> set[str]:
    """The keys of a chapter's table."""
    (chapter,) = [part for part in PAGE.read_text(encoding="utf-8").split("\n## ") if part.startswith(f"{title}:")]
    return set(re.findall(r"^\| `([^`]+)` \|", chapter, flags=re.M))


def paths(value, path="") -> set[str]:
    """All keys of a JSON value that lead to something other than objects, and to lists of objects that are empty."""
    if isinstance(value, dict):
        return {found for name, item in value.items() for found in paths(item, f"{path}.{name}" if path else name)}
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return {found for item in value for found in paths(item, f"{path}[]")}
    return {path}


def check(result: Result, title: str) -> None:
    """Every key that is written is documented, and the other way round."""
    keys, known = paths(json.loads(result.to_json())), documented(title)
    parents = {key for key in known if key.endswith("[]")}  # said of a list as a whole
    patterns = {key: re.compile(re.escape(key).replace(r"\*", ".+") + r"(\[\].*)?") for key in known - parents}
    undocumented = {key for key in keys if not any(pattern.fullmatch(key) for pattern in patterns.values())}
    empty = {key for key in keys if any(other.startswith((f"{key}.", f"{key}[]")) for other in known)}  # null, {} or []
    assert undocumented - empty == set()
    assert [key for key, pattern in patterns.items() if not any(map(pattern.fullmatch, keys))] == []
    (number,) = re.findall(rf"## {re.escape(title)}:[^#]*?Format (\d+)", PAGE.read_text(encoding="utf-8"))
    assert json.loads(result.to_json())["format"] == result.FORMAT == int(number)


def study_result() -> StudyResult:
    time, some = Spread(2.0, 1.0, 3.0), Interval(1.0, 0.5, 1.5)
    costs = Costs(24, time, time, time, CacheBytes(4.0, 8.0), 100)
    answers = [Answers(1, 0.1, some, some, some, 0.0)]
    row = Row(
        Arm(2), 10, some, some, some, [1.2, 1.0], 3.0, 0.5, 100, 1e9, 2.0, 50.0, costs, ["r2-seed0"], [[[0, 5.0]]], [[]], "x",
        answers,
    )  # fmt: skip
    verdict = Verdict("Take R = 2.", "It is.")
    return StudyResult([row], "r2", "r2", "r2", verdict, "rule", "tokens", 1, 3, 9, {"a": 1}, {"b": 1}, "parloop", {"c": 1})


@pytest.fixture(scope="module")
def diagnosis(tmp_path_factory) -> DiagnosisResult:
    folder = tmp_path_factory.mktemp("made")
    tiny_model(plt_num_loops=2).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    documents = [(f"{n}.py", f"def f{n}(a, b):\n    return a + b\n" * 3) for n in range(3)]
    return DiagnosisResult("parloop", [diagnose_checkpoint(folder, held_out=documents, samples=3, length=24, device="cpu")])


def test_the_keys_of_a_study():
    check(study_result(), "A study")


def test_the_keys_of_a_diagnosis(diagnosis):
    check(diagnosis, "A diagnosis")


def test_the_keys_of_a_bench(tmp_path, monkeypatch):
    monkeypatch.setattr("parloop.bench.settings.available_bytes", lambda device: 600_000)
    result = run_bench(
        shape="tiny", loops=[2], contexts=[2, 2000], prefill_lengths=[4], batch_sizes=[1], steps=2, repeats=1, device="cpu", threads=1,
        read_bytes=2**16, weights=["int8"], output=tmp_path, console=Console(quiet=True),
    )  # fmt: skip
    check(result, "A bench")


def test_the_keys_of_a_benchmark(tmp_path):
    result = saved(tmp_path, HELD_OUT, 2, {"0": 1.0}, weights={"0": 3.0}, value=1.0, parts={"more": 1})
    check(dataclasses.replace(result, environment={"torch": "2"}), "A benchmark")


def test_the_keys_of_a_comparison(tmp_path):
    for loops in (1, 2):
        saved(tmp_path, BFCL, loops, passed("10"), parts={"leaks": {"0": []}})
    check(compare([tmp_path], tmp_path), "A comparison")
    assert len(Comparison.load(tmp_path).benchmarks) == len(benchmarks())
    assert {Entry, ComparedRow, PairedTest} == {
        type(part) for entry in Comparison.load(tmp_path).benchmarks for part in (entry, *entry.rows, *entry.tests)
    }


def test_a_study_round_trips():
    result = study_result()
    assert StudyResult.from_json(result.to_json()) == result


def test_a_diagnosis_round_trips(diagnosis):
    assert DiagnosisResult.from_json(diagnosis.to_json()).to_json() == diagnosis.to_json()


# The base of results


@dataclass
class Part:
    name: str
    share: float = math.nan


@dataclass
class Made(Result):
    FORMAT = 3

    parts: dict[str, list[Part]]
    counts: tuple[int, ...]
    values: np.ndarray
    interval: Interval | None
    text: str = ""
    folder: Path | None = not_kept(default=None)
    note: dict[str, int] = field(default_factory=dict)

    def shown(self):
        return [Text("made: [bold]x[/]")]


def made(**changes) -> Made:
    fields = {"parts": {"a": [Part("x")]}, "counts": (1, 2), "values": np.array([[1.0, math.nan]]), "interval": None}
    return Made(**(fields | changes))


def test_types_come_back_and_nan_is_null():
    written = made(interval=Interval(1.0, math.nan, math.nan), folder=Path("here"))
    assert json.loads(written.to_json()) == {
        "format": 3, "parts": {"a": [{"name": "x", "share": None}]}, "counts": [1, 2], "values": [[1.0, None]],
        "interval": [1.0, None, None], "text": "", "note": {},
    }  # fmt: skip
    again = Made.from_json(written.to_json())
    assert (type(again.parts["a"][0]), type(again.interval), again.counts, again.folder) == (Part, Interval, (1, 2), None)
    assert math.isnan(again.parts["a"][0].share)
    np.testing.assert_array_equal(again.values, written.values)
    assert Made.from_json(made().to_json()).interval is None


def test_a_result_is_shown_as_it_is():
    assert made().format() == "made: [bold]x[/]\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "its format is 2, and this version of parloop reads 3"),
        ({"parts": {"a": [{"share": 1}]}}, "it has no name"),
        ({"parts": {"a": [3]}}, "3 is not a Part"),
        ({"parts": []}, r"parts is \[\], not dict"),
        ({"counts": [1, "2"]}, "counts is '2', not int"),
        ({"counts": [True]}, "counts is True, not int"),
        ({"interval": [1.0, 2.0]}, "shorter"),
        ({"text": None}, "text is None, not str"),
        ({"note": {"a": 1.5}}, "note is 1.5, not int"),
    ],
)
def test_what_is_of_another_form_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Made.from_json(json.dumps(json.loads(made().to_json()) | change))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 50_000])
def test_what_is_no_result_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        Made.from_json(text)
