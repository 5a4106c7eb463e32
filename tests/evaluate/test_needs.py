"""Missing needs, and the messages about them: programs, the sandbox, the tools' environments."""

import os
import socket
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
from rich.console import Console

from parloop.corpus import cache
from parloop.errors import EvaluationError
from parloop.evaluate import environments, needs, run, sandbox
from parloop.evaluate.benchmark import Benchmark, Environment, Job, Needs, Outcome, Step, benchmarks
from parloop.evaluate.benchmarks import livecodebench, multipl_e
from parloop.evaluate.meter import Meter
from tests.helpers.models import tiny_config

QUIET = Console(quiet=True)
Usage = namedtuple("Usage", "total used free")


def needing(environments=(), **some):
    return Benchmark(
        name="made", title="", measures="", metric="", tool="", paper={}, environments=environments, needs=Needs(**some), settings={}, silent="",
        run_here="", steps=lambda job: [], parse=lambda job: Outcome({}),
    )  # fmt: skip


@pytest.fixture
def machine(monkeypatch):
    """One where everything is there."""
    monkeypatch.setattr(needs.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda path: Usage(2e12, 0, 1e12))
    monkeypatch.setattr(needs.os, "sysconf", lambda name: 1_000_000)
    monkeypatch.setattr(needs.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, "29.0", ""))
    monkeypatch.setattr(needs, "_reachable", lambda host: True)
    return monkeypatch


ALL = {
    "docker": True, "sandbox": True, "disk_gb": 50, "memory_gb": 16, "network": ("huggingface.co",), "registries": ("ghcr.io",),
    "commands": ("git",), "packages": ("openai",),
}  # fmt: skip


def job(folder, **more):
    return Job(Path(folder), "", "toy@2", 2, {"dtype": "float32"}, **more)


def unmet(benchmark, folder=Path("."), **more):
    return [(check.what, check.remedy) for check in needs.check(benchmark, job(folder, **more)) if not check.met]


def test_all_is_there(machine, tmp_path):
    benchmark = needing((Environment("evalplus"),), **ALL)
    assert unmet(benchmark, tmp_path) == []
    assert [check.what for check in needs.check(benchmark, job(tmp_path))] == [
        "Python 3.11 or newer for evalplus", "Docker, running", "bubblewrap", "the program git", "the package openai", "50 GB of disk",
        "16 GB of memory", "the network, huggingface.co", "the network, ghcr.io",
    ]  # fmt: skip


def without(*names):
    return lambda machine: machine.setattr(needs.shutil, "which", lambda name: None if name in names else f"/bin/{name}")


def answers(returncode, stderr=""):
    """Return a function that stands for running a program, with this result."""

    def fault(machine):
        machine.setattr(
            needs.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, returncode, "", stderr)
        )

    return fault


def hangs(machine):
    def fails(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    machine.setattr(needs.subprocess, "run", fails)


@pytest.mark.parametrize(
    ("need", "fault", "what", "remedy"),
    [
        ({"docker": True}, without("docker"), "Docker, running", "install Docker, or run this benchmark on a machine that has it"),
        ({"docker": True}, answers(1), "Docker, running", "start Docker's engine (docker info fails)"),
        ({"docker": True}, hangs, "Docker, running", "docker info does not answer: is its engine running?"),
        ({"sandbox": True}, without("bwrap"), "bubblewrap", "bubblewrap is not installed: install bubblewrap (apt install bubblewrap"),
        ({"sandbox": True}, answers(1, "bwrap: No permissions"), "bubblewrap", "(bwrap: No permissions): allow user namespaces"),
        ({"commands": ("git",)}, without("git"), "the program git", "install git"),
        ({"packages": ("no_such_package",)}, lambda machine: None, "the package no_such_package", 'pip install "parloop[eval]"'),
        (
            {"disk_gb": 130},
            lambda machine: machine.setattr(needs.shutil, "disk_usage", lambda path: Usage(2e12, 0, 12.3e9)),
            "130 GB of disk",
            "has 12.3 GB free: choose another --output",
        ),
        ({"memory_gb": 16}, lambda machine: machine.setattr(needs.os, "sysconf", lambda name: 90_000), "16 GB of memory", "has 8 GB"),
        (
            {"network": ("huggingface.co",)},
            lambda machine: machine.setattr(needs, "_reachable", lambda host: False),
            "the network, huggingface.co",
            "huggingface.co cannot be reached: check the connection, or give a local copy, --data made=PATH (docs/evaluation.md)",
        ),
    ],
    ids=["no docker", "docker fails", "docker hangs", "no bwrap", "bwrap fails", "command", "package", "disk", "memory", "network"],
)  # fmt: skip
def test_what_is_missing_comes_with_what_to_do(machine, tmp_path, need, fault, what, remedy):
    fault(machine)
    ((found, told),) = unmet(needing(**need), tmp_path)
    assert found == what
    assert remedy in told


def test_local_data_need_no_network_but_images_do(machine, tmp_path):
    machine.setattr(needs, "_reachable", lambda host: False)
    assert unmet(needing(network=("huggingface.co",)), tmp_path, data=tmp_path) == []
    ((what, remedy),) = unmet(needing(network=("huggingface.co",), registries=("ghcr.io",)), tmp_path, data=tmp_path)
    assert what == "the network, ghcr.io"
    assert remedy == "ghcr.io cannot be reached: check the connection"


@pytest.mark.parametrize("name", benchmarks())
def test_a_local_copy_is_advised_only_where_it_is_read(machine, name):
    machine.setattr(needs, "_reachable", lambda host: False)
    advised = any("--data" in remedy for _, remedy in unmet(benchmarks()[name]))
    assert advised == (benchmarks()[name].reads_data and benchmarks()[name].needs.network != ())


@pytest.mark.parametrize(
    ("stored", "loaded", "gb"),
    [("bfloat16", "float32", 29.1), ("bfloat16", "bfloat16", 14.5), ("float32", "bfloat16", 7.27)],
)
def test_what_loads_a_checkpoint_itself_needs_its_size(machine, tmp_path, stored, loaded, gb):
    """A 7B's 13.2 GB of weights, as stored, in the type that they are loaded in."""
    tiny_config(dtype=stored).save_pretrained(tmp_path)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(13_227_272_727)  # takes no disk
    one = job(tmp_path / "out", checkpoint=str(tmp_path))
    one.settings["dtype"] = loaded
    assert f"{gb:g} GB of memory" in [check.what for check in needs.check(benchmarks()["held_out"], one)]


def test_disk_is_that_of_a_folder_to_be_made(machine, tmp_path):
    seen = []
    machine.setattr(needs.shutil, "disk_usage", lambda path: seen.append(path) or Usage(2e12, 0, 1e12))
    needs.check(needing(), job(tmp_path / "not" / "there"))
    assert seen == [tmp_path]


def test_a_host_that_nobody_knows(monkeypatch):
    def fails(address, timeout):
        raise OSError("no such host")

    monkeypatch.setattr(needs.socket, "create_connection", fails)
    assert not needs._reachable("nowhere.invalid")


@pytest.mark.parametrize("name", benchmarks())
def test_everything_that_a_benchmark_needs_is_known(machine, name):
    """On a machine that has nothing, each need has a remedy."""
    without("docker", "bwrap", "git")(machine)
    machine.setattr(needs.shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    machine.setattr(needs.os, "sysconf", lambda name: 0)
    machine.setattr(needs, "_reachable", lambda host: False)
    machine.setattr(needs, "interpreter", lambda environment: None)
    found = unmet(benchmarks()[name])
    assert len(found) >= 2
    assert all(remedy for _, remedy in found)


# The sandbox


@pytest.fixture
def arguments(monkeypatch, tmp_path):
    """Options of bubblewrap, split at their dashes."""
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: "/usr/bin/bwrap")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("LANG", "C.UTF-8")

    def arguments(network=False, readable=(), **variables):
        command = sandbox.sandboxed(["python", "-c", "x"], tmp_path / "job", list(readable), variables, network)
        assert command[0] == "/usr/bin/bwrap"
        end = command.index("--")
        assert command[end + 1 :] == ["python", "-c", "x"]
        options = []
        for word in command[1:end]:
            options.append([word]) if word.startswith("--") else options[-1].append(word)
        return options

    return arguments


def test_only_the_jobs_folder_can_be_written_to(arguments, tmp_path):
    options = arguments(readable=[Path("/home/u/data")])
    job = str(tmp_path / "job")
    assert [option for option in options if option[0] == "--bind"] == [["--bind", job, job]]
    assert ["--ro-bind", "/", "/"] in options
    assert ["--tmpfs", str(Path.home())] in options
    assert options.index(["--ro-bind", "/home/u/data", "/home/u/data"]) > options.index(
        ["--tmpfs", "/tmp"]
    )  # else it would be hidden
    assert options.index(["--bind", job, job]) > options.index(["--tmpfs", str(Path.home())])
    assert ["--chdir", job] in options
    assert {"--unshare-all", "--die-with-parent", "--new-session"} <= {option[0] for option in options}


@pytest.mark.parametrize(("below_run", "network"), [(True, True), (True, False), (False, True)])
def test_sockets_of_services_are_not_there(arguments, monkeypatch, tmp_path, below_run, network):
    """Docker's would be all of this machine. What finds names for the network stays."""
    services = tmp_path / "run"
    services.mkdir()
    (tmp_path / "var-run").symlink_to(services)
    names = (services if below_run else tmp_path) / "stub-resolv.conf"
    names.write_text("")
    (tmp_path / "resolv.conf").symlink_to(names)
    monkeypatch.setattr(sandbox, "SOCKETS", (str(services), str(tmp_path / "var-run")))
    monkeypatch.setattr(sandbox, "RESOLVER", tmp_path / "resolv.conf")
    options = arguments(network)
    assert options.count(["--tmpfs", str(services)]) == 1
    assert (["--ro-bind", str(names), str(names)] in options) is below_run
    if below_run:
        assert options.index(["--ro-bind", str(names), str(names)]) > options.index(["--tmpfs", str(services)])


@pytest.mark.skipif(
    sandbox.problem() != "" or not os.access("/run", os.W_OK), reason="needs bubblewrap, and a /run to write to"
)
@pytest.mark.parametrize("network", [True, False])
def test_a_socket_below_run_cannot_be_reached(tmp_path, network):
    with tempfile.TemporaryDirectory(dir="/run") as place, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{place}/service.sock")
        listener.listen()
        script = f"import socket; socket.socket(socket.AF_UNIX).connect('{place}/service.sock')"
        outside = subprocess.run([sys.executable, "-c", script])
        inside = subprocess.run(
            sandbox.sandboxed([sys.executable, "-c", script], tmp_path, [Path(sys.prefix)], {}, network),
            capture_output=True,
            text=True,
        )
    assert outside.returncode == 0
    assert "FileNotFoundError" in inside.stderr


@pytest.mark.parametrize("network", [True, False])
def test_the_network_is_shared_only_where_the_server_is_asked(arguments, network):
    assert (["--share-net"] in arguments(network)) is network


def test_variables_are_given_and_not_inherited(arguments, tmp_path):
    options = arguments(PARLOOP_MODEL="toy@2")
    assert ["--clearenv"] in options
    given = {option[1]: option[2] for option in options if option[0] == "--setenv"}
    assert given["PARLOOP_MODEL"] == "toy@2"
    assert given["LANG"] == "C.UTF-8"
    assert given["HOME"] == str(tmp_path / "job")
    assert "HF_TOKEN" not in given


def test_nothing_runs_outside_where_there_is_no_sandbox(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    job = Job(tmp_path, "", "toy@2", 2, {})
    step = Step("scores", ["touch", str(tmp_path / "ran")], sandbox="offline", server=False)
    with pytest.raises(
        EvaluationError, match=r"only runs in a sandbox, and bubblewrap is not installed: install bubblewrap"
    ):
        run.run_step(step, job, Meter("http://127.0.0.1:9", tmp_path / "log"), None, QUIET, needing())
    assert not (tmp_path / "ran").exists()


# Environments of the tools

PYTHON = """#!/bin/sh
case "$2" in
  venv) mkdir -p "$3/bin" "$3/lib/python3.11/site-packages" && cp "$0" "$3/bin/python" ;;
  pip) echo "$@" >> {log}; echo "PYTHONPATH=$PYTHONPATH" >> {log}; {pip} ;;
esac
"""


@pytest.fixture
def python(tmp_path, monkeypatch):
    """Sets what `pip` does in environments that are made with a made-up Python; gives the file that tells how it was called."""
    monkeypatch.setattr(environments, "default_cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(environments, "interpreter", lambda environment: (str(tmp_path / "python"), environment.python))
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    log = tmp_path / "log"

    def python(pip="true"):
        (tmp_path / "python").write_text(PYTHON.format(log=log, pip=pip))
        (tmp_path / "python").chmod(0o755)
        return log

    return python


def test_an_environment_is_made_once(python):
    log = python()
    folder = environments.make(Environment("evalplus"), QUIET)
    assert folder == environments.folder_of(Environment("evalplus")) / "bin"
    assert "--no-deps -r" in log.read_text()
    assert "evalplus.txt\nPYTHONPATH=\n" in log.read_text()
    log.unlink()
    assert environments.make(Environment("evalplus"), QUIET) == folder
    assert not log.exists()


def test_a_package_that_cannot_be_installed(python):
    """The message has pip's last lines, and what was begun is not taken for whole."""
    python("echo 'ERROR: No matching distribution found for evalplus' >&2; exit 1")
    with pytest.raises(EvaluationError) as caught:
        environments.make(Environment("evalplus"), QUIET)
    message = str(caught.value)
    assert message.startswith("the environment of evalplus cannot be made: ")
    assert "-m pip install" in message
    assert "ended with 1:\nERROR: No matching distribution found for evalplus\nCheck the connection and the disk" in message
    log = python()
    log.unlink()
    environments.make(Environment("evalplus"), QUIET)
    assert log.exists()


def test_an_installation_that_was_interrupted_is_done_again(python):
    log = python()
    folder = environments.make(Environment("evalplus"), QUIET)
    (folder.parent / environments.READY).unlink()
    (folder / "half").write_text("")
    log.unlink()
    environments.make(Environment("evalplus"), QUIET)
    assert log.exists()
    assert not (folder / "half").exists()


def test_an_environment_that_sees_ours(python):
    python()
    folder = environments.make(Environment("lm-eval", with_ours=True), QUIET).parent
    (path,) = folder.rglob("parloop-ours.pth")
    assert str(Path(environments.__file__).parents[2]) in path.read_text()
    assert "site.addsitedir" in path.read_text()


def test_no_python_for_a_tool(monkeypatch, tmp_path):
    monkeypatch.setattr(environments, "default_cache", lambda: tmp_path)
    monkeypatch.setattr(environments.sys, "version_info", (3, 11, 7))
    monkeypatch.setattr(environments.shutil, "which", lambda name: None)
    with pytest.raises(
        EvaluationError, match=r"harbor needs Python 3.12 or newer, and python3.12 is not on the path: install it"
    ):
        environments.make(Environment("harbor", python=(3, 12)), QUIET)


def test_another_python_is_found_on_the_path(monkeypatch):
    """Version managers leave commands that only say that they are not there."""
    monkeypatch.setattr(environments.sys, "version_info", (3, 11, 7))
    monkeypatch.setattr(
        environments.shutil, "which", lambda name: f"/bin/{name}" if name in ("python3.12", "python3.13") else None
    )
    monkeypatch.setattr(
        environments.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, int("3.12" in command[0]))
    )
    assert environments.interpreter(Environment("harbor", python=(3, 12))) == ("/bin/python3.13", (3, 13))
    assert environments.interpreter(Environment("evalplus")) == (sys.executable, (3, 11))


@pytest.mark.parametrize(("there", "found"), [({"python3.11"}, "/bin/python3.11"), (set(), sys.executable)])
def test_the_python_that_packages_were_chosen_on_is_taken_before_ours(monkeypatch, there, found):
    monkeypatch.setattr(environments.sys, "version_info", (3, 13, 0))
    monkeypatch.setattr(environments.shutil, "which", lambda name: f"/bin/{name}" if name in there else None)
    monkeypatch.setattr(environments.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0))
    assert environments.interpreter(Environment("evalplus"))[0] == found


def test_another_python_comes_with_a_warning(python, monkeypatch, capsys):
    python()
    for version, warned in (((3, 11), False), ((3, 13), True)):
        made = environments.interpreter(Environment("evalplus"))[0]
        monkeypatch.setattr(environments, "interpreter", lambda environment, at=(made, version): at)
        environments.make(Environment("evalplus"), Console())
        (environments.folder_of(Environment("evalplus")) / environments.READY).unlink()
        said = " ".join(capsys.readouterr().out.split())
        assert ("evalplus's packages were chosen on Python 3.11; on 3.13 some may not install or work." in said) is warned


def test_other_packages_are_another_environment(monkeypatch, tmp_path):
    file = tmp_path / "evalplus.txt"
    monkeypatch.setattr(environments, "requirements", lambda environment: file)
    folders = set()
    for text, with_ours in (("a==1\n", False), ("a==2\n", False), ("a==2\n", True)):
        file.write_text(text)
        folders.add(environments.folder_of(Environment("evalplus", with_ours=with_ours)))
    assert len(folders) == 3


@pytest.mark.parametrize(
    "environment",
    sorted({e for b in benchmarks().values() for e in b.environments}, key=lambda e: e.name),
    ids=lambda e: e.name,
)
def test_every_environment_is_pinned(environment):
    lines = environments.requirements(environment).read_text().splitlines()
    packages = [line for line in lines if line.strip() and not line.startswith("#")]
    assert packages
    assert [line for line in packages if "==" not in line] == []


# Data


@pytest.mark.parametrize("left", [(), ("data.jsonl",), ("LiveCodeBench",)])
def test_livecodebenchs_data(tmp_path, left):
    for name in left:
        (tmp_path / name).mkdir() if name == "LiveCodeBench" else (tmp_path / name).write_text("")
    job = Job(tmp_path / "job", "", "toy@2", 2, benchmarks()["livecodebench"].settings, data=tmp_path if left else None)
    with pytest.raises(
        EvaluationError, match=r"--data livecodebench=FOLDER, with LiveCodeBench/ and data.jsonl \(docs/evaluation.md\)"
    ):
        livecodebench.prepare(job)


def test_a_window_without_problems(tmp_path):
    (tmp_path / "LiveCodeBench" / "lcb_runner").mkdir(parents=True)
    (tmp_path / "data.jsonl").write_text('{"question_id": "1", "contest_date": "2020-01-01T00:00:00"}\n')
    job = Job(tmp_path / "job", "", "toy@2", 2, benchmarks()["livecodebench"].settings, data=tmp_path)
    with pytest.raises(EvaluationError, match=r"has no problem from 2024-10-01 to 2025-02-01"):
        livecodebench.prepare(job)


def test_a_language_without_a_file(tmp_path):
    job = Job(tmp_path / "job", "", "toy@2", 2, {"languages": ["js"]}, data=tmp_path)
    with pytest.raises(
        EvaluationError, match=r"there is no .*js.jsonl; give --set multipl_e.languages='\[..\]' or the file"
    ):
        multipl_e.prepare(job)


def test_a_hub_that_is_not_there(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", fails)
    job = Job(tmp_path / "job", "", "toy@2", 2, {"languages": ["js"]})
    with pytest.raises(
        EvaluationError, match=r"humaneval-js, cannot be loaded \(offline\): check the connection, or give --data"
    ):
        multipl_e.prepare(job)


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        ({}, None, r"needs a text: --data held_out=FILE.jsonl"),
        ({}, "x", r"needs its model's tokenizer: --set held_out.tokenizer=FOLDER"),
    ],
)
def test_the_loss_of_a_server(tmp_path, settings, data, message):
    benchmark = benchmarks()["held_out"]
    job = Job(tmp_path, "http://x/v1", "toy@2", 2, benchmark.settings | settings, data=data and tmp_path / data)
    with pytest.raises(EvaluationError, match=message):
        benchmark.resolve(job)


def test_rows_of_multi_swe_bench(tmp_path):
    job = Job(tmp_path, "", "toy@2", 2, {}, bins={"multi-swe-bench": tmp_path}, data=tmp_path)
    with pytest.raises(EvaluationError, match=r"--data multi_swe_bench=FOLDER, with dataset.jsonl \(docs/evaluation.md\)"):
        benchmarks()["multi_swe_bench"].steps(job)


def test_an_environment_where_the_cache_cannot_be_written(python, tmp_path, monkeypatch):
    python()
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(environments, "default_cache", lambda: tmp_path / "file" / "cache")
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path))
    folder = environments.make(Environment("evalplus"), QUIET)
    assert folder.is_relative_to(tmp_path / f"parloop-{os.getuid()}" / "evaluate")
    (tmp_path / "log").unlink()
    assert environments.make(Environment("evalplus"), QUIET) == folder  # it is there
    assert not (tmp_path / "log").exists()
