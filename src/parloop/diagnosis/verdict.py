"""From lenses to advice: keep the loop count, drop a loop, or try one more; with the evidence and its limits.

The rule, in this order:

1. If the last loop does not lower the loss on the same text (paired 95% interval), drop to the smallest loop whose loss is
   within the paired interval of the last one's. A loop's state does not depend on the loops after it, so its loss is exactly that of
   the same checkpoint run with so many loops.
2. Otherwise, if the effective rank still rises into the last loop, and for R > 2 the loop continues in its direction or has at least an
   equal share of the output shift, a model with one more loop may pay: train one.
3. Otherwise keep R.
"""

import math
from dataclasses import dataclass, field

from ..statistics import Interval
from .diagnosis import Diagnosis

FEW_SAMPLES = 20


@dataclass
class Signal:
    """One piece of evidence: the observation, and whether it speaks for the last loop (1), against it (-1) or neither (0)."""

    name: str
    seen: str
    speaks: int


@dataclass
class Verdict:
    """Advice in one line, its confidence, the evidence, and its limits."""

    advice: str  # "keep", "drop", "try more" or "one loop"
    loops: int  # the loop count that it recommends
    headline: str
    sureness: str
    limits: str
    signals: list[Signal] = field(default_factory=list)


def give_verdict(d: Diagnosis) -> Verdict:
    """Return the advice that follows from a diagnosis."""
    if d.loops == 1:
        return _one_loop(d)
    R = d.loops
    loss, rank = d.change("loss", R), d.change("effective_rank", R)
    turn, share = d.mean("angular_change", R), d.mean("share_output_shift", R)
    equal = 1 / (R - 1)
    signals = [
        Signal("loss", f"loop {R} changes it by {_signed(loss)} nats per token", -_sign(loss)),
        Signal("effective rank", f"{_signed(rank, 1)} directions from loop {R - 1} to {R}", _sign(rank)),
    ]
    if R > 2:  # at loop 2 these carry no information: the step before starts at the embedding, and no other loop has a share
        against = Interval(share.value - equal, share.low - equal, share.high - equal)
        signals += [
            Signal("direction", f"angular change {_signed(turn, 2)}: {_turn(turn)}", _sign(turn)),
            Signal(
                "refinement",
                f"{share.value:.0%} of the output shift is its own; an equal share is {equal:.0%}",
                _sign(against),
            ),
            _scissors(d),
        ]
    untrained = f"loop {R + 1}, run without having been trained, changes the loss by {_signed(d.one_more())} nats per token"

    if loss.high >= 0:
        kept = next(r for r in range(1, R) if d.change("loss", r, since=R).low <= 0)
        advice, loops = "drop", kept
        gone = f"loop {R}" if kept == R - 1 else f"loops {kept + 1} to {R}"
        headline = (
            f"Drop {gone}: run this model with {kept} loop{'s' if kept > 1 else ''}. Loop {R} does not lower the loss "
            f"({_signed(loss)} nats per token)."
        )
        agree = sum(signal.speaks < 0 for signal in signals)
    elif _sign(rank) > 0 and (_sign(turn) > 0 or R == 2 or share.value >= equal):
        advice, loops = "try more", R + 1
        headline = (
            f"Keep {R} loops for this model, and try training one with {R + 1}: loop {R} lowers the loss by {-loss.value:.3f} nats "
            f"per token, and the effective rank still rises."
        )
        agree = sum(signal.speaks > 0 for signal in signals)
    else:
        advice, loops = "keep", R
        headline = f"Keep {R} loops: loop {R} lowers the loss by {-loss.value:.3f} nats per token"
        headline += ", but the effective rank falls." if _sign(rank) < 0 else "."
        agree = sum(signal.speaks > 0 for signal in signals)
        if R > 2 and 2 * agree < len(signals):
            headline += f" Most other lenses speak against loop {R}: a model trained with {R - 1} may do as well."
    sureness = f"{agree} of {len(signals)} signals point this way; the loss decides, measured on {d.samples} samples."
    if d.samples < FEW_SAMPLES:
        sureness += f" {d.samples} samples are few: take 50 or more before acting on this."
    return Verdict(advice, loops, headline, sureness, _limits(d), [*signals, Signal("one loop more", untrained, 0)])


def _one_loop(d: Diagnosis) -> Verdict:
    more = d.one_more()
    return Verdict(
        "one loop",
        1,
        "One loop: there is nothing to compare yet.",
        "Shown are the lenses that need no second loop: step size, effective rank, attention entropy, head diversity, logit-lens "
        "rank, output entropy and loss, and the gap to a second loop that was never trained. The others compare loops.",
        "A model trained with one loop says nothing about what two would give: train both (parloop study).",
        [Signal("one loop more", f"loop 2, never trained, changes the loss by {_signed(more)} nats per token", 0)],
    )


def _scissors(d: Diagnosis) -> Signal:
    """Compare gain with cost: Δp of the last loop and Ω, both relative to loop 2's."""
    R = d.loops
    gain = d.mean("output_shift", R).value / max(d.mean("output_shift", 2).value, 1e-12)
    cost = d.mean("offset_cost", R).value / max(d.mean("offset_cost", 2).value, 1e-12)
    open_ = "the scissors open" if gain < cost else "the scissors stay closed"
    seen = f"Δp of loop {R} is {gain:.2f} times loop 2's, its offset cost {cost:.2f} times: {open_}"
    return Signal("scissors", seen, -1 if gain < cost else 1)


def _limits(d: Diagnosis) -> str:
    text = (
        f"This describes one model trained with {d.trained_loops} loops. Its earlier loops were never trained to predict, so their "
        f"losses say what this model loses with fewer loops, not what a model trained with fewer would reach; and nothing here "
        f"shows how a model trained with {d.loops + 1} would do. Only training them does (parloop study)."
    )
    if d.loops != d.trained_loops:
        text += f" Besides, it was run with {d.loops} loops, not with the {d.trained_loops} it was trained for."
    return text


def _sign(interval: Interval) -> int:
    """Return 1 or -1 if the interval excludes zero, otherwise 0."""
    return 1 if interval.low > 0 else -1 if interval.high < 0 else 0


def _signed(interval: Interval, digits: int = 3) -> str:
    if math.isnan(interval.low):  # one sample
        return f"{interval.value:+.{digits}f}"
    return f"{interval.value:+.{digits}f} ({interval.low:+.{digits}f} to {interval.high:+.{digits}f})"


def _turn(interval: Interval) -> str:
    return {1: "it continues in its direction", -1: "it undoes part of the last step", 0: "no clear direction"}[
        _sign(interval)
    ]
