"""Files of results: what tells measurements apart, whose a folder is, what is loaded, and what is put side by side."""

import json
import math
from pathlib import Path

import pytest

from parloop.errors import EvaluationError
from parloop.evaluate.benchmark import Job, Outcome, benchmarks
from parloop.evaluate.results import (
    BenchmarkResult,
    checkpoint_hash,
    claim,
    groups,
    hash_of,
    load_results,
    save,
    settings_of,
)

BENCHMARK = benchmarks()["bfcl_v3"]
MODEL = {"name": "toy@2", "loops": 2, "checkpoint": "toy", "hash": "abc", "engine": "transformers"}


def job(folder, limit=None, data=None, **settings):
    return Job(
        folder=folder, endpoint="", model="toy@2", loops=2, settings=BENCHMARK.settings | settings, limit=limit, data=data
    )


def saved(folder, model="toy@2", loops=2, items=None, data="v3", **more):
    """A result, written as a run writes it."""
    one = job(folder, **more)
    outcome = Outcome({"a": 1.0, "b": 0.0} if items is None else items, data=data, parts={"live": 0.5})
    return save(BENCHMARK, one, outcome, settings_of(BENCHMARK, one), MODEL | {"name": model, "loops": loops}, {"cost": {}})


# What a number depends on


@pytest.mark.parametrize("change", [{"threads": 1}, {"threads": 99}, {"data": Path("a/copy")}, {"tokenizer": "copy/of/it"}])
def test_how_fast_and_from_where_is_no_setting(tmp_path, change):
    assert settings_of(BENCHMARK, job(tmp_path, **change)) == settings_of(BENCHMARK, job(tmp_path))


@pytest.mark.parametrize(
    "change", [{"temperature": 1.0}, {"mode": "prompt"}, {"seed": 2}, {"limit": 5}, {"categories": ["simple"]}, {"max_tokens": None}]
)  # fmt: skip
def test_what_changes_the_number_changes_the_hash(tmp_path, change):
    one, other = saved(tmp_path / "one"), saved(tmp_path / "other", **change)
    assert one.settings_hash != other.settings_hash


def test_other_data_is_another_measurement(tmp_path):
    assert saved(tmp_path / "one").settings_hash != saved(tmp_path / "other", data="v4").settings_hash


def test_the_model_is_no_setting(tmp_path):
    one, other = saved(tmp_path / "one"), saved(tmp_path / "other", model="other@4", loops=4)
    assert one.settings_hash == other.settings_hash


def test_the_hash_does_not_depend_on_the_order_of_settings():
    assert hash_of({"a": 1, "b": [2]}) == hash_of({"b": [2], "a": 1}) != hash_of({"a": 1, "b": [3]})


def test_tools_are_settings(tmp_path):
    assert settings_of(BENCHMARK, job(tmp_path))["tool"] == "bfcl-eval 2025.8.6.2"


@pytest.mark.parametrize(
    ("file", "content", "same"),
    [
        ("model-00002-of-00002.safetensors", b"other", False),
        ("config.json", b"{}", False),
        ("model-00003.safetensors", b"", False),
        ("README.md", b"x", True),
    ],
)
def test_a_checkpoint_is_its_weights_and_configuration(tmp_path, file, content, same):
    for name in ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    before = checkpoint_hash(tmp_path)
    (tmp_path / file).write_bytes(content)
    assert (checkpoint_hash(tmp_path) == before) is same


def test_a_checkpoint_is_read_once(tmp_path, monkeypatch):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    before = checkpoint_hash(tmp_path)
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("read again"))
    assert checkpoint_hash(tmp_path) == before


# Whose a folder is


def test_the_same_run_goes_on(tmp_path):
    claim(tmp_path, settings_of(BENCHMARK, job(tmp_path)), MODEL)
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert written
    claim(tmp_path, settings_of(BENCHMARK, job(tmp_path)), MODEL)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == written


@pytest.mark.parametrize(
    ("settings", "model", "what"),
    [
        ({"seed": 7}, {}, "seed 1 -> 7"),
        ({"limit": 3}, {}, "limit None -> 3"),
        ({}, {"hash": "xyz"}, "hash 'abc' -> 'xyz'"),
        ({}, {"engine": "vLLM 0.33"}, "engine 'transformers' -> 'vLLM 0.33'"),
        ({}, {"loops": 3}, "loops 2 -> 3"),
    ],
)
def test_another_run_is_refused_and_told_what_differs(tmp_path, settings, model, what):
    claim(tmp_path, settings_of(BENCHMARK, job(tmp_path)), MODEL)
    with pytest.raises(EvaluationError) as caught:
        claim(tmp_path, settings_of(BENCHMARK, job(tmp_path, **settings)), MODEL | model)
    assert f"({what})" in str(caught.value)
    assert "choose another --output, or start over with --fresh" in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": {}}'])
def test_settings_that_cannot_be_read(tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(EvaluationError, match=r"settings.json is not .*remove the file"):
        claim(tmp_path, {}, MODEL)


# What is loaded


def test_every_item_is_kept(tmp_path):
    items = {f"item {n}/é": n / 7 for n in range(8)}
    written = saved(tmp_path / "a", items=items)
    (loaded,) = load_results([tmp_path])
    assert loaded.items == items
    assert loaded == written
    assert loaded.path == written.path == tmp_path / "a" / "result.json"
    assert BenchmarkResult.from_json(written.to_json()) == written
    assert loaded.value == pytest.approx(100 * 0.5)
    assert not list(tmp_path.rglob("*.partial"))


def test_folders_that_overlap_count_once(tmp_path):
    saved(tmp_path / "a" / "b")
    assert len(load_results([tmp_path, tmp_path / "a", tmp_path / "a" / ".." / "a"])) == 1


@pytest.mark.parametrize(
    ("content", "why"),
    [("", "Expecting value"), ("{", "Expecting"), ("[]", "it holds list"), ("[1]", ""), ("3", ""), ('{"accuracy": 1}', "it has no benchmark")],
)  # fmt: skip
def test_a_file_that_is_no_result(tmp_path, content, why):
    saved(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "result.json").write_text(content)
    with pytest.raises(EvaluationError, match=rf"b/result.json' is not a result of parloop eval \(.*{why}.*\): remove it"):
        load_results([tmp_path])


@pytest.mark.parametrize(
    "change",
    [
        {"items": [1]}, {"items": {"a": "b"}}, {"items": {"a": math.nan}}, {"value": "x"}, {"value": math.inf}, {"weights": [1]},
        {"benchmark": ["bfcl_v3"]}, {"settings_hash": {}}, {"unit": 3}, {"settings": []}, {"model": {"loops": "1", "name": "x"}},
        {"model": {"loops": 1, "name": 3}}, {"model": []}, {"value": 10**400}, {"format": 99},
    ],
    ids=str,
)  # fmt: skip
def test_a_result_with_values_of_another_kind(tmp_path, change):
    saved(tmp_path)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(EvaluationError, match="is not a result of parloop eval"):
        load_results([tmp_path])


def test_a_result_that_is_nested_too_deeply(tmp_path):
    (tmp_path / "result.json").write_text("[" * 50_000)
    with pytest.raises(EvaluationError, match="is not a result of parloop eval"):
        load_results([tmp_path])


@pytest.mark.parametrize("field", ["items", "settings_hash", "model", "date", "weights"])
def test_a_result_that_lacks_a_field(tmp_path, field):
    saved(tmp_path)
    content = json.loads((tmp_path / "result.json").read_text())
    del content[field]
    (tmp_path / "result.json").write_text(json.dumps(content))
    with pytest.raises(EvaluationError, match=f"it has no {field}"):
        load_results([tmp_path])


def test_no_results(tmp_path):
    with pytest.raises(EvaluationError, match=r"no result below .*: run parloop eval first"):
        load_results([tmp_path])
    with pytest.raises(EvaluationError, match="/gone' does not exist: give folders with results of parloop eval"):
        load_results([tmp_path / "gone"])


# What is put side by side


def test_only_the_same_settings_are_one_group(tmp_path):
    for number, (loops, more) in enumerate(
        [(4, {}), (1, {}), (2, {"seed": 2}), (2, {}), (3, {"data": "v4"}), (3, {"limit": 5})]
    ):
        saved(tmp_path / str(number), model=f"toy@{loops}", loops=loops, **more)
    found = groups(load_results([tmp_path]))
    assert sorted([result.model.loops for result in group.by_model()] for group in found) == [[1, 2, 4], [2], [3], [3]]
    for group in found:
        assert {result.settings_hash for result in group.results} == {group.settings_hash}


def test_order_is_by_loops_then_by_name(tmp_path):
    """Unknown ones are not the fewest."""
    for number, (name, loops) in enumerate([("b@2", 2), ("c", None), ("a@2", 2), ("z@1", 1)]):
        saved(tmp_path / str(number), model=name, loops=loops)
    (group,) = groups(load_results([tmp_path]))
    assert [result.model.name for result in group.by_model()] == ["z@1", "a@2", "b@2", "c"]
