"""The proxy between a tool and the server: what it counts, what it passes on, and when it gives up."""

import contextlib
import http.client
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from parloop.evaluate.meter import GIVE_UP, Meter, cost
from tests.helpers.scripted import Scripted

OK = {"text": "yes é"}
EVENTS = [
    {"choices": [{"delta": {"content": "a"}}], "usage": None},
    {"choices": [{"delta": {"content": "b"}}], "usage": {"prompt_tokens": 3, "completion_tokens": 1}},
    {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
    {"choices": []},
]
STREAM = "".join(f"data: {json.dumps(event)}\n\n" for event in EVENTS)


@pytest.fixture
def metered(tmp_path):
    """Starts a server that gives these replies, the last one again and again, and a meter before it."""
    with contextlib.ExitStack() as open_:

        def metered(*replies, **more):
            replies = list(replies)
            server = open_.enter_context(Scripted(lambda request: replies.pop(0) if len(replies) > 1 else replies[0]))
            return open_.enter_context(Meter(server.url, tmp_path / "log" / "requests.jsonl", **more).running()), server

        yield metered


def ask(meter, path="/chat/completions", **fields):
    """Status and body."""
    body = json.dumps({"model": "toy@2", "messages": []} | fields).encode()
    request = urllib.request.Request(meter.url + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def counted(meter):
    """Without the seconds."""
    found = cost(meter.log)
    assert found.pop("seconds") >= 0
    return found


def total(requests, failures, prompt_tokens, completion_tokens):
    return {
        "requests": requests,
        "failures": failures,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
    }


def test_answers_are_passed_on_and_counted(metered):
    meter, server = metered(OK)
    status, body = ask(meter, temperature=0.5)
    assert (status, json.loads(body)["choices"][0]["message"]["content"]) == (200, "yes é")
    assert server.requests == [{"model": "toy@2", "messages": [], "temperature": 0.5}]
    ask(meter, "/completions")
    assert counted(meter) == total(2, 0, 20, 10)
    assert (meter.failed_in_a_row, meter.last_failure, meter.given_up) == (0, "", False)
    with urllib.request.urlopen(meter.url + "/models") as answer:
        assert json.loads(answer.read()) == {"data": [{"id": "toy@2"}]}


def test_a_refusal_and_then_an_answer(metered):
    meter, _ = metered({"status": 429}, {"status": 429}, OK)
    status, body = ask(meter)
    assert (status, json.loads(body)["error"]["message"]) == (429, "scripted")
    ask(meter)
    assert meter.failed_in_a_row == 2
    assert ask(meter)[0] == 200
    assert meter.failed_in_a_row == 0
    assert meter.last_failure.startswith("429: ")
    assert counted(meter) == total(3, 2, 10, 5)


def test_it_gives_up_after_failures_in_a_row(metered):
    meter, _ = metered(*[{"status": 500}] * (GIVE_UP - 1), OK, {"status": 500})
    for _ in range(GIVE_UP):
        ask(meter)
    assert not meter.given_up  # the last one was answered
    for n in range(GIVE_UP):
        assert not meter.given_up
        assert ask(meter)[0] == 500, n
    assert meter.given_up
    assert meter.last_failure.startswith("500: ")


def test_other_paths_do_not_make_it_give_up(metered):
    """Some tools look for pages that only some servers have."""
    meter, _ = metered(OK)
    for _ in range(GIVE_UP + 1):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(meter.url + "/tokenizer_info")
    assert not meter.given_up


@pytest.mark.parametrize(
    ("reply", "status", "problem"),
    [
        ({"hang": 1.5}, 504, "no answer within 0.3 s"),
        ({"close": True}, 502, "RemoteDisconnected"),
        ({"raw": "{not json"}, 200, "an answer that is not JSON: {not json"),
        ({"raw": ""}, 200, "an answer that is not JSON"),
        ({"raw": "data: {torn\n\n"}, 200, "an event that is not JSON"),
        ({"status": 400}, 400, "400: "),
        ({"status": 503}, 503, "503: "),
    ],
)
def test_faults_are_passed_on_and_named(metered, reply, status, problem):
    meter, _ = metered(reply, request_seconds=0.3 if "hang" in reply else 60)
    got, body = ask(meter)
    assert got == status
    assert problem in meter.last_failure
    assert meter.failed_in_a_row == 1
    assert counted(meter) == total(1, 1, 0, 0)
    if "raw" in reply:
        assert body.decode() == reply["raw"]
    if status in (502, 504):  # our words, in OpenAI's form
        assert f"the server cannot be reached ({meter.last_failure})" == json.loads(body)["error"]["message"]


def test_a_server_that_is_gone(metered):
    meter, server = metered(OK)
    server.__exit__()
    status, body = ask(meter)
    assert status == 502
    assert "the server cannot be reached (ConnectionRefusedError" in json.loads(body)["error"]["message"]
    assert counted(meter) == total(1, 1, 0, 0)
    (entry,) = [json.loads(line) for line in meter.log.read_text().splitlines()]
    assert entry["status"] == 0


def test_another_server_takes_over(metered):
    """Such as our own server after a restart, at another port."""
    meter, server = metered({"close": True})
    ask(meter)
    with Scripted(lambda request: OK) as other:
        meter.upstream = other.url
        assert ask(meter)[0] == 200
    assert len(server.requests) == len(other.requests) == 1


def test_tokens_of_a_stream(metered):
    """The last usage that an event holds; none if the tool does not ask for it."""
    meter, _ = metered({"raw": STREAM + "data: [DONE]\n\n"}, {"raw": 'data: {"choices": []}\n\ndata: [DONE]\n\n'}, OK)
    assert ask(meter)[1].decode() == STREAM + "data: [DONE]\n\n"
    assert counted(meter) == total(1, 0, 3, 2)
    ask(meter)
    assert counted(meter) == total(2, 0, 3, 2)
    ask(meter, stream=True)
    assert counted(meter) == total(3, 0, 13, 7)


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("part", [STREAM, '{"choices": [{"mess'])
def test_half_an_answer_is_a_failure_on_both_sides(metered, part, chunked):
    """A stream that ends early would be taken for a whole one."""
    meter, _ = metered({"part": part, "chunked": chunked})
    with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
        ask(meter)
    assert "IncompleteRead" in meter.last_failure
    assert counted(meter) == total(1, 1, 0, 0)


def test_requests_at_the_same_time(metered):
    meter, server = metered(OK)
    with ThreadPoolExecutor(8) as pool:
        assert {status for status, _ in pool.map(lambda _: ask(meter), range(40))} == {200}
    assert len(server.requests) == 40
    assert counted(meter) == total(40, 0, 400, 200)


def test_the_port_is_kept_for_the_next_run(metered, tmp_path):
    """Tools that go on expect the address that they began with; if something else listens there now, it is another one."""
    _, server = metered(OK)
    (tmp_path / "port").write_text("torn")
    with Meter(server.url, tmp_path / "requests.jsonl").running() as first:
        pass
    with Meter(server.url, tmp_path / "requests.jsonl").running() as second:
        assert second.url == first.url
        ask(second)
        with Meter(server.url, tmp_path / "requests.jsonl").running() as third:
            assert third.url != second.url
            assert ask(third)[0] == 200
    with Meter(server.url, tmp_path / "requests.jsonl").running() as fourth:
        assert fourth.url == third.url


def test_costs_add_up_over_runs(metered, tmp_path):
    meter, server = metered(OK)
    ask(meter)
    with Meter(server.url, meter.log).running() as again:
        ask(again)
    meter.log.open("a").write('{"time": 1, "pro')  # torn, as the disk was full
    assert counted(meter) == total(2, 0, 20, 10)
    assert cost(tmp_path / "none") == total(0, 0, 0, 0) | {"seconds": 0.0}
