"""Runs with made-up tools: what fails, what is kept, what goes on, and which servers are started."""

import contextlib
import errno
import json
import math
import os
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
from rich.console import Console

from parloop.errors import CheckpointError, EvaluationError, OutputError
from parloop.evaluate import results, run, serving
from parloop.evaluate.benchmark import Benchmark, Needs, Outcome, Step, benchmarks
from parloop.evaluate.needs import Check
from parloop.evaluate.results import BenchmarkResult, Model
from parloop.evaluate.run import Request, evaluate
from tests.helpers.models import tiny_model
from tests.helpers.scripted import Scripted

QUIET = Console(quiet=True)
# Asks for three items, one after the other, and writes each answer down; what is there it does not ask again. As most tools do.
TOOL = textwrap.dedent("""
    import json, os, sys, urllib.request
    endpoint, on_error = sys.argv[1:]
    open("pid", "w").write(str(os.getpid()))
    done = {json.loads(line)["id"] for line in open("answers.jsonl")} if os.path.exists("answers.jsonl") else set()
    for number in range(3):
        while number not in done:
            body = json.dumps({"model": "toy@2", "messages": [{"role": "user", "content": str(number)}]}).encode()
            request = urllib.request.Request(endpoint + "/chat/completions", body, {"Content-Type": "application/json"})
            try:
                text = json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
            except Exception as error:
                if on_error == "stop":
                    sys.exit(f"no answer: {error}")
                continue
            with open("answers.jsonl", "a") as file:
                file.write(json.dumps({"id": number, "right": text == "yes"}) + "\\n")
            done.add(number)
""")


def asks(job, on_error="stop"):
    return [Step("answers", [sys.executable, "-S", "-E", "-c", TOOL, job.endpoint, on_error])]


def read(job):
    path = job.work / "answers.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return Outcome({str(row["id"]): float(row["right"]) for row in rows}, data="made")


def made(name="one", steps=asks, parse=read, **more):
    more = {"needs": Needs(disk_gb=0, memory_gb=0), "settings": {"temperature": 0.0}} | more
    return Benchmark(
        name=name, title=name, measures="", metric="", tool=f"{name}-tool 1.0", paper={2: 50.0}, environments=(), silent="", run_here="",
        steps=steps, parse=parse, **more,
    )  # fmt: skip


def shell(script, **more):
    return lambda job: [Step("scores", ["sh", "-c", script], server=False, **more)]


@pytest.fixture
def known(monkeypatch):
    """Sets which benchmarks there are."""

    def known(*some):
        monkeypatch.setattr(run, "benchmarks", lambda: {benchmark.name: benchmark for benchmark in some})

    return known


@pytest.fixture
def server():
    """Answers "yes" to items 0 and 2."""
    answers = {"0": "yes", "1": "no", "2": "yes"}
    with Scripted(lambda request: {"text": answers[request["messages"][0]["content"]]}) as server:
        yield server


def request(server, tmp_path, *names, **more):
    return Request(list(names or ["one"]), endpoint=server.url, model="toy@2", loops=[2], output=tmp_path / "out", **more)


def folder(tmp_path, name="one", model="toy@2"):
    return tmp_path / "out" / model / name


def asked(server):
    return [int(request["messages"][0]["content"]) for request in server.requests]


def test_a_result_holds_all_that_its_number_depends_on(known, server, tmp_path):
    known(made())
    (result,) = evaluate(request(server, tmp_path), QUIET)
    assert BenchmarkResult.load(folder(tmp_path)) == result
    assert result.items == {"0": 1.0, "1": 0.0, "2": 1.0}
    assert result.value == pytest.approx(200 / 3)
    assert result.paper == 50.0
    assert result.settings == {"benchmark": "one", "tool": "one-tool 1.0", "limit": None, "temperature": 0.0}
    assert result.model == Model("toy@2", 2, checkpoint=None, hash=None, engine="unknown")
    assert {name: result.cost[name] for name in ("requests", "prompt_tokens", "completion_tokens", "failures")} == {
        "requests": 3, "prompt_tokens": 30, "completion_tokens": 15, "failures": 0,
    }  # fmt: skip
    assert result.steps[0].startswith(sys.executable)
    assert result.seconds > 0
    assert all((result.command, result.environment, result.date, result.data))


def test_what_is_complete_is_left_alone(known, server, tmp_path):
    known(made())
    first = evaluate(request(server, tmp_path), QUIET)
    (again,) = evaluate(request(server, tmp_path), QUIET)
    assert asked(server) == [0, 1, 2]
    assert again.date == first[0].date
    assert again.items == first[0].items


def test_fresh_starts_over(known, server, tmp_path):
    known(made(), made("two"))
    evaluate(request(server, tmp_path, "one", "two"), QUIET)
    (folder(tmp_path) / "work" / "answers.jsonl").write_text('{"id": 0, "right": false}\n')
    (result,) = evaluate(request(server, tmp_path, fresh=True), QUIET)
    assert asked(server) == 3 * [0, 1, 2]
    assert result.cost["requests"] == 3
    assert result.items["0"] == 1.0
    assert (folder(tmp_path, "two") / "result.json").exists()


def test_starting_over_deletes_nothing_of_others(known, server, tmp_path):
    known(made())
    evaluate(request(server, tmp_path), QUIET)
    (folder(tmp_path) / "notes.txt").write_text("mine")
    before = len(server.requests)
    with pytest.raises(
        OutputError, match=r"one' holds files that parloop eval did not write \(notes.txt\): move them away, or choose"
    ):
        evaluate(request(server, tmp_path, fresh=True), QUIET)
    assert (folder(tmp_path) / "result.json").exists()
    assert evaluate(request(server, tmp_path), QUIET)  # to read it again is fine
    (folder(tmp_path) / "result.json").unlink()
    assert evaluate(request(server, tmp_path), QUIET)  # and so is to go on beside it
    assert (folder(tmp_path) / "notes.txt").read_text() == "mine"
    assert len(server.requests) == before


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["work", "result.json", "settings.json", "thesis.tex"])
def test_a_folder_of_somebody_else_is_refused(known, server, tmp_path, fresh, name):
    """Before a server is asked, and nothing is written into it."""
    known(made())
    folder(tmp_path).mkdir(parents=True)
    (folder(tmp_path) / name).write_text("{}")
    with pytest.raises((OutputError, EvaluationError), match=rf"holds files that parloop eval did not write \({name}\)"):
        evaluate(request(server, tmp_path, fresh=fresh), QUIET)
    assert [path.name for path in folder(tmp_path).iterdir()] == [name]
    assert server.requests == []


def test_what_cannot_be_written_is_found_out_before_anything_is_asked(known, server, tmp_path, monkeypatch):
    known(made())
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match=r"cannot be made, since '.*/out' is a file: choose a folder"):
        evaluate(request(server, tmp_path), QUIET)
    (tmp_path / "out").unlink()

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(folder(tmp_path)))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(OutputError, match=r"one' cannot be written \(Read-only file system\): choose another --output"):
        evaluate(request(server, tmp_path), QUIET)
    assert server.requests == []


def test_another_measurement_does_not_go_into_the_same_folder(known, server, tmp_path):
    known(made())
    evaluate(request(server, tmp_path), QUIET)
    for changes in ({"limit": 2}, {"settings": {"one": {"temperature": 0.5}}}):
        with pytest.raises(
            EvaluationError, match=r"of another kind .*choose another --output, or start over with --fresh"
        ) as caught:
            evaluate(request(server, tmp_path, **changes), QUIET)
        assert "the same command continues" not in str(caught.value)
    assert asked(server) == [0, 1, 2]


# Tools that fail


@pytest.mark.parametrize(
    ("benchmark", "message"),
    [
        (made(steps=shell("echo starting; echo no such file: x >&2; exit 3")), r"one-tool 1.0 ended with 3 \(.*scores.log\): .*no such file: x"),
        (made(steps=shell("true")), r"one-tool 1.0 succeeded but left no items: see the logs in .*one"),
        (made(steps=shell("true"), parse=lambda job: Outcome({}, problems=["no scores: run it again"])), "no scores: run it again"),
        (made(steps=shell("true"), parse=lambda job: Outcome({"a": 1.0}, problems=["1 of 2 items"])), "1 of 2 items"),
        (made(steps=shell("kill -9 $$")), "one-tool 1.0 ended with -9"),
        (made(steps=shell("true"), parse=lambda job: Outcome({"a": float("nan")})), "1 items have a score that is not a number, for instance a"),
    ],
    ids=["exit code", "nothing left", "a problem", "a problem and items", "killed", "no number"],
)  # fmt: skip
def test_a_tool_that_fails_leaves_no_result(known, server, tmp_path, benchmark, message):
    known(benchmark)
    with pytest.raises(EvaluationError, match=message) as caught:
        evaluate(request(server, tmp_path), QUIET)
    assert "1 of 1 gave no result; answers are kept, and the same command continues" in str(caught.value)
    assert not list(tmp_path.rglob("result.json"))


def test_exit_codes_that_a_step_allows(known, server, tmp_path):
    known(made(steps=shell("exit 1", exit_codes=(0, 1)), parse=lambda job: Outcome({"a": 1.0})))
    assert evaluate(request(server, tmp_path), QUIET)[0].value == 100.0


def test_one_that_fails_does_not_keep_others_from_running(known, server, tmp_path):
    known(made(steps=shell("exit 1")), made("two"))
    with pytest.raises(EvaluationError, match=r"(?s)1 of 2 gave no result.*one, toy@2: one-tool 1.0 ended with 1"):
        evaluate(request(server, tmp_path, "one", "two"), QUIET)
    assert json.loads((folder(tmp_path, "two") / "result.json").read_text())["items"]


def test_what_a_tool_says_is_kept_over_runs(known, server, tmp_path):
    known(made(steps=shell("echo said; exit 1")))
    for _ in range(2):
        with pytest.raises(EvaluationError):
            evaluate(request(server, tmp_path), QUIET)
    said = (folder(tmp_path) / "scores.log").read_text()
    assert said.count("$ sh -c 'echo said; exit 1'") == said.count("\nsaid\n") == 2


def test_a_need_that_is_not_met_stops_before_anything_runs(known, server, tmp_path, monkeypatch):
    known(made(), made("two"))
    monkeypatch.setattr(run, "check", lambda benchmark, *_: [Check("Docker", benchmark.name == "one", "install it")])
    with pytest.raises(EvaluationError, match="two cannot run here: Docker: install it"):
        evaluate(request(server, tmp_path, "one", "two"), QUIET)
    assert server.requests == []


def test_a_reason_is_told_once(known, server, tmp_path, capsys):
    """At once that there is no result, at the end why."""
    known(made(steps=shell("echo broken; exit 1")), made("two"))
    with pytest.raises(EvaluationError, match="broken"):
        evaluate(request(server, tmp_path, "one", "two"), Console(width=200))
    assert capsys.readouterr().out.strip() == "one, toy@2: no result"


def test_a_finished_result_needs_nothing(known, tmp_path, monkeypatch):
    """Neither Docker nor the server that it was measured on."""
    known(made())
    with Scripted(lambda request: {"text": "yes"}) as server:
        (made_now,) = evaluate(request(server, tmp_path), QUIET)
    monkeypatch.setattr(run, "check", lambda *_: [Check("Docker", False, "install it")])
    monkeypatch.setattr(run, "server_version", lambda url: "another")
    (kept,) = evaluate(request(server, tmp_path), QUIET)
    assert kept.items == made_now.items
    with pytest.raises(EvaluationError, match="one cannot run here: Docker"):
        evaluate(request(server, tmp_path, fresh=True), QUIET)
    assert (folder(tmp_path) / "result.json").exists()


# Interruptions


@pytest.mark.parametrize("fresh", [False, True])
def test_a_tool_that_outlives_its_run_keeps_others_out(known, server, tmp_path, monkeypatch, fresh):
    """Such as after kill -9: the tool would write between the answers of the next run."""
    known(made(steps=shell("exec sleep 60")))
    left = []
    with monkeypatch.context() as killed:
        killed.setattr(run, "_end", left.append)
        killed.setattr(run, "_wait", lambda process: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate(request(server, tmp_path), QUIET)
    known(made())
    who = rf"another run works in '.*one' \(parloop: process {os.getpid()}, scores: process {left[0].pid}\): wait for it"
    with pytest.raises(OutputError, match=who):
        evaluate(request(server, tmp_path, fresh=fresh), QUIET)
    assert server.requests == []
    left[0].kill()
    left[0].wait()
    assert evaluate(request(server, tmp_path, fresh=fresh), QUIET)


def test_seconds_are_those_of_all_runs(known, server, tmp_path):
    """Like requests and tokens."""
    known(made(steps=shell("exit 1")))
    with pytest.raises(EvaluationError):
        evaluate(request(server, tmp_path), QUIET)
    path = folder(tmp_path) / "seconds.txt"
    assert len(path.read_text().splitlines()) == 1
    path.write_text("1000\n")
    known(made())
    (result,) = evaluate(request(server, tmp_path), QUIET)
    assert 1000 < result.seconds < 1060


@pytest.mark.parametrize("where", ["claim", "result"])
def test_a_full_disk_loses_nothing(known, server, tmp_path, monkeypatch, where):
    known(made())
    full, writer = {"claim": (results.SETTINGS, "write_json"), "result": (results.RESULT, "write_text")}[where]
    write = getattr(results, writer)

    def fails(path, content):
        if path.name == full:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(results, writer, fails)
    with pytest.raises(
        EvaluationError, match=r"the disk of .*out is full: make room, and run the same command again; nothing is lost"
    ):
        evaluate(request(server, tmp_path), QUIET)
    monkeypatch.setattr(results, writer, write)
    (result,) = evaluate(request(server, tmp_path), QUIET)
    assert asked(server) == [0, 1, 2]
    assert len(result.items) == result.cost["requests"] == 3


def test_other_errors_of_the_disk_are_not_called_full(known, server, tmp_path, monkeypatch):
    known(made())

    def fails(path, content):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(results, "write_json", fails)
    with pytest.raises(PermissionError):
        evaluate(request(server, tmp_path), QUIET)


def test_an_interrupted_run_goes_on_where_it_was(known, tmp_path, monkeypatch):
    known(made())
    with Scripted(
        lambda r: {"text": "yes", "hang": 30 if r["messages"][0]["content"] == "2" and interrupted else 0}
    ) as server:
        interrupted, wait = [True], run._wait

        def interrupt(process):
            if interrupted and len(server.requests) == 3:
                interrupted.clear()
                raise KeyboardInterrupt
            return wait(process)

        monkeypatch.setattr(run, "_wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            evaluate(request(server, tmp_path), QUIET)
        with pytest.raises(ProcessLookupError):
            os.kill(int((folder(tmp_path) / "work" / "pid").read_text()), 0)
        assert not (folder(tmp_path) / "result.json").exists()
        (result,) = evaluate(request(server, tmp_path), QUIET)
    assert asked(server) == [0, 1, 2, 2]
    assert result.items == {"0": 1.0, "1": 1.0, "2": 1.0}


# Servers


def test_a_server_that_fails_for_good_ends_a_tool_that_never_gives_up(known, tmp_path):
    known(made(steps=lambda job: asks(job, "go on")))
    broken = [True]

    def answer(request):
        return {"status": 500} if broken and request["messages"][0]["content"] == "1" else {"text": "yes"}

    with Scripted(answer) as server:
        with pytest.raises(
            EvaluationError, match=r"failed 12 times in a row, the last time with: 500.*run the same command"
        ):
            evaluate(request(server, tmp_path), QUIET)
        with pytest.raises(ProcessLookupError):
            os.kill(int((folder(tmp_path) / "work" / "pid").read_text()), 0)
        broken.clear()
        server.requests.clear()
        (result,) = evaluate(request(server, tmp_path), QUIET)
    assert asked(server)[-2:] == [1, 2]  # before them, perhaps, what the ended tool asked last
    assert result.cost["failures"] >= 12


def test_the_servers_failure_is_told_with_the_tools(known, tmp_path):
    known(made())
    with (
        Scripted(lambda request: {"status": 503}) as server,
        pytest.raises(EvaluationError, match=r"ended with 1 .*last failure: 503"),
    ):
        evaluate(request(server, tmp_path), QUIET)


def test_an_endpoint_that_is_not_there(known, tmp_path):
    known(made())
    with Scripted(lambda request: {}) as server:
        pass
    with pytest.raises(EvaluationError, match=r"/v1/models gives no answer \(.*\): is the server there\?"):
        evaluate(request(server, tmp_path), QUIET)


def test_an_endpoint_without_that_model(known, server, tmp_path):
    known(made())
    server.names = ("other@1", "other@2")
    with pytest.raises(EvaluationError, match=r"has no model 'toy@2'; it has other@1, other@2"):
        evaluate(request(server, tmp_path), QUIET)
    assert server.requests == []


class Fake:
    """Our server, without a process: a scripted one, which may be dead for some starts."""

    def __init__(self, server, dead=0):
        self.server, self.dead, self.url, self.log, self.starts, self.pid = (
            server,
            dead,
            server.url,
            Path("server.log"),
            0,
            7,
        )
        self.engine = "some engine 1.2"

    def start(self):
        self.starts += 1

    def alive(self):
        return self.starts > self.dead


@pytest.fixture
def checkpoint(tmp_path):
    tiny_model(plt_num_loops=2).save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture
def served(monkeypatch, server):
    """The loop counts that our server was started with, and the server."""
    started = []

    def start(checkpoint, loops, log, options, console, dead=0):
        fake = Fake(server, served.dead)
        fake.start()
        started.append((loops, options, fake))
        served.log = log
        return contextlib.nullcontext(fake)

    served = type("Served", (), {"started": started, "dead": 0})()
    monkeypatch.setattr(run, "serving", start)
    return served


def test_a_server_for_each_loop_count(known, served, checkpoint, tmp_path):
    known(made(), made("two"))
    asks = Request(
        ["one", "two"], checkpoint=checkpoint, loops=[1, 3, 1], output=tmp_path / "out", serve_options=["--device", "cpu"]
    )
    found = evaluate(asks, QUIET)
    assert [(loops, options) for loops, options, _ in served.started] == [(1, ["--device", "cpu"]), (3, ["--device", "cpu"])]
    assert [(r.benchmark, r.model.name, r.model.loops) for r in found] == [
        ("one", "tiny@1", 1), ("two", "tiny@1", 1), ("one", "tiny@3", 3), ("two", "tiny@3", 3),
    ]  # fmt: skip
    assert len({r.settings_hash for r in found if r.benchmark == "one"}) == 1
    assert len({r.model.hash for r in found}) == 1
    evaluate(asks, QUIET)
    assert len(served.started) == 2  # all is there


def test_the_servers_log_is_beside_the_results(known, served, checkpoint, tmp_path):
    """Also of a name that is no good one for a folder."""
    known(made())
    shutil.move(checkpoint, tmp_path / "ti ny")
    evaluate(Request(["one"], checkpoint=str(tmp_path / "ti ny"), output=tmp_path / "out"), QUIET)
    assert served.log == tmp_path / "out" / "ti-ny@2" / "server.log"
    assert (served.log.parent / "one" / "result.json").exists()


def test_the_trained_loop_count_is_the_default(known, served, checkpoint, tmp_path):
    known(made())
    (result,) = evaluate(Request(["one"], checkpoint=checkpoint, output=tmp_path / "out"), QUIET)
    assert result.model.loops == 2


def test_only_what_is_missing_starts_a_server(known, served, checkpoint, tmp_path):
    known(made(), made("two"))
    evaluate(Request(["one"], checkpoint=checkpoint, loops=[1], output=tmp_path / "out"), QUIET)
    found = evaluate(Request(["one"], checkpoint=checkpoint, loops=[1, 2], output=tmp_path / "out"), QUIET)
    assert [loops for loops, *_ in served.started] == [1, 2]
    assert len(found) == 2


def test_what_loads_the_checkpoint_itself_starts_none(known, served, checkpoint, tmp_path):
    known(made(steps=shell("true"), parse=lambda job: Outcome({job.checkpoint: 1.0}), needs_server=False))
    (result,) = evaluate(Request(["one"], checkpoint=checkpoint, output=tmp_path / "out"), QUIET)
    assert list(result.items) == [checkpoint]
    assert served.started == []


@pytest.mark.parametrize("options", [[], ["--engine", "vllm"], ["--engine=transformers"]])
def test_the_engine_is_what_our_server_says(known, served, checkpoint, tmp_path, options):
    """However it was asked for. What loads the checkpoint itself has the library that it loads it with, whatever runs beside."""
    known(made(), made("two", steps=shell("true"), parse=lambda job: Outcome({"a": 1.0}), needs_server=False))
    asks = Request(["one", "two"], checkpoint=checkpoint, output=tmp_path / "out", serve_options=options)
    assert [result.model.engine for result in evaluate(asks, QUIET)] == ["some engine 1.2", "transformers"]


@pytest.mark.parametrize(
    ("version", "engine"),
    [
        (None, "unknown"),
        ({"version": "0.32.0"}, "vLLM 0.32.0"),
        ({"engine": "transformers", "version": "5.23.0"}, "transformers 5.23.0"),
        (["1.0"], "unknown"),
        ({"build": 7}, "unknown"),
    ],
)
@pytest.mark.parametrize("slash", ["", "/"])
def test_the_engine_of_a_server_that_runs(known, server, tmp_path, version, engine, slash):
    known(made())
    server.version, server.url = version, server.url + slash
    (result,) = evaluate(request(server, tmp_path), QUIET)
    assert result.model.engine == engine


@pytest.mark.parametrize("on_error", ["stop", "go on"])
def test_our_server_that_ends_is_started_again(known, served, server, checkpoint, tmp_path, on_error):
    """Half-way, whether the tool ends or asks on; what was answered before is not asked again."""
    known(made(steps=lambda job: asks(job, on_error)))
    served.dead = 1
    right = server.answer
    server.answer = lambda r: (
        {"close": True} if r["messages"][0]["content"] == "1" and served.started[0][2].starts == 1 else right(r)
    )
    (result,) = evaluate(Request(["one"], checkpoint=checkpoint, output=tmp_path / "out"), QUIET)
    assert served.started[0][2].starts == 2
    assert asked(server).count(0) == 1
    assert result.items == {"0": 1.0, "1": 0.0, "2": 1.0}


def test_our_server_that_ends_again_and_again(known, served, server, checkpoint, tmp_path):
    known(made())
    served.dead = 99
    server.answer = lambda request: {"close": True}
    with pytest.raises(EvaluationError, match=r"The server of tiny@2 ended \(.*server.log\).* It was started 3 time"):
        evaluate(Request(["one"], checkpoint=checkpoint, output=tmp_path / "out"), QUIET)
    assert served.started[0][2].starts == 3


def test_a_server_that_ends_at_its_start_says_why(tmp_path, monkeypatch):
    """The real server, of a checkpoint that does not exist."""
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    log = tmp_path / "server.log"
    log.write_text("".join(f"line {n}\n" for n in range(20)) + "no such checkpoint\n")
    with pytest.raises(
        EvaluationError, match=r"(?s)the server ended with 1 at its start:\nline 13.*no such checkpoint\n\(.*server.log\)"
    ):
        serving.Server("nowhere", 2, log, []).start()


# Requests

ONE = {"endpoint": "http://x/v1", "model": "m"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"benchmarks": ["humanevil_plus"], **ONE}, "'humanevil_plus' is not a benchmark, and not a folder: did you mean humaneval_plus\\?"),
        ({"benchmarks": ["x"], **ONE}, "'x' is not a benchmark, and not a folder: parloop eval --list shows them"),
        ({"benchmarks": ["bfcl_v3"], "data": {"bfcl": Path(".")}, **ONE}, "'bfcl' is not a benchmark"),
        ({"benchmarks": ["bfcl_v3"], "settings": {"bfcl": {"seed": 1}}, **ONE}, "'bfcl' is not a benchmark"),
        ({"benchmarks": [], **ONE}, "name at least one benchmark"),
        ({"benchmarks": ["bfcl_v3"]}, "give a checkpoint, or --endpoint URL with --model NAME"),
        ({"benchmarks": ["bfcl_v3"], "checkpoint": "x", **ONE}, "give the checkpoint 'x' or --endpoint http://x/v1: one of both"),
        ({"benchmarks": ["bfcl_v3"], "limit": 5, **ONE}, r"bfcl_v3 has no --limit, since it scores whole categories: --set bfcl_v3.categories="),
        ({"benchmarks": ["bfcl_v3"], "endpoint": "http://x/v1"}, "--endpoint http://x/v1 needs --model NAME"),
        ({"benchmarks": ["bfcl_v3"], "loops": [1, 2], **ONE}, "a server that runs has one loop count"),
        ({"benchmarks": ["bfcl_v3"], "limit": 0, **ONE}, "limit=0 must be at least 1"),
        ({"benchmarks": ["bfcl_v3"], "settings": {"bfcl_v3": {"sed": 1}}, **ONE}, "bfcl_v3 has no setting 'sed': it has mode, temperature"),
        ({"benchmarks": ["bigcodebench"], "data": {"bigcodebench": Path("/no/where")}, **ONE}, "--data bigcodebench=/no/where: there is no such file"),
        ({"benchmarks": ["mind2web"], "data": {"mind2web": Path("/")}, **ONE}, "--data mind2web=/: mind2web reads no local copy"),
        ({"benchmarks": ["swe_bench_verified"], "settings": {"swe_bench_verified": {"environment": "/x"}}, **ONE}, "is 'docker' with .* cannot be set"),
        ({"benchmarks": ["humaneval_plus"], "settings": {"humaneval_plus": {"temperature": 1}}, **ONE}, "with evalplus 0.3.1, and cannot be set"),
        ({"benchmarks": ["held_out"], "settings": {"held_out": {"documents": "x"}}, **ONE}, "documents='x' must be of the kind that its default is, 64"),
        ({"benchmarks": ["held_out"], "settings": {"held_out": {"documents": math.nan}}, **ONE}, "documents=nan must be of the kind"),
        ({"benchmarks": ["held_out"], "settings": {"held_out": {"length": [1]}}, **ONE}, r"length=\[1\] must be of the kind"),
        ({"benchmarks": ["bfcl_v3"], "settings": {"bfcl_v3": {"top_p": math.inf}}, **ONE}, "top_p=inf must be of the kind"),
        ({"benchmarks": ["bfcl_v3"], "settings": {"bfcl_v3": {"top_p": True}}, **ONE}, "top_p=True must be of the kind"),
        ({"benchmarks": ["bfcl_v3"], "endpoint": "http://x/v1", "model": ""}, "--endpoint http://x/v1 needs --model NAME"),
        ({"benchmarks": ["bfcl_v3"], "loops": [0], "checkpoint": "x"}, "at least 1"),
        ({"benchmarks": ["bfcl_v3"], "loops": [1], "checkpoint": "/no/where"}, "checkpoint '/no/where' cannot be loaded"),
    ],
)  # fmt: skip
def test_requests_that_cannot_be(fields, message):
    with pytest.raises((EvaluationError, CheckpointError), match=message):
        Request(**fields).check()


def test_folders_tell_models_apart(tmp_path):
    """Names of models may hold slashes; ours hold the loop count."""
    asks = Request(["bfcl_v3"], endpoint="http://x/v1", model="org/name@2", output=tmp_path)
    assert asks.job(benchmarks()["bfcl_v3"], 2, "", {}).folder == tmp_path / "org-name@2" / "bfcl_v3"


@pytest.mark.parametrize("model", ["..", ".", "...", "../..", "a/../../b", "/", ".hidden", "\n", "a\0b"])
def test_no_name_of_a_model_leads_out_of_the_output(tmp_path, model):
    asks = Request(["bfcl_v3"], endpoint="http://x/v1", model=model, output=tmp_path / "out")
    folder = asks.folder("bfcl_v3", 2)
    assert folder == (tmp_path / "out" / folder.parent.name / "bfcl_v3").resolve()
    assert folder.parent.name not in ("", "out")
    key = asks.job(benchmarks()["bfcl_v3"], 2, "", {}).key
    assert (tmp_path / key).resolve().parent == tmp_path.resolve()
    assert (tmp_path / key).resolve() != tmp_path.resolve()


# Servers of others


@pytest.mark.parametrize(
    "url",
    ["", "foo", "http://[", "http://a b/v1", "http://x:99999/v1", "http://\udcff/v1", "http://" + "a" * 300, "file:///etc"],
)
def test_addresses_that_are_none(url):
    with pytest.raises(EvaluationError, match="gives no answer"):
        serving.check_model(url, "m")


@pytest.mark.parametrize("answer", [[], None, 3, {"data": 3}, {"data": ["m"]}, {"data": None}])
def test_a_server_that_is_no_openais(monkeypatch, answer):
    monkeypatch.setattr(serving, "ask", lambda url, path: answer)
    with pytest.raises(EvaluationError, match="lists no models as OpenAI's servers do"):
        serving.check_model("http://x", "m")
    assert serving.server_version("http://x/v1") == "unknown"
