"""From a checkpoint on disk to the report: samples, command line, page; and the page in a real browser."""

import csv
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from parloop.corpus import CorpusSettings, load_corpus, sources
from parloop.corpus.samples import draw_samples, padded_batches, samples_of
from parloop.diagnosis.checkpoint import diagnose_checkpoint, diagnose_checkpoints
from parloop.diagnosis.diagnosis import diagnose
from parloop.diagnosis.figures import lens_figures
from parloop.diagnosis.folders import default_folder, diagnosis_folder
from parloop.diagnosis.lenses import LENSES
from parloop.diagnosis.results import CheckpointDiagnosis, DiagnosisResult
from parloop.diagnosis.text import choose_text, same_source
from parloop.diagnosis.tokens import token_view
from parloop.errors import OutputError, SourceError
from parloop.train import ChatRecipe, Recipe
from tests.helpers.models import random_ids, tiny_model
from tests.helpers.sources import write_sources
from tests.helpers.text import byte_tokenizer

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoints with one, two and three loops, and a folder of text."""
    folder = tmp_path_factory.mktemp("made")
    for R in (1, 2, 3):
        tiny_model(plt_num_loops=R, dtype=torch.float32).save_pretrained(folder / f"r{R}")
        byte_tokenizer().save_pretrained(folder / f"r{R}")
    write_sources(folder / "text")
    return folder


@pytest.fixture(scope="module")
def report(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    options = {"data": str(made / "text"), "samples": 6, "length": 48, "device": "cpu", "command": "parloop diagnose"}
    return folder, diagnose_checkpoints([made / f"r{R}" for R in (2, 3)], folder, **options)


def test_samples_are_the_same_every_time_and_of_different_documents(made):
    settings = CorpusSettings(source=str(made / "text"))
    rows = samples_of(settings, byte_tokenizer(), 40, 10, held_out=False)
    assert [row.ids for row in rows] == [row.ids for row in samples_of(settings, byte_tokenizer(), 40, 10, held_out=False)]
    assert len({row.name.split(" [")[0] for row in rows}) == 10
    assert all(row.ids[0] == 1 and len(row.ids) <= 40 for row in rows)


def test_more_samples_than_documents_take_further_windows(tmp_path):
    (tmp_path / "a.py").write_text("abcdefghij" * 19 + "abcdefghi")  # with <bos>, four windows of 50
    (tmp_path / "b.py").write_text("0123456789" * 7)
    rows = samples_of(CorpusSettings(source=str(tmp_path)), byte_tokenizer(), 50, 100, held_out=False)
    text = {"a": "", "b": ""}
    for row in rows:
        text[Path(row.name.split(" [")[0]).stem] += byte_tokenizer().decode(row.ids, skip_special_tokens=True)
    assert text["a"] == "abcdefghij" * 19 + "abcdefghi"
    assert text["b"].startswith("0123456789" * 6)
    assert len(rows) == 4 + 2  # the rest of b is long enough, 21 tokens


def test_held_out_samples_are_those_that_training_leaves_out(made, tmp_path):
    from parloop.corpus import load_corpus

    settings = CorpusSettings(source=str(made / "text"), vocab_size=300, length=32, validation_share=0.3)
    corpus = load_corpus(settings, cache=tmp_path)
    rows = samples_of(settings, corpus.tokenizer, 32, 1000, held_out=True)
    assert {row.name.split(" [")[0] for row in rows} <= set(corpus.validation["name"])


def test_a_source_without_text_is_refused(tmp_path):
    (tmp_path / "cat.png").write_bytes(b"\x89PNG\0")
    with pytest.raises(SourceError, match=r"no document of at least 16 tokens.*--extensions"):
        samples_of(CorpusSettings(source=str(tmp_path)), byte_tokenizer(), 32, 4, held_out=False)


def test_batches_are_padded_on_the_right(made):
    rows = samples_of(CorpusSettings(source=str(made / "text")), byte_tokenizer(), 64, 5, held_out=False)
    batches = padded_batches(rows, 2)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    ids = sorted(row.ids for row in rows)
    assert ids == sorted(
        row[mask.bool()].tolist() for batch in batches for row, mask in zip(batch["input_ids"], batch["attention_mask"])
    )


def test_token_view_says_when_predictions_settle():
    model = tiny_model(plt_num_loops=3)
    ids = random_ids(1, 30)[0].tolist()
    view = token_view(model, byte_tokenizer(), ids, 3)
    with torch.no_grad():
        logits_RTV = torch.stack([logits[0] for logits in model(torch.tensor([ids]), output_loop_logits=True).loop_logits])
    p_RTV, best = logits_RTV.softmax(-1), logits_RTV.argmax(-1)
    assert len(view) == 29
    assert {token["settled"] for token in view} > {1}
    for t, token in enumerate(view):
        first = next(r for r in range(3) if (best[r:, t] == best[2, t]).all())
        assert token["settled"] == first + 1
        assert token["right"] == (best[2, t].item() == ids[t + 1])
        for r, loop in enumerate(token["loops"]):
            p_V, own = p_RTV[r, t], p_RTV[r, t, ids[t + 1]]
            assert loop["rank"] == 1 + (p_V > own).sum().item()
            assert loop["p"] == pytest.approx(own.item(), abs=1e-4)
            assert [q for _, q in loop["top"]] == pytest.approx(p_V.topk(len(loop["top"])).values.tolist(), abs=1e-4)


def test_results_and_csv_hold_everything(report):
    folder, result = report
    content = json.loads((folder / "results.json").read_text())
    assert [len(c["diagnosis"]["values"]["loss"]) for c in content["checkpoints"]] == [6, 6]
    assert set(content["checkpoints"][0]["diagnosis"]["values"]) == set(LENSES)
    rows = list(csv.DictReader((folder / "lenses.csv").open()))
    expected = sum(len([x for x in loops if x]) for one in result.checkpoints for loops in one.diagnosis.summary().values())
    assert len(rows) == expected
    assert {row["lens"] for row in rows} == set(LENSES)


def test_the_result_is_in_the_folder_as_it_was_returned(report):
    folder, result = report
    again = DiagnosisResult.load(folder)
    assert again.to_json() == result.to_json() == (folder / "results.json").read_text()
    assert (again.folder, again.command) == (folder, "parloop diagnose")
    for one, two in zip(again.checkpoints, result.checkpoints):
        assert (one.verdict, one.tokens, one.settings) == (two.verdict, two.tokens, two.settings)
        np.testing.assert_array_equal(one.diagnosis.values["gate"], two.diagnosis.values["gate"])
    one = CheckpointDiagnosis.from_json(result.checkpoints[0].to_json())
    assert one.to_json() == result.checkpoints[0].to_json()


def test_page_is_self_contained_and_complete(report):
    folder, _ = report
    text = (folder / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:)', text)
    assert not re.findall(r"url\((?!#)", text)
    names = ("scissors", "hidden", "attention", "output", "shares", "gates", "layers", "heads")
    for name in names:
        assert f'id="figure-{name}"' in text
        assert (folder / f"lenses-{name}.png").stat().st_size > 5000
    assert text.index('class="verdict"') < text.index('id="figure-scissors"')
    assert "Side by side" in text
    assert "nan" not in re.sub(r"<svg.*?</svg>|<script.*?</script>", "", text, flags=re.S).lower().split()


@pytest.mark.parametrize("R", [(2,), (2, 3), (1, 2, 3)])
def test_legends_lie_on_no_data(made, report, R):
    """They are the figure's, above the axes; so of one checkpoint, of several, and of the scissors' two axes."""
    diagnoses = {f"R = {n}": diagnose(tiny_model(plt_num_loops=n), [{"input_ids": random_ids(3, 20)}]) for n in R}
    legends = 0
    for name, figure in lens_figures(diagnoses).items():
        figure.draw_without_rendering()
        assert all(axes.get_legend() is None for axes in figure.axes), name
        for legend in figure.legends:
            tops = [axes.get_window_extent().y1 for axes in figure.axes if axes.get_visible()]
            assert legend.get_window_extent().y0 >= max(tops), name
            legends += 1
    assert legends >= (2 if len(R) == 1 else 5)


def test_checkpoints_are_told_apart(report):
    one, two = report[1].checkpoints
    records = [dataclasses.replace(one, checkpoint=f"runs/{name}") for name in "ab"] + [two]
    assert DiagnosisResult("", records).labels() == ["a (R = 2)", "b (R = 2)", "R = 3"]
    assert DiagnosisResult("", [one, one]).labels() == ["r2 (R = 2) [1]", "r2 (R = 2) [2]"]


def test_the_report_of_one_loop_has_no_empty_figures(made, tmp_path):
    diagnose_checkpoints([made / "r1"], tmp_path, data=str(made / "text"), samples=3, length=32, device="cpu")
    text = (tmp_path / "report.html").read_text()
    assert "One loop: there is nothing to compare yet." in text
    assert "figure-scissors" not in text
    assert "figure-hidden" in text


def test_names_that_are_not_utf8_are_replaced_in_the_report(made, tmp_path, monkeypatch):
    """Names of the text's folder and of documents in it, and names in the command."""
    named = tmp_path / os.fsdecode(b"t\xffxt")
    shutil.copytree(made / "text", named)
    for path in named.rglob("*.py"):
        path.rename(path.with_name(os.fsdecode(b"\xfe") + path.name))
    monkeypatch.setattr(sys, "argv", ["parloop", "diagnose", "--data", str(named)])
    result = diagnose_checkpoints([made / "r2"], tmp_path / "out", data=str(named), samples=3, length=32, device="cpu")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    (one,) = result.checkpoints
    assert re.search(r"/t\?xt/package_\d/\?module_\d+\.py", one.tokens.document)
    for part in (one.tokens.document, f"parloop diagnose --data &#39;{tmp_path}/t?xt&#39;", one.settings["data"]):
        assert part in text


def parloop(*arguments, cwd):
    command = [sys.executable, "-m", "parloop", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, env=os.environ | {"COLUMNS": "100"})


def test_command_line(made, tmp_path):
    options = ("--data", made / "text", "--samples", 3, "--length", 32, "--device", "cpu")
    done = parloop("diagnose", made / "r2", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "offset cost" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert (tmp_path / "runs" / "diagnose-r2" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["r2", "--length", "9999"], "use at most 256"),
        (["r2", "--samples", "0"], "samples=0"),
        (["r2", "--data", "missing-folder"], "no such file or folder"),
        (["r2", "--loops", "0"], "num_loops=0"),
        (["llama"], "not a PLT"),
        ([], "at least one checkpoint"),
    ],
)
def test_errors_say_what_to_do(made, arguments, message, capsys, monkeypatch):
    """In this process: importing torch nine times would take half a minute."""
    from parloop import cli

    if arguments == ["llama"]:
        small = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
        LlamaForCausalLM(small).save_pretrained(made / "llama")
    if arguments and (made / arguments[0]).exists():
        arguments = [str(made / arguments[0]), *arguments[1:]]
        if "--data" not in arguments:
            arguments += ["--data", str(made / "text")]
    monkeypatch.setattr(sys, "argv", ["parloop", "diagnose", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def browser():
    if not (BROWSER and DRIVER):
        if os.environ.get("PARLOOP_REQUIRE_BROWSER"):
            pytest.fail("no Chromium with chromedriver, and PARLOOP_REQUIRE_BROWSER is set")
        pytest.skip("reports are not clicked through: install Chromium and chromedriver (Debian: chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-background-networking", "disable-component-update", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


@pytest.mark.parametrize("width", [1200, 400])
def test_page_in_a_browser(browser, report, width):
    """Hover and click tokens; nothing is wider than the screen; no script fails."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    folder, result = report
    page, record = folder / "report.html", result.checkpoints[1]
    browser.set_window_size(width, 900)
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    )
    browser.get(page.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    section = browser.find_element(By.ID, "tokens-2")
    tokens = section.find_elements(By.CSS_SELECTOR, "span.token[data-i]")
    assert len(tokens) == len(record.tokens.view)
    peek = section.find_element(By.CSS_SELECTOR, ".peek")
    assert peek.text == "Choose a token."

    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", tokens[3])
    ActionChains(browser).move_to_element(tokens[3]).perform()
    rows = peek.find_elements(By.TAG_NAME, "tr")
    assert len(rows) == 1 + 3  # a head, and a row per loop
    expected = record.tokens.view[3]["loops"]
    assert [row.find_elements(By.TAG_NAME, "td")[1].text for row in rows[1:]] == [str(loop["rank"]) for loop in expected]
    tokens[5].click()
    expected = record.tokens.view[5]["loops"]
    rows = peek.find_elements(By.TAG_NAME, "tr")
    assert [row.find_elements(By.TAG_NAME, "td")[1].text for row in rows[1:]] == [str(loop["rank"]) for loop in expected]
    assert "chosen" in tokens[5].get_attribute("class")
    assert "chosen" not in tokens[3].get_attribute("class")

    details = browser.find_elements(By.TAG_NAME, "details")[0]
    details.find_element(By.TAG_NAME, "summary").click()
    assert details.get_attribute("open")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_few_samples_of_many_documents_are_those_of_the_smallest_hashes(made):
    """Whatever the order that documents come in, duplicates and documents that are too short among them; others are not kept."""
    texts = {path.name: path.read_text() for path in sorted((made / "text").rglob("*.py"))[:20]}
    documents = [*texts.items(), ("short", "a = 1"), ("copy", texts["module_0.py"])]
    order = sorted(texts, key=lambda name: hashlib.sha256(texts[name].encode()).digest())
    for shuffled in (documents, documents[::-1]):
        rows = draw_samples(iter(shuffled), byte_tokenizer(), 40, 7)
        assert [row.name.split(" [")[0].replace("copy", "module_0.py") for row in rows] == order[:7]
    assert draw_samples([("short", "a = 1")], byte_tokenizer(), 40, 7) == []
    for length, samples in ((0, 7), (40, 0), (-1, 7)):
        with pytest.raises(ValueError, match=f"length={length} and samples={samples} must be at least 1"):
            draw_samples(documents, byte_tokenizer(), length, samples)


@pytest.fixture
def trained(made, tmp_path):
    """A checkpoint with a recipe that trained on a folder, and the folder."""
    shutil.copytree(made / "text", tmp_path / "text")
    shutil.copytree(made / "r2", tmp_path / "run")
    Recipe(source=str(tmp_path / "text"), length=32, validation_share=0.3).save(tmp_path / "run" / "recipe.yaml")
    return tmp_path / "run"


def test_training_text_is_known_however_its_path_is_spelt(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("text")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.py").write_text("abc = 1\n" * 20)
    for data in (None, "text", "./text", str(tmp_path / "text"), "elsewhere/../text/", "link", "~/text"):
        text = choose_text("run", data)
        assert text.held_out, data
        assert text.settings.validation_share == 0.3
        assert text.trained_on == "no: only documents that training held out, by run/recipe.yaml"
    # A part of it, more than it, and a glob into it.
    for data in ("text/package_0", ".", "text/**/*.py", "text/package_1/module_1.py"):
        text = choose_text("run", data)
        assert (text.held_out, text.settings.source, text.settings.validation_share) == (True, data, 0.3), data
    for data in ("elsewhere", "elsewhere/*.py"):
        text = choose_text("run", data)
        assert not text.held_out
        assert text.trained_on == "no: other files than run/recipe.yaml names (copies of these would not be noticed)"
    (tmp_path / "text" / "notes.md").write_text("# not read by that recipe\n" * 20)
    assert not choose_text("run", "text/notes.md").held_out


def test_held_out_documents_only_are_drawn_from_training_text(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus = load_corpus(Recipe.load("run/recipe.yaml").corpus_settings(), cache=tmp_path / "cache")
    record = diagnose_checkpoint("run", data="./text/../text", samples=1000, length=32, device="cpu")
    assert record.settings["held_out_only"]
    again = diagnose_checkpoint("run", samples=1000, length=32, device="cpu")
    assert again.sample_hash == record.sample_hash
    held_out = zip(corpus.validation["name"], corpus.validation["text"])
    monkeypatch.setattr(sources, "read", None)  # with documents at hand the source is not read
    monkeypatch.setattr(sources, "read_all", None)
    assert (
        diagnose_checkpoint("run", samples=1000, length=32, device="cpu", held_out=held_out).sample_hash == again.sample_hash
    )


def test_what_is_not_known_of_the_training_is_said(trained, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert choose_text(made / "r2").trained_on == "may be: no recipe.yaml says what the model was trained on"
    assert choose_text("run/checkpoint-7").held_out  # a checkpoint of the run
    shutil.copytree("run", "tuned")
    ChatRecipe(model="run", chat=str(tmp_path / "talks.jsonl")).save("tuned/recipe.yaml")
    (tmp_path / "talks.jsonl").write_text('{"text": "x"}')
    text = choose_text("tuned", "text")  # what the base was trained on
    assert text.held_out
    assert text.trained_on == "no: only documents that training held out, by run/recipe.yaml"
    assert choose_text("tuned", "talks.jsonl").trained_on.startswith("may be: tuned/recipe.yaml names it as conversations")
    Recipe(source=str(tmp_path / "text"), init_from=str(made / "r3"), validation_share=0.4).save("run/recipe.yaml")
    assert choose_text("run", "text").trained_on == (
        f"may be: it was made from {made / 'r3'}, of which no recipe.yaml says what it was trained on. As far as known, "
        f"only documents that training held out, by run/recipe.yaml"
    )
    Recipe(source=str(tmp_path / "moved")).save("run/recipe.yaml")
    assert (
        f"may be: {tmp_path / 'moved'}, which run/recipe.yaml names, no longer exists"
        in choose_text("run", "text").trained_on
    )
    with pytest.raises(
        SourceError, match=r"no such file or folder.* This is the text of run/recipe.yaml: for another one, use --data"
    ):
        diagnose_checkpoint("run", device="cpu")


def test_of_several_trainings_the_smallest_held_out_share_counts(trained, tmp_path, monkeypatch):
    """The first training may have used text that the second one held out."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree("run", "again")
    Recipe(source=str(tmp_path / "text"), init_from="run", validation_share=0.6).save("again/recipe.yaml")
    text = choose_text("again")
    assert text.settings.validation_share == 0.3
    assert text.trained_on == "no: only documents that training held out, by again/recipe.yaml and run/recipe.yaml"


def test_of_a_mixture_every_source_counts(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mixture = [{"source": f"text/package_{i}", "weight": 1.0 + i} for i in range(2)]
    Recipe(mixture=mixture, data_streams=8, validation_share=0.2).save("run/recipe.yaml")
    assert choose_text("run").settings.source.endswith("package_1")
    for data, held_out in (("text/package_0", True), ("./text/package_1", True), ("text", True), ("text/package_2", False)):
        assert choose_text("run", data).held_out == held_out, data


def test_hub_names_are_compared_with_their_split():
    assert same_source("hub:a/b", "hub:a/b@train")
    assert not same_source("hub:a/b", "hub:a/b@test")
    assert not same_source("stdlib", "./stdlib")


def test_the_terminal_and_the_page_say_whether_text_may_have_been_trained_on(trained, tmp_path, monkeypatch, capsys):
    from parloop import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    options = ["--data", "./text", "--samples", "3", "--length", "32", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["parloop", "diagnose", "run", *options])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    said = "no: only documents that training held out, by run/recipe.yaml."
    assert f"./text: trained on this text? {said}" in " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "runs" / "diagnose-run" / "report.html").read_text(encoding="utf-8")
    assert f"Trained on this text? {said}" in page


def test_checkpoints_of_the_same_name_have_folders_of_their_own(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("a", "b"):
        shutil.copytree(made / "r2", tmp_path / place / "final")
    one, other = [tmp_path / "a" / "final"], [tmp_path / "b" / "final"]
    assert default_folder(one) == default_folder(other) == Path("runs/diagnose-final")
    with diagnosis_folder(default_folder(one), one) as out:
        out.write("report.html", "of a")
    assert default_folder(one) == default_folder(["a/final"]) == Path("runs/diagnose-final")
    assert default_folder(other).name.startswith("diagnose-final-")
    assert default_folder(other) == default_folder(["b/final"])
    with pytest.raises(OutputError, match=r"holds a diagnosis of .*/a/final, and not of .*/b/final: choose another folder"):
        diagnosis_folder(Path("runs/diagnose-final"), other).__enter__()
    with diagnosis_folder(default_folder(other), other) as out:
        out.write("report.html", "of b")
    assert Path("runs/diagnose-final/report.html").read_text() == "of a"
    monkeypatch.chdir(tmp_path / "a" / "final")
    assert default_folder(["."]) == Path("runs/diagnose-final")


@pytest.mark.parametrize("name", ["results.json", "report.html", "lenses.csv", "lenses-heads.png", "thesis.tex"])
def test_a_report_is_not_written_over_somebody_elses_files(made, tmp_path, name, monkeypatch, capsys):
    """And that is found out before anything is loaded."""
    from parloop import cli

    (tmp_path / name).write_text("mine")
    monkeypatch.setattr("parloop.diagnosis.checkpoint.load_model", None)
    monkeypatch.setattr(sys, "argv", ["parloop", "diagnose", str(made / "r2"), "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert f"is not empty and holds no diagnosis ({name}): choose another folder" in " ".join(
        capsys.readouterr().err.split()
    )
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
