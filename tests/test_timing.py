"""Interleaved timing and live bytes, on calls and tensors whose numbers are known."""

from functools import partial

import pytest
import torch

from parloop.timing import LiveBytes, Spread, interleaved, seconds_of


def test_every_round_runs_each_variant_once_in_turn():
    calls = []

    def run(name):
        calls.append(name)
        return len(calls)

    hooks: dict[str, int] = {"rounds": 0, "runs": 0}

    def count(what):
        hooks[what] += 1

    measured = interleaved(
        {name: partial(run, name) for name in "abc"}, 2, rotate=True, before_round=partial(count, "rounds"),
        after_run=partial(count, "runs"),
    )  # fmt: skip
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert measured == {"a": [6, 8], "b": [4, 9], "c": [5, 7]}  # the first round warms up
    assert hooks == {"rounds": 3, "runs": 9}
    calls.clear()
    interleaved({name: partial(run, name) for name in "ab"}, 2, warm_up=0)
    assert "".join(calls) == "abab"


def test_spreads():
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    assert Spread.of_ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == Spread(2.0, 1.5, 2.5)
    with pytest.raises(ValueError, match="zip"):
        Spread.of_ratios([1.0, 2.0], [1.0])


def test_seconds_of_a_call():
    import time

    assert 0.01 <= seconds_of(lambda: time.sleep(0.01)) < 1


@pytest.mark.parametrize("resized", [False, True])
def test_live_bytes_and_their_peak(resized):
    there = torch.zeros(1000)
    with LiveBytes(ignored=[there], resized=resized) as live:
        a = torch.zeros(1000)
        b = a + there
        view = b[:10]
        del a
        c = b * 2
        del b, c
        assert live.alive == 4000  # the view keeps b's storage
        del view
    assert live.peak == 2 * 4000
    assert live.alive == 0


def test_storages_that_are_resized():
    """FSDP frees gathered weights this way."""
    with LiveBytes(resized=True) as live:
        a = torch.zeros(1000)
        a.untyped_storage().resize_(0)
        b = torch.zeros(500)
        assert live.alive == 2000
    assert live.peak == 4000
    del a, b
