"""Advice for made-up models whose answer is known."""

import numpy as np
import pytest

from parloop.diagnosis import Diagnosis
from parloop.diagnosis.lenses import LENSES
from parloop.diagnosis.verdict import give_verdict


def made_up(R, n=40, noise=0.02, one_more=0.1, **lenses) -> Diagnosis:
    """A diagnosis with the given mean per loop of some lenses, and a little noise over samples."""
    rng = np.random.default_rng(0)
    values = {name: np.full((n, R), np.nan) for name in LENSES}
    defaults = {"effective_rank": [50.0] * R, "angular_change": [np.nan, *[0.0] * (R - 1)]}
    defaults |= {
        name: [np.nan, *[1 / max(R - 1, 1)] * (R - 1)] for name in ("share_output_shift", "output_shift", "offset_cost")
    }
    for name, means in (defaults | lenses).items():
        values[name] = np.array(means) + noise * rng.standard_normal((n, R))
    return Diagnosis(
        loops=R,
        trained_loops=R,
        values=values,
        one_more_loss=values["loss"][:, -1] + one_more,
        tokens=np.full(n, 100),
        by_layer={},
        gate_by_head=np.zeros((R, 1, 1)),
        head_cosines=np.ones((R, 1, 1)),
    )


def test_a_loop_that_does_not_lower_the_loss_is_dropped():
    verdict = give_verdict(made_up(3, loss=[3.0, 2.0, 2.3], effective_rank=[50, 60, 55]))
    assert (verdict.advice, verdict.loops) == ("drop", 2)
    assert "Drop loop 3" in verdict.headline
    assert verdict.signals[0].speaks == -1
    assert verdict.signals[1].speaks == -1


def test_several_idle_loops_are_dropped_at_once():
    verdict = give_verdict(made_up(4, loss=[2.0, 2.0, 2.0, 2.0]))
    assert (verdict.advice, verdict.loops) == ("drop", 1)
    assert "loops 2 to 4" in verdict.headline


def test_a_rising_rank_and_a_better_loss_suggest_one_more():
    verdict = give_verdict(made_up(2, loss=[3.0, 2.0], effective_rank=[50, 60]))
    assert (verdict.advice, verdict.loops) == ("try more", 3)
    assert "2 of 2 signals" in verdict.sureness


def test_a_falling_rank_keeps_the_count():
    verdict = give_verdict(made_up(2, loss=[3.0, 2.0], effective_rank=[60, 50]))
    assert (verdict.advice, verdict.loops) == ("keep", 2)
    assert "the effective rank falls" in verdict.headline


def test_a_useful_loop_that_the_other_lenses_doubt_is_kept_with_a_warning():
    verdict = give_verdict(
        made_up(
            3,
            loss=[3.0, 2.0, 1.9],
            angular_change=[np.nan, -0.5, -0.5],
            output_shift=[np.nan, 1.0, 0.1],
            offset_cost=[np.nan, 1.0, 1.0],
            share_output_shift=[np.nan, 0.9, 0.1],
        )
    )
    assert (verdict.advice, verdict.loops) == ("keep", 3)
    assert "a model trained with 2 may do as well" in verdict.headline
    assert [signal.speaks for signal in verdict.signals if signal.name in ("direction", "refinement", "scissors")] == [
        -1
    ] * 3


def test_it_says_what_it_cannot_know_and_when_samples_are_few():
    verdict = give_verdict(made_up(2, n=5, loss=[3.0, 2.0]))
    assert "5 samples are few" in verdict.sureness
    assert "trained with 3 would do" in verdict.limits
    alone = give_verdict(made_up(2, n=1, loss=[3.0, 2.0]))
    assert "nan" not in alone.headline + "".join(signal.seen for signal in alone.signals)


def test_one_loop_names_what_is_shown_and_why():
    verdict = give_verdict(made_up(1, loss=[2.0]))
    assert verdict.advice == "one loop"
    assert "effective rank" in verdict.sureness


def test_another_count_than_trained_is_mentioned():
    d = made_up(3, loss=[3.0, 2.0, 1.0])
    d.trained_loops = 2
    assert "not with the 2 it was trained for" in give_verdict(d).limits


@pytest.mark.parametrize("R", [2, 3, 4])
def test_every_verdict_has_its_evidence(R):
    verdict = give_verdict(made_up(R, loss=list(np.linspace(3, 2, R))))
    assert verdict.signals[-1].name == "one loop more"
    assert len(verdict.signals) == (3 if R == 2 else 6)
