"""The command in the shell: bytes that are not text, pipes that close, terminals that cannot show it, Ctrl-C, odd arguments."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from parloop import cli
from parloop.corpus import train_tokenizer
from parloop.errors import CheckpointError
from parloop.evaluate.results import EvaluationResult
from parloop.generate import stream
from parloop.train import TrainingResult
from tests.helpers.models import tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model(vocab_size=300, dtype=torch.float32).save_pretrained(folder)
    train_tokenizer(["def f(x):\n    return x\n"] * 5, 300).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def parloop(monkeypatch, capfd):
    """Run the command in this process; return its exit code, and its output on both channels."""

    def run(*arguments, stdin=b""):
        monkeypatch.setenv("COLUMNS", "300")
        monkeypatch.setattr(sys, "stdin", None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin)))
        monkeypatch.setattr(sys, "argv", ["parloop", *map(os.fsdecode, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return done.value.code, *capfd.readouterr()

    return run


# Prompts


@pytest.mark.parametrize("prompt", ["-x", "--x = 3", "-1", "---", "- item"])
def test_prompts_that_begin_with_a_dash(parloop, checkpoint, prompt):
    code, out, said = parloop("generate", checkpoint, prompt, "--max-new-tokens", "2")
    assert code == 0, said
    assert out.startswith(prompt)


@pytest.mark.parametrize("prompt", ["--loops", "--help", "-"])
def test_a_prompt_that_is_called_as_an_option_is(parloop, checkpoint, prompt):
    code, out, _ = parloop("generate", checkpoint, "--max-new-tokens", "2", "--", prompt)
    assert code == 0
    assert out.startswith(prompt) or prompt == "-"


@pytest.mark.parametrize("arguments", [["def", "--lops", "1"], ["--lops", "1"], ["a", "b"]])
def test_options_that_are_misspelt_are_no_prompts(parloop, checkpoint, arguments):
    assert parloop("generate", checkpoint, *arguments)[0] != 0


@pytest.mark.parametrize("given", ["def é", "def f(x):\n    return", "\ufeffdef"])
def test_the_standard_input_is_the_prompt(parloop, checkpoint, given):
    code, out, said = parloop("generate", checkpoint, "-", "--max-new-tokens", "2", stdin=given.encode())
    assert code == 0, said
    assert out.startswith(given.removeprefix("\ufeff"))


@pytest.mark.parametrize(("stdin", "told"), [(b"def \xff", " is not UTF-8"), (None, ", which is closed")])
def test_a_standard_input_that_is_no_text(parloop, checkpoint, stdin, told):
    code, _, said = parloop("generate", checkpoint, "-", stdin=stdin)
    assert code == 2
    assert f"the standard input{told}" in said


def test_a_prompt_that_is_no_text(parloop, checkpoint):
    code, _, said = parloop("generate", checkpoint, b"def \xff")
    assert code == 2
    assert "error: the prompt 'def ?' has bytes that are not UTF-8" in said


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-30, 9e-6])
def test_temperatures_too_small_to_divide_by_are_zero(checkpoint, temperature, capsys):
    said = []
    for t in (0.0, temperature):
        stream(checkpoint, "def", max_new_tokens=12, temperature=t)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


@pytest.mark.parametrize("settings", ['{"num_beams": 4}', '{"num_beams": 2, "num_return_sequences": 2, "do_sample": true}'])
def test_beams_that_a_checkpoint_asks_for_are_not_streamed(checkpoint, tmp_path, capsys, settings):
    folder = copied(checkpoint, tmp_path, generation_config=settings)
    stream(folder, "def", max_new_tokens=2)
    assert capsys.readouterr().out.startswith("def")


def copied(checkpoint, tmp_path, **files):
    import shutil

    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content)
    return str(folder)


DEEP = '{"a":' * 50_000 + "1" + "}" * 50_000


@pytest.mark.parametrize("content", ["[]", "null", '"text"', DEEP, "\ufeff{}", "{"], ids=lambda text: text[:6])
@pytest.mark.parametrize("name", ["config", "tokenizer_config", "tokenizer"])
def test_files_of_a_checkpoint_that_are_no_json_object(checkpoint, tmp_path, name, content):
    with pytest.raises(CheckpointError, match=rf"no usable .*{name}.json (holds no JSON object|is not JSON|is nested too)"):
        stream(copied(checkpoint, tmp_path, **{name: content}), "def")


@pytest.mark.parametrize(
    "content", ["[]", "{", DEEP, '{"min_new_tokens": "a"}', '{"eos_token_id": "x"}'], ids=lambda text: text[:8]
)
def test_generation_settings_of_a_wrong_form(checkpoint, tmp_path, content):
    with pytest.raises(CheckpointError, match=r"generation_config.json"):
        stream(copied(checkpoint, tmp_path, generation_config=content), "def")


@pytest.mark.parametrize("content", ['{"tokenizer_class": 3}', '{"bos_token": 3}'])
def test_tokenizers_of_a_wrong_form(checkpoint, tmp_path, content):
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        stream(copied(checkpoint, tmp_path, tokenizer_config=content), "def")


# Names


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "quick", "--output"],
        ["study", "--output"],
        ["diagnose", "CK", "--output"],
        ["bench", "CK", "--output"],
        ["eval", "held_out", "CK", "--output"],
        ["convert", "CK", "--to", "dense", "--out"],
        ["export", "CK", "--out"],
    ],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize(
    ("name", "told"), [(b"out\xff", "'out?' has bytes that are not UTF-8"), (b"x" * 300, "File name too long")]
)
def test_folders_that_cannot_be_named_so_are_refused_before_any_work(
    parloop, checkpoint, tmp_path, monkeypatch, arguments, name, told
):
    monkeypatch.chdir(tmp_path)
    code, _, said = parloop(*(checkpoint if word == "CK" else word for word in arguments), name)
    assert code == 2
    assert told in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["generate", "diagnose", "bench", "convert", "serve", "eval", "train", "export"])
@pytest.mark.parametrize("name", [b"./no\xff", b"x" * 300])
def test_what_is_not_there_under_an_odd_name(parloop, tmp_path, monkeypatch, verb, name):
    monkeypatch.chdir(tmp_path)
    more = {"convert": ["--out", "o"], "export": ["--out", "o"], "eval": ["bfcl_v3"]}
    code, _, said = parloop(verb, name, *more.get(verb, []))
    assert code == 2
    assert "Traceback" not in said
    assert "error: " in said
    assert "no?" in said or b"no" not in name  # and not as repr() shows it


def test_the_next_command_can_be_pasted(parloop, monkeypatch, tmp_path):
    curve = [[1, 2.0]]
    result = TrainingResult(
        steps=1,
        tokens=1,
        processes=1,
        seconds=1.0,
        tokens_per_second=1.0,
        loss_curve=curve,
        validation_curve=[],
        folder=Path("my run; x"),
    )
    monkeypatch.setattr("parloop.train.training.train", lambda *a, **k: result)
    monkeypatch.setattr("parloop.evaluate.run.evaluate", lambda *a: EvaluationResult([]))
    assert "next:  parloop generate 'my run; x' 'def '" in parloop("train", "quick", "--output", "my run; x")[1]
    server = ("--endpoint", "http://127.0.0.1:9/v1", "--model", "m")
    assert "next:  parloop eval --report 'my results'" in parloop("eval", "bfcl_v3", *server, "--output", "my results")[1]


# Modules, ports, quotes


@pytest.mark.parametrize("module", ["no_such", "no.such", "json.no", "json", "os.path.x", ".x", "..", "", "a b", b"\xff"])
def test_modules_that_are_not_there(parloop, module, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    code, _, said = parloop("run", "-m", module)
    assert code == 2
    assert "that can be run" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("code", "raised"),
    [("import not_there_at_all", ModuleNotFoundError), ("open('/no/such/file')", FileNotFoundError), ("def", SyntaxError)],
)
def test_what_a_module_raises_is_its_own(tmp_path, monkeypatch, code, raised):
    (tmp_path / "goes_wrong.py").write_text(code + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["parloop", "run", "-m", "goes_wrong"])
    with pytest.raises(raised):
        cli.main()


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
@pytest.mark.parametrize("port", ["65536", "-1", "abc", "", "1.5", "9" * 5000])
def test_ports_out_of_range_are_refused_before_anything_is_loaded(parloop, engine, port):
    code, _, said = parloop("serve", "no/such", "--engine", engine, "--port", port)
    assert code == 2
    assert f"--port {port!r} must be a number" in said.replace("\n", "")


def test_quotes_and_values_that_do_not_end(parloop, checkpoint):
    _, _, said = parloop("eval", "bfcl_v3", checkpoint, "--serve-options", '"abc')
    assert "--serve-options '\"abc' cannot be split into words (No closing quotation)" in said
    assert "nested too deeply" in parloop("eval", "bfcl_v3", checkpoint, "--set", "bfcl_v3.x=" + "[" * 50_000)[2]
    assert "is not JSON" in parloop("serve", checkpoint, "--hf-overrides", "[" * 50_000)[2]


# The shell


def run_into(stdout, monkeypatch, *arguments):
    """Run the command in this process with another standard output; gives its exit code."""
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", ["parloop", *arguments])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return done.value.code


@pytest.mark.parametrize(
    "arguments", [["eval", "--list"], ["generate", "CK", "def"], ["--help"]], ids=lambda words: words[0]
)
def test_a_reader_that_goes_ends_the_command_as_the_shell_expects(checkpoint, monkeypatch, capfd, arguments):
    """`parloop ... | head`, for what rich prints, what generate() streams, and the help."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stdout:
        arguments = [checkpoint if word == "CK" else word for word in arguments]
        assert run_into(stdout, monkeypatch, *arguments) == 141
        stdout.flush()  # as Python does at its end: not into the pipe any more
    assert capfd.readouterr().err == ""


def test_a_pipe_that_breaks_elsewhere_is_not_taken_for_the_output(monkeypatch):
    def breaks(*arguments):
        raise BrokenPipeError

    monkeypatch.setattr("parloop.generate.stream", breaks)
    monkeypatch.setattr(sys, "argv", ["parloop", "generate", "x", "y"])
    with open(os.devnull, "w") as stdout, pytest.raises(BrokenPipeError):
        monkeypatch.setattr(sys, "stdout", stdout)
        cli.main()


def test_what_the_terminal_cannot_show_is_replaced(checkpoint, monkeypatch):
    shown = io.BytesIO()
    stdout = io.TextIOWrapper(shown, encoding="ascii", errors="strict")
    assert run_into(stdout, monkeypatch, "generate", checkpoint, "é", "--max-new-tokens", "2") == 0
    assert shown.getvalue().startswith(b"?")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is full")
def test_a_full_disk_is_a_sentence(monkeypatch, capfd):
    with open("/dev/full", "w") as stdout:
        assert run_into(stdout, monkeypatch, "eval", "--list") == 2
    assert capfd.readouterr().err.strip() == "error: No space left on device."


def test_ctrl_c_while_importing_is_no_traceback(tmp_path):
    """With a library that takes long to import."""
    (tmp_path / "transformers").mkdir()
    mark = tmp_path / "imported"
    slow = f"import pathlib, time\npathlib.Path({str(mark)!r}).touch()\ntime.sleep(60)\n"
    (tmp_path / "transformers" / "__init__.py").write_text(slow)
    places = os.pathsep.join([str(tmp_path), str(Path(cli.__file__).parents[1])])
    process = subprocess.Popen(
        [sys.executable, "-m", "parloop", "train", "--help"],
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": places},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a job in the background ignores it
    )
    while not mark.exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, b"interrupted. Run the same command again to continue.\n")


def test_ctrl_c_later_says_how_to_go_on(monkeypatch, capfd):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("parloop.generate.stream", interrupted)
    monkeypatch.setattr(sys, "argv", ["parloop", "generate", "x", "y"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 130
    assert "Run the same command again to continue." in capfd.readouterr().err
