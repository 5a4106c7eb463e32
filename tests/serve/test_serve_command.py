"""`parloop serve`: which engine, which loop count, which names. What the engines then do is tested with them."""

import json
import subprocess
import sys

import pytest

from parloop.cli import app
from parloop.errors import ServeError
from parloop.serve import plugin, server
from tests.helpers.models import tiny_model


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "coder"
    tiny_model(plt_num_loops=2).save_pretrained(folder)
    return folder


@pytest.fixture
def started(monkeypatch):
    """The commands that would replace the process, where vLLM 0.32.0 is installed."""
    commands = []
    monkeypatch.setattr(server, "vllm_version", lambda: "0.32.0")
    monkeypatch.setattr(plugin, "vllm_version", lambda: "0.32.0")

    def run(command):
        commands.append(command)
        raise SystemExit

    monkeypatch.setattr(server, "run", run)
    return commands


def option(command: list[str], name: str) -> list[str]:
    place = command.index(name) + 1
    end = next((i for i in range(place, len(command)) if command[i].startswith("--")), len(command))
    return command[place:end]


def start(checkpoint, loops=None, *arguments):
    with pytest.raises(SystemExit):
        server.serve(str(checkpoint), loops, "auto", list(arguments))


def test_as_trained(checkpoint, started):
    start(checkpoint, None, "--port", "8001")
    (command,) = started
    assert command[0] == sys.executable
    assert str(checkpoint) in command
    assert "--hf-overrides" not in command
    assert option(command, "--served-model-name") == ["coder@2", "coder", str(checkpoint)]
    assert option(command, "--port") == ["8001"]


@pytest.mark.parametrize(
    ("loops", "arguments"),
    [(1, []), (None, ["--hf-overrides", '{"plt_num_loops": 1}']), (None, ['--hf-overrides={"num_loops": 1}']), (1, ["--hf-overrides", '{"num_loops": 1}'])],
)  # fmt: skip
def test_the_loop_dial(checkpoint, started, loops, arguments, capsys):
    start(checkpoint, loops, *arguments)
    (command,) = started
    assert json.loads(option(command, "--hf-overrides")[0]) == {"plt_num_loops": 1}
    assert option(command, "--served-model-name")[0] == "coder@1"
    assert "trained with 2" in capsys.readouterr().err


def test_other_overrides_and_names_of_ones_own(checkpoint, started):
    start(checkpoint, 2, "--hf-overrides", '{"max_position_embeddings": 512}', "--served-model-name=mine")
    (command,) = started
    assert json.loads(option(command, "--hf-overrides")[0]) == {"max_position_embeddings": 512, "plt_num_loops": 2}
    assert not any(argument == "--served-model-name" for argument in command)


def test_the_parsers_that_agents_need_are_vllms(checkpoint, started):
    """By the command line, as docs/serving.md says it."""
    parsers = ["--enable-auto-tool-choice", "--tool-call-parser", "qwen3_coder", "--reasoning-parser", "qwen3"]
    with pytest.raises(SystemExit):
        app(["serve", str(checkpoint), *parsers, "--max-model-len", "32768"])
    (command,) = started
    assert command[-7:] == [*parsers, "--max-model-len", "32768"]


@pytest.mark.parametrize(
    ("loops", "engine", "arguments", "told"),
    [
        (0, "auto", [], "at least 1"),
        (2, "auto", ["--hf-overrides", '{"plt_num_loops": 3}'], "give one of the two"),
        (None, "auto", ["--hf-overrides", "plt"], "is not JSON"),
        (None, "auto", ["--hf-overrides", "[1]"], "is not JSON"),
        (None, "auto", ["--port", "70000"], "--port '70000' must be a number from 1 to 65535"),
        (None, "transformers", ["--port=70000"], "--port '70000' must be a number from 1 to 65535"),
        (None, "auto", ["--port"], "--port '' must be a number"),
        (None, "transformers", ["--host", "\udcff"], "is not available"),
        (None, "transformers", ["--host", "a" * 300 + ".b"], "is not available"),
        (None, "sglang", [], "auto, vllm, mlx, transformers"),
        (None, "transformers", ["--hf-overrides", '{"vocab_size": 1}'], "loop count only"),
    ],
)
def test_refused(checkpoint, started, loops, engine, arguments, told):
    with pytest.raises(ServeError, match=told):
        server.serve(str(checkpoint), loops, engine, arguments)


def test_auto_takes_the_first_engine_that_is_at_home(checkpoint, monkeypatch):
    orders, installed = [], []

    def engine(name):
        return server.Engine(lambda: name in installed, lambda order: orders.append((name, order)))

    monkeypatch.setattr(server, "ENGINES", {name: engine(name) for name in "abc"})
    for there in (["b", "c"], ["c"]):
        installed[:] = there
        server.serve(str(checkpoint), None, "auto", ["--port", "1"])
    server.serve(str(checkpoint), 1, "a", [])  # that it is not installed, it says itself
    assert [name for name, _ in orders] == ["b", "c", "a"]
    names = ["coder@2", "coder", str(checkpoint)]
    assert orders[0][1] == server.Order(str(checkpoint), 2, 2, names, {}, ["--port", "1"])
    with pytest.raises(ServeError, match="use one of auto, a, b, c"):
        server.serve(str(checkpoint), None, "vllm", [])


@pytest.mark.parametrize("version", ["0.31.9", "0.8.5.post1", "0.34.0", "0.34.0rc1", "1.0.0"])
def test_versions_of_vllm_that_do_not_fit(version, monkeypatch, checkpoint, started):
    monkeypatch.setattr(plugin, "vllm_version", lambda: version)
    with pytest.raises(ImportError, match=rf"vLLM {version} is installed.*>= 0.32, < 0.34"):
        plugin.check_vllm_version()
    with pytest.raises(ServeError, match="is installed"):
        server.serve(str(checkpoint), None, "vllm", [])


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0", "0.33.1.post2", "0.32.1rc1"])
def test_versions_of_vllm_that_fit(version, monkeypatch):
    monkeypatch.setattr(plugin, "vllm_version", lambda: version)
    assert plugin.check_vllm_version() is None


def test_vllm_asked_for_and_not_there(monkeypatch, checkpoint):
    monkeypatch.setattr(plugin, "vllm_version", lambda: None)
    with pytest.raises(ServeError, match=r"pip install \"parloop\[vllm\]\""):
        server.serve(str(checkpoint), None, "vllm", [])


@pytest.mark.parametrize(
    ("vllm", "mlx", "platform", "engine"),
    [
        (None, "0.32.2", "darwin", "mlx"),
        ("0.32.0", "0.32.2", "darwin", "vllm"),
        (None, None, "darwin", "transformers"),
        (None, "0.32.2", "linux", "transformers"),
        (None, None, "linux", "transformers"),
    ],
)
def test_the_default_engine_is_vllm_or_on_a_mac_mlx(monkeypatch, vllm, mlx, platform, engine):
    monkeypatch.setattr(server, "vllm_version", lambda: vllm)
    monkeypatch.setattr(server, "mlx_lm_version", lambda: mlx)
    monkeypatch.setattr(sys, "platform", platform)
    assert next(name for name, each in server.ENGINES.items() if each.at_home()) == engine


def test_mlx_asked_for_and_not_there(checkpoint):
    with pytest.raises(ServeError, match=r"pip install \"parloop\[mlx\]\""):
        server.serve(str(checkpoint), None, "mlx", [])


def test_with_an_older_transformers_only_what_vllm_needs(tmp_path):
    """In vLLM's environment transformers is older: the configuration works, and other imports give errors that say what to do."""
    code = (
        "import importlib.metadata as metadata; real = metadata.version\n"
        "metadata.version = lambda name: '5.19.0' if name == 'transformers' else real(name)\n"
        "import sys, parloop\n"
        "from parloop import cli\n"
        "assert 'parloop.model.modeling' not in sys.modules\n"
        "parloop.PLTConfig()\n"
        "try:\n    parloop.PLTForCausalLM\n"
        "except ImportError as error:\n    assert 'transformers >= 5.23' in str(error)\n"
        "else:\n    raise AssertionError\n"
        "sys.argv = ['parloop', 'train', 'quick']\n"
        "cli.main()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "needs transformers >= 5.23" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
