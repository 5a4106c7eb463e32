"""The real tools, each in its environment: right and wrong answers, our server, servers that fail, agents that fix and that cheat.

They are installed by the first test that needs them, so `make test-eval` runs these apart from the suite.
"""

import functools
import itertools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from parloop.corpus.tasks import HELD_OUT, Encoder, task_of
from parloop.errors import EvaluationError
from parloop.evaluate import agents, run
from parloop.evaluate.benchmark import Environment, Job, benchmarks
from parloop.evaluate.environments import make
from parloop.evaluate.run import Request, evaluate
from parloop.train import Recipe
from parloop.train.evaluate import evaluate_documents
from parloop.train.training import train
from tests.helpers.chats import byte_tokenizer
from tests.helpers.models import tiny_model
from tests.helpers.scripted import Scripted, call

pytestmark = pytest.mark.tools
QUIET = Console(quiet=True)
TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}assistant:"""
FILES = Path(__file__).parent / "recorded"


@pytest.fixture(autouse=True)
def _kept_environments(monkeypatch):
    """Environments outlive the tests; what the tools keep of their own does not."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny PLT whose text is bytes, with room for a benchmark's prompt."""
    folder = tmp_path_factory.mktemp("eval") / "tiny"
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    tiny_model(dtype=torch.float32, vocab_size=len(tokenizer), max_position_embeddings=2048).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def problem(number=0):
    return {
        "task_id": f"HumanEval/{number}", "prompt": f'def add_{number}(numbers: list) -> int:\n    """Give the sum."""\n', "contract": "\n",
        "canonical_solution": "    return sum(numbers)\n", "entry_point": f"add_{number}", "base_input": [[[1, 2]], [[]]],
        "plus_input": [[[5, -5, 7]]], "atol": 0,
    }  # fmt: skip


def problems(path, count=1):
    path.write_text("".join(json.dumps(problem(n)) + "\n" for n in range(count)))
    return {"humaneval_plus": path}


def solved(request, body="sum(numbers)"):
    name = request["messages"][-1]["content"].split("def ")[1].split("(")[0]
    return {"text": f"Here:\n```python\ndef {name}(numbers):\n    return {body}\n```"}


# evalplus


@pytest.mark.parametrize(
    ("body", "value"), [("sum(numbers)", 100.0), ("len(numbers)", 0.0), ("sum(numbers) if len(numbers) < 3 else 0", 0.0)]
)
def test_evalplus_scores_right_and_wrong_answers(tmp_path, body, value):
    with Scripted(lambda request: solved(request, body)) as server:
        request = Request(
            ["humaneval_plus"],
            endpoint=server.url,
            model="toy@2",
            loops=[2],
            output=tmp_path / "out",
            data=problems(tmp_path / "p.jsonl"),
        )
        (result,) = evaluate(request, QUIET)
    assert result.value == value
    assert result.parts["HumanEval (without the added tests)"] == (0.0 if body.startswith("len") else 100.0)
    assert result.items == {"HumanEval/0": value / 100}
    assert result.cost == {
        "requests": 1,
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "failures": 0,
        "seconds": pytest.approx(0, abs=1),
    }
    assert server.requests[0]["model"] == "toy@2"
    assert server.requests[0]["temperature"] == 0
    assert result.paper == 84.1


def test_evalplus_against_our_server(checkpoint, tmp_path):
    """At two loop counts, each by a server of its own; a tiny random model solves nothing."""
    request = Request(
        ["humaneval_plus"], checkpoint=str(checkpoint), loops=[1, 2], output=tmp_path / "out", data=problems(tmp_path / "p.jsonl"),
        serve_options=["--engine", "transformers", "--device", "cpu"],
    )  # fmt: skip
    one, two = evaluate(request, QUIET)
    assert [result.model.name for result in (one, two)] == ["tiny@1", "tiny@2"]
    assert one.value == two.value == 0.0
    assert one.settings_hash == two.settings_hash
    assert one.model.hash == two.model.hash
    assert one.model.engine == f"transformers {transformers.__version__}"
    assert two.cost["requests"] >= 1
    assert two.cost["completion_tokens"] > 0
    # Everything is there: nothing is started or asked again.
    again = evaluate(request, QUIET)
    assert [result.value for result in again] == [0.0, 0.0]
    assert [result.cost for result in again] == [one.cost, two.cost]


def test_what_a_model_writes_cannot_reach_out_of_the_sandbox(tmp_path):
    """An answer that writes files, reads the home and opens the network, and says in its result what it could."""
    reach = textwrap.dedent(f"""
        import io, os, socket
        def add_0(numbers):
            done = []
            for path in ({str(tmp_path / "escaped")!r}, os.path.expanduser("~root/escaped"), "/usr/escaped"):
                try:
                    io.open(path, "w").write("x"); done.append(path)
                except OSError:
                    pass
            try:
                socket.create_connection(("127.0.0.1", PORT), 2); done.append("network")
            except OSError:
                pass
            return -1 if done else sum(numbers)
    """)
    with Scripted(
        lambda request: {"text": f"```python\n{reach.replace('PORT', server.url.split(':')[2].split('/')[0])}\n```"}
    ) as server:
        request = Request(
            ["humaneval_plus"],
            endpoint=server.url,
            model="toy@2",
            loops=[2],
            output=tmp_path / "out",
            data=problems(tmp_path / "p.jsonl"),
        )
        (result,) = evaluate(request, QUIET)
    # Writing to the private home of the sandbox is fine, and is no reach: then only that path would be in `done`.
    assert not (tmp_path / "escaped").exists()
    assert not Path("/usr/escaped").exists()
    assert not Path("~root/escaped").expanduser().exists()
    assert result.value in (0.0, 100.0)


def test_a_server_that_fails_half_way_costs_nothing(tmp_path):
    """Three problems answered, then 500 for ever: an end with a message, and the rest is asked when the server is back."""
    broken = [True]

    def answer(request):
        if broken[0] and len(server.requests) > 3:
            return {"status": 500}
        return solved(request)

    with Scripted(answer) as server:
        request = Request(
            ["humaneval_plus"],
            endpoint=server.url,
            model="toy@2",
            loops=[2],
            output=tmp_path / "out",
            data=problems(tmp_path / "p.jsonl", 5),
        )
        with pytest.raises(
            EvaluationError, match=r"(?s)the same command continues.*failed 12 times in a row, the last time with: 500"
        ):
            evaluate(request, QUIET)
        broken[0] = False
        asked = len(server.requests)
        (result,) = evaluate(request, QUIET)
        assert len(server.requests) - asked == 2
    assert result.value == 100.0
    assert len(result.items) == 5
    assert result.cost["failures"] >= 12


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 429}, "429"),
        ({"status": 400}, "the server refuses|400"),
        ({"raw": "{not json"}, "not JSON"),
        ({"close": True}, "reach|RemoteDisconnected|closed"),
    ],
)
def test_faults_end_with_a_message(tmp_path, fault, message):
    with Scripted(lambda request: fault) as server:
        request = Request(
            ["humaneval_plus"],
            endpoint=server.url,
            model="toy@2",
            loops=[2],
            output=tmp_path / "out",
            data=problems(tmp_path / "p.jsonl"),
        )
        with pytest.raises(EvaluationError, match=message):
            evaluate(request, QUIET)
    assert not list(tmp_path.rglob("result.json"))


def test_a_server_that_dies_is_started_again(checkpoint, tmp_path, monkeypatch):
    """Ours, killed while the tool asks it."""
    killed = []
    original = run.run_step

    def kill_once(step, job, meter, server, console, benchmark):
        if step.name == "answers" and not killed:
            killed.append(server.process.pid)
            server.process.kill()
            server.process.wait()
        return original(step, job, meter, server, console, benchmark)

    monkeypatch.setattr(run, "run_step", kill_once)
    request = Request(
        ["humaneval_plus"], checkpoint=str(checkpoint), loops=[2], output=tmp_path / "out", data=problems(tmp_path / "p.jsonl"),
        serve_options=["--engine", "transformers", "--device", "cpu"],
    )  # fmt: skip
    (result,) = evaluate(request, QUIET)
    assert killed
    assert result.cost["failures"] >= 1
    assert result.value == 0.0


# lm-eval


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Some shorter than a window, some longer."""
    path = tmp_path_factory.mktemp("texts") / "held.jsonl"
    rows = [f"def f{n}(x):\n    return x + {n}\n" * (1 + 9 * (n % 3)) for n in range(6)] + ["x = 'é'\n"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return path, rows


@pytest.mark.parametrize("loops", [1, 2])
def test_lm_eval_counts_what_we_count(checkpoint, texts, tmp_path, loops):
    path, rows = texts
    request = Request(
        ["held_out"],
        checkpoint=str(checkpoint),
        loops=[loops],
        output=tmp_path / "out",
        data={"held_out": path},
        settings={"held_out": {"length": 128}},
    )
    (result,) = evaluate(request, QUIET)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    ours = evaluate_documents(model, tokenizer, rows, 128, num_loops=loops, as_lm_eval=True)
    assert result.value == pytest.approx(ours.bits_per_byte[-1], abs=1e-5)
    per_document = ours.nll[:, -1] / np.log(2) / ours.bytes
    for number, value in enumerate(per_document):
        assert result.items[str(number)] == pytest.approx(value, abs=1e-4)
    # Our own count predicts <eos> too, and does not fill the last window: near, and not the same.
    plain = evaluate_documents(model, tokenizer, rows, 128, num_loops=loops).bits_per_byte[-1]
    assert 1e-4 < abs(plain - result.value) < 0.2


@pytest.fixture(scope="module")
def on_a_task(tmp_path_factory):
    """Sources of tasks -> checkpoints that were trained on them, for two steps."""
    made = {}

    def folder(source):
        if source not in made:
            made[source] = tmp_path_factory.mktemp("task") / "run"
            train(
                Recipe(source=source, length=192, loops=2, hidden_size=32, num_hidden_layers=1, intermediate_size=48, batch_size=2,
                       tokens=768, eval_every=0, device="cpu"), made[source], console=QUIET)  # fmt: skip
        return made[source]

    return folder


@pytest.mark.parametrize("source", ["task:s5,length=8", "task:hops", "task:hops,trace", "task:run,levels=3"])
def test_lm_eval_asks_what_we_ask(on_a_task, tmp_path, source):
    task, checkpoint = task_of(source), on_a_task(source)
    request = Request(
        ["held_out"], checkpoint=str(checkpoint), output=tmp_path / "out", settings={"held_out": {"documents": 3}}
    )
    (result,) = evaluate(request, QUIET)
    model, encode = AutoModelForCausalLM.from_pretrained(checkpoint), Encoder(task, task.tokenizer())
    right = {group: [] for group in task.groups}
    for number, group in itertools.product(range(3), task.groups):
        document = encode(task.document(number, HELD_OUT, group=None if task.asks_every_group else group))
        last = int(np.flatnonzero(document.groups == group)[-1])
        places = range(document.prompt, last + 1) if task.is_written else [last]
        with torch.no_grad():
            log_p = model(torch.tensor(document.input_ids[None]).long()).logits[0].log_softmax(-1)
        said = [int(document.labels[place]) for place in places]
        nll = -sum(float(log_p[place - 1, token]) for place, token in zip(places, said)) / np.log(2)
        text = encode.tokenizer.decode(said)
        item = result.items[str(number * len(task.groups) + task.groups.index(group))]
        assert item == pytest.approx(nll / len(f" {text}".encode()), abs=1e-4)
        right[group].append(all(int(log_p[place - 1].argmax()) == token for place, token in zip(places, said)))
    for group, share in right.items():
        (part,) = [value for name, value in result.parts.items() if name.startswith(f"exact match, {task.unit} {group} ")]
        assert part == pytest.approx(100 * np.mean(share))


# bfcl


def recorded(job):
    """Answers to every item of two small categories: the first right, the others wrong."""
    from parloop.evaluate.benchmarks.bfcl_v3 import key

    script = f"""
import json, pathlib, bfcl_eval
data = pathlib.Path(bfcl_eval.__file__).parent / "data"
load = lambda path: [json.loads(line) for line in open(path)]
out = pathlib.Path({str(job.work)!r}) / "result" / {key(job)!r}
out.mkdir(parents=True)
for category in ("live_parallel", "live_relevance"):
    prompts = load(data / f"BFCL_v3_{{category}}.json")
    path = data / "possible_answer" / f"BFCL_v3_{{category}}.json"
    truths = load(path) if path.exists() else [None] * len(prompts)
    rows = []
    for i, (prompt, truth) in enumerate(zip(prompts, truths)):
        if truth is None:
            answer = [{{"f": json.dumps({{"x": 1}})}}] if i == 0 else "No function fits."
        else:
            calls = []
            for entry in truth["ground_truth"]:
                (name, arguments), = entry.items()
                calls.append({{name.replace(".", "_"): json.dumps({{k: v[0] for k, v in arguments.items() if v[0] != ""}})}})
            answer = calls if i == 0 else calls[:1]
        rows.append({{"id": prompt["id"], "result": answer, "input_token_count": 7, "output_token_count": 5, "latency": 0.1}})
    (out / f"BFCL_v3_{{category}}_result.json").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""
    from parloop.evaluate.benchmarks.bfcl_v3 import steps

    driver = job.drivers / "bfcl_driver.py"
    own = os.environ | steps(job)[1].environment
    program = f"import runpy, sys; sys.argv = ['x']; runpy.run_path({str(driver)!r}, run_name='driver')\n{script}"
    done = subprocess.run([job.python("bfcl"), "-c", program], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def bfcl_job(folder, endpoint="http://127.0.0.1:9/v1", **changes):
    bins = {"bfcl": make(Environment("bfcl"), QUIET)}
    settings = benchmarks()["bfcl_v3"].settings | {"categories": ["live_parallel", "live_relevance"], "threads": 1} | changes
    job = Job(folder=folder, endpoint=endpoint, model="toy@2", loops=2, settings=settings, bins=bins)
    job.work.mkdir(parents=True)
    return job


def test_bfcl_scores_recorded_answers(tmp_path):
    from parloop.evaluate.meter import Meter
    from parloop.evaluate.run import run_step

    job = bfcl_job(tmp_path / "job")
    recorded(job)
    benchmark = benchmarks()["bfcl_v3"]
    run_step(benchmark.steps(job)[1], job, Meter("http://127.0.0.1:9", tmp_path / "log"), None, QUIET, benchmark)
    outcome = benchmark.parse(job)
    assert outcome.problems == []
    assert outcome.parts["accuracy"] == {
        "live_parallel": pytest.approx(1 / 16),
        "live_relevance": pytest.approx(1 / 18, abs=0.01),
    }
    assert sum(outcome.items.values()) == 2
    assert len(outcome.items) == 34


def test_bfcl_asks_and_a_dead_server_is_no_score(tmp_path):
    settings = {"categories": ["live_parallel"], "threads": 1, "seed": 3}
    down = [True]

    def answer(request):
        if down[0] and len(server.requests) > 4:
            return {"status": 400}
        return {"tool_calls": [call(request["tools"][0]["function"]["name"])]}

    with Scripted(answer) as server:
        request = Request(
            ["bfcl_v3"],
            endpoint=server.url,
            model="toy@2",
            loops=[2],
            output=tmp_path / "out",
            settings={"bfcl_v3": settings},
        )
        with pytest.raises(EvaluationError, match=r"failed 12 times in a row|errors of the server"):
            evaluate(request, QUIET)
        down[0] = False
        asked = len(server.requests)
        (result,) = evaluate(request, QUIET)
        assert 10 <= len(server.requests) - asked <= 16  # what failed, and not what was answered
    assert server.requests[0]["seed"] == 3
    assert server.requests[0]["top_p"] == 0.85
    assert len(result.items) == 16
    assert result.value == 0.0


# inspect

TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import match
from inspect_ai.solver import generate

@task
def sums():
    samples = [Sample(id=f"s{n}", input=f"What is {n} + 1? Answer with the number alone.", target=str(n + 1)) for n in range(3)]
    return Task(dataset=samples, solver=generate(), scorer=match())
"""


@pytest.fixture
def inspect_request(tmp_path, monkeypatch):
    """Makes requests for a task of our own, which needs no network."""
    monkeypatch.setattr(run, "check", lambda *_: [])
    (tmp_path / "sums.py").write_text(TASK)
    settings = {"mind2web": {"task": str(tmp_path / "sums.py"), "max_tokens": 8}}
    return functools.partial(Request, ["mind2web"], loops=[2], output=tmp_path / "out", settings=settings)


def test_inspect_asks_again_what_failed(inspect_request):
    down = [True]

    def answer(request):
        number = int(request["messages"][-1]["content"].split()[2])
        if down[0] and number == 1:
            return {"status": 400}
        return {"text": str(number + 1) if number != 2 else "5"}

    with Scripted(answer) as server:
        request = inspect_request(endpoint=server.url, model="toy@2")
        with pytest.raises(EvaluationError, match="1 of 3 samples have no score"):
            evaluate(request, QUIET)
        down[0] = False
        asked = len(server.requests)
        (result,) = evaluate(request, QUIET)
        assert len(server.requests) - asked == 1
    assert result.items == {"s0": 1.0, "s1": 1.0, "s2": 0.0}


def test_inspect_against_our_server(checkpoint, inspect_request):
    request = inspect_request(checkpoint=str(checkpoint), serve_options=["--engine", "transformers", "--device", "cpu"])
    (result,) = evaluate(request, QUIET)
    assert result.value == 0.0
    assert len(result.items) == 3


# Agents

REPOSITORY = """
set -e; rm -rf "$1"; mkdir -p "$1"; cd "$1"; git init -q -b main; git config user.email a@b.c; git config user.name a
printf 'def mean(xs):\\n    return sum(xs) / (len(xs) + 1)\\n' > calc.py
printf 'from calc import mean\\nassert mean([1, 2, 3]) == 2\\n' > test_calc.py
git add .; git commit -qm base
printf 'def mean(xs):\\n    return sum(xs) / len(xs)\\n' > calc.py; git commit -qam 'Fix mean'; git tag v1.1; git reset -q --hard HEAD~1
"""
SUBMIT = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT && cat patch.txt"
FIX = [
    "cat calc.py",
    "sed -i 's/(len(xs) + 1)/len(xs)/' calc.py && python3 test_calc.py",
    "git diff -- calc.py > patch.txt && cat patch.txt",
    SUBMIT,
]
CHEAT = [
    "git log --all --oneline",
    "git show v1.1",
    "git checkout v1.1 -- calc.py && git diff --cached -- calc.py > patch.txt && cat patch.txt",
    SUBMIT,
]


def agent(tmp_path, commands, tools=True, faults=()):
    """Run mini-swe-agent on a toy repository in the sandbox, with a scripted model. Returns the job and the server."""
    bins = {"mini-swe-agent": make(Environment("mini-swe-agent"), QUIET), "swebench": make(Environment("swebench"), QUIET)}
    job_folder = tmp_path / "job"
    repository = job_folder / "work" / "toy"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "test.jsonl").write_text(
        json.dumps(
            {
                "instance_id": "toy__calc-1",
                "repo": "toy/calc",
                "problem_statement": "mean([1, 2, 3]) returns 1.5, expected 2.",
            }
        )
        + "\n"
    )
    from parloop.evaluate.meter import Meter
    from parloop.evaluate.run import run_step

    benchmark = benchmarks()["swe_bench_verified"]
    settings = benchmark.settings | {"environment": str(repository), "tools": tools, "workers": 1}
    faults = list(faults)

    def answer(request):
        if faults:
            return faults.pop(0)
        turn = sum(message["role"] == "assistant" for message in request["messages"])
        command = commands[min(turn, len(commands) - 1)]
        if tools:
            return {"text": f"step {turn}", "tool_calls": [call("bash", command=command)]}
        return {"text": f"THOUGHT: step {turn}\n```mswea_bash_command\n{command}\n```"}

    with Scripted(answer) as server, Meter(server.url, tmp_path / "log.jsonl").running() as meter:
        job = Job(
            folder=job_folder,
            endpoint=meter.url,
            model="toy@2",
            loops=2,
            settings=settings,
            bins=bins,
            data=tmp_path / "tasks",
        )
        job.work.mkdir(parents=True, exist_ok=True)
        if not repository.exists():
            subprocess.run(["bash", "-c", REPOSITORY, "x", str(repository)], check=True)
        benchmark.prepare(job)
        (step,) = benchmark.steps(job)
        assert step.sandbox == "online"
        run_step(step, job, meter, None, QUIET, benchmark)
    return job, server


@pytest.mark.parametrize("tools", [True, False], ids=["tool calls", "text"])
def test_an_agent_that_fixes_and_one_that_cheats(tmp_path, tools):
    patches = {}
    for name, commands in (("fix", FIX), ("cheat", CHEAT)):
        (tmp_path / name).mkdir()
        job, server = agent(tmp_path / name, commands, tools)
        assert agents.unfinished(job) == {}
        (prediction,) = agents.predictions(job).values()
        patches[name] = prediction["model_patch"]
        found = agents.leaks(job)
        if name == "fix":
            assert found == {}
        else:
            hits = found["toy__calc-1"]
            assert [hit.command for hit in hits] == CHEAT[:3]
            assert {hit.kind for hit in hits} == {"future commits", "a named revision"}
            assert hits[1].shown > 50
        assert ("tools" in server.requests[0]) is tools
        assert server.requests[0]["temperature"] == 0
    assert "+    return sum(xs) / len(xs)" in patches["fix"]
    assert patches["fix"].strip() == patches["cheat"].strip()  # only what they did tells them apart


def test_an_agents_server_that_fails_is_asked_again(tmp_path):
    job, _ = agent(tmp_path, FIX, faults=[{"status": 500}] * 40)
    assert agents.unfinished(job) == {"toy__calc-1": "InternalServerError"}
    benchmark = benchmarks()["swe_bench_verified"]
    outcome = benchmark.parse(job)
    assert outcome.problems[0].startswith(
        "1 of 1 instances were cut short by the server or their container, toy__calc-1 for one"
    )
    benchmark.prepare(job)
    assert agents.predictions(job) == {}  # so that the tool does not take it for done


def test_predictions_are_taken_by_both_graders(tmp_path):
    """swebench's loader takes preds.json, Multi-SWE-bench's ours; swebench grades recorded logs, without containers."""
    job, _ = agent(tmp_path, FIX)
    predictions, out = job.work / "agent" / "preds.json", tmp_path / "patches.jsonl"
    assert agents.to_multi_swe_bench(agents.predictions(job), out) == 1
    swebench, multi = (make(Environment(name), QUIET) for name in ("swebench", "multi-swe-bench"))
    row = {
        "instance_id": "toy__calc-1", "repo": "toy/calc", "version": "1", "image": "x", "base_commit": "0", "patch": "", "test_patch": "",
        "problem_statement": "x", "FAIL_TO_PASS": '["test_calc.py::test_mean"]', "PASS_TO_PASS": "[]", "log_parser": "parse_log_pytest",
        "eval_type": "pass_and_fail", "eval_script": "x",
    }  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps([row]))
    script = f"""
import json
from pathlib import Path
from swebench.harness.utils import get_predictions_from_file, load_swebench_dataset, make_test_spec
from swebench.harness.grading import get_eval_report
from swebench.harness.reporting import make_run_report
from swebench.harness.constants import START_TEST_OUTPUT, END_TEST_OUTPUT
rows = load_swebench_dataset("ds.json", "test")
found = {{p["instance_id"]: p for p in get_predictions_from_file({str(predictions)!r}, "ds.json", "test")}}
folder = Path("logs/run_evaluation/toy-2", found["toy__calc-1"]["model_name_or_path"].replace("/", "__"), "toy__calc-1")
folder.mkdir(parents=True)
(folder / "test_output.txt").write_text(f"+ : '{{START_TEST_OUTPUT}}'\\nPASSED test_calc.py::test_mean\\n+ : '{{END_TEST_OUTPUT}}'\\n")
report = get_eval_report(make_test_spec(rows[0]), found["toy__calc-1"], folder / "test_output.txt", include_tests_status=True)
(folder / "report.json").write_text(json.dumps(report))
print(make_run_report(found, rows, "toy-2", None, {str(job.work / "report")!r}))
"""
    done = subprocess.run([str(swebench / "python"), "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    outcome = benchmarks()["swe_bench_verified"].parse(job)
    assert outcome.problems == []
    assert outcome.items == {"toy__calc-1": 1.0}
    assert outcome.value == 100.0
    assert outcome.parts["resolved without a leak"] == 100.0
    script = f"""
import docker
docker.from_env = lambda *a, **k: None
from multi_swe_bench.harness.run_evaluation import Patch
for line in open({str(out)!r}):
    patch = Patch.from_json(line)
    print(patch.org, patch.repo, patch.number, len(patch.fix_patch) > 50)
"""
    done = subprocess.run([str(multi / "python"), "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["toy", "calc", "1", "True"]


def test_the_command_line(checkpoint, texts, tmp_path):
    """A measurement at two loop counts, and its report."""
    script = "import sys; from parloop.cli import main; sys.argv[0] = 'parloop'; main()"

    def parloop(*arguments):
        done = subprocess.run(
            [sys.executable, "-c", script, "eval", *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    said = parloop(
        "held_out",
        str(checkpoint),
        "--loops",
        "1",
        "2",
        "--data",
        f"held_out={texts[0]}",
        "--set",
        "held_out.length=128",
        "--limit",
        "6",
    )
    assert "held-out code, tiny@1: " in said
    assert "bits per byte, 6 items" in said
    said = parloop("--report", "runs/eval")
    assert "paired bootstrap over items" in said
    assert "not run" in said
    page = (tmp_path / "runs/eval/report.html").read_text()
    assert "tiny@2 minus tiny@1" in page
