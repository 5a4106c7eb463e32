"""The command line, in this process: what is shown, passed on and refused."""

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from parloop import cli
from parloop.corpus.corpus import Corpus
from parloop.errors import RecipeError
from parloop.report.terminal import progress_bars
from parloop.train import Recipe


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["parloop", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as done:
        cli.main()
    return done.value.code


@pytest.mark.parametrize("source", ["no/[a-z]*.py", "no/[/y]", "no/[bold]x", "no/[w, 0]"])
def test_errors_show_values_as_they_are(monkeypatch, capsys, source):
    assert run(monkeypatch, "study", source) == 2
    assert f"source {source!r}" in capsys.readouterr().err


def test_brackets_in_names(capsys):
    part = {"documents": 1, "bytes": 1, "tokens": 1}
    summary = {"source": "src/[/a-z]*.py", "train": part, "validation": part, "left_out": {"not [.py]": 2}}
    console = Console(width=100)
    Corpus(None, None, None, summary, Path("cache[/b]")).print_summary(console)
    shown = capsys.readouterr().out
    for text in ("src/[/a-z]*.py", "2 not [.py]", "cache[/b]"):
        assert text in shown


def test_the_study_shows_paths_and_commands_as_they_are(monkeypatch, capsys):
    class Result:
        folder = Path("out[/y]")

        def __rich__(self):
            return Text("Take R = 2. With [w, 0] and [/y].")

    monkeypatch.setattr("parloop.study.run_study", lambda *a, **k: Result())
    assert run(monkeypatch, "study") == 0
    shown = capsys.readouterr().out
    assert "Take R = 2. With [w, 0] and [/y]." in shown
    assert "report: out[/y]/report.html" in shown


def test_a_source_is_a_source_however_it_is_given(monkeypatch):
    asked = []

    def stop(preset, output, *, changes, **_):
        asked.append((preset, output, changes))
        raise RecipeError("stop")

    monkeypatch.setattr("parloop.study.run_study", stop)
    for arguments in (["src/"], ["--source", "src/"], []):
        run(monkeypatch, "study", *arguments)
    assert asked == [("quick", None, {"source": "src/"})] * 2 + [("quick", None, {})]


def test_the_recorded_command_can_be_pasted(monkeypatch, tmp_path):
    from parloop.study import study

    kept = []
    monkeypatch.setattr(sys, "argv", ["parloop", "study", "src/**/*.py", "--output", str(tmp_path)])
    monkeypatch.setattr(study, "plan", lambda *a: [])
    monkeypatch.setattr(study, "measure", lambda *a: {})
    monkeypatch.setattr(study, "summarize", lambda *a: kept.append(a[-2]))
    monkeypatch.setattr(study, "write_report", lambda *a: None)
    monkeypatch.setattr(study, "load_corpus", lambda *a, **k: Corpus(None, None, None, {}, tmp_path))
    monkeypatch.setattr(Corpus, "print_summary", lambda *a: None)
    study.run_study(Recipe(), tmp_path, console=Console(quiet=True))
    assert kept == [f"parloop study 'src/**/*.py' --output {tmp_path}"]


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "shows_arguments.py").write_text("import json, sys\nprint(json.dumps([sys.argv[1:], sys.path[0]]))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return "shows_arguments"


@pytest.mark.parametrize("given", [["--version"], ["-m", "foo"], ["--help"], ["-h", "--", "x"], ["--a=1", "[b]"], []])
def test_a_module_gets_its_arguments_untouched(module, monkeypatch, capsys, tmp_path, given):
    assert run(monkeypatch, "run", "-m", module, *given) == 0
    assert json.loads(capsys.readouterr().out) == [given, str(tmp_path)]


def test_run_has_a_help(monkeypatch, capsys):
    assert run(monkeypatch, "run", "--help") == 0
    assert "with PLT registered" in capsys.readouterr().out


def test_a_bar_of_a_run_with_brackets_in_its_name():
    from parloop.train.callbacks import BarCallback

    console = Console(width=100, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with progress_bars(console) as progress:
        BarCallback(progress, "run[/y]: R = 2", 10)
    assert "run[/y]: R = 2" in console.export_text()
