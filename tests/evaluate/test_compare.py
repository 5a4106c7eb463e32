"""Results side by side: intervals and tests by hand-worked values, what is paired with what, costs, and the files of the report."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest

from parloop.evaluate.benchmark import benchmarks
from parloop.evaluate.compare import Comparison, PairedTest, compare, interval_of
from parloop.evaluate.report import scores_against_loops, write_report
from parloop.statistics import mcnemar, wilson
from tests.helpers.results import BFCL, HELD_OUT, SPOKEN, SWE, passed, saved


def entry(folder, benchmark):
    """The benchmark's part of the comparison."""
    summary = compare([folder], folder)
    assert Comparison.load(folder) == Comparison.from_json(summary.to_json()) == summary
    assert Comparison.load(folder).folder == summary.folder == folder
    return next(entry for entry in summary.benchmarks if entry.benchmark == benchmark.name)


def ours(entry):
    return entry.ours


# Statistics


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    [
        (5, 0, 2 / 32),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (1, 9, 2 * (1 + 10) / 1024),
        (3, 3, 1.0),
        (0, 0, 1.0),
        (1, 0, 1.0),
        (0, 10, 2 / 1024),
    ],
)
def test_mcnemar(won, lost, p):
    """Twice the tail of a fair coin's throws, at most 1; what both or neither passes says nothing."""
    one = np.array([True] * won + [False] * lost + [True] * 20 + [False] * 30)
    other = np.array([False] * won + [True] * lost + [True] * 20 + [False] * 30)
    assert mcnemar(one, other) == pytest.approx(p)
    assert mcnemar(other, one) == pytest.approx(p)


def test_mcnemar_of_many_items():
    one = np.arange(1000) < 540
    assert mcnemar(one, ~one) == pytest.approx(0.0125, abs=1e-4)  # of a normal: (80 - 1) / sqrt(1000) is 2.498 deviations


@pytest.mark.parametrize(
    ("n_passed", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # these four are Newcombe's (1998), table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 1 - 0.1611, 1.0),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_wilson(n_passed, n, low, high):
    interval = wilson(n_passed, n)
    assert interval.as_list() == pytest.approx([n_passed / n, low, high], abs=5e-5)


def test_wilson_stays_within_none_and_all():
    """Whatever rounding says."""
    assert all(wilson(0, n).low >= 0.0 and wilson(n, n).high <= 1.0 for n in range(1, 500))


# Intervals of results


def test_shares_have_wilsons_interval(tmp_path):
    saved(tmp_path, BFCL, 1, passed("1" * 81 + "0" * 182))
    (row,) = ours(entry(tmp_path, BFCL))
    assert row.value == pytest.approx(100 * 81 / 263)
    assert row.interval == pytest.approx([25.53, 36.62], abs=5e-3)
    assert row.items == 263


def test_shares_of_samples_have_a_bootstrapped_one(tmp_path):
    rng = np.random.default_rng(1)
    values = rng.integers(0, 11, 200) / 10
    saved(tmp_path, BFCL, 1, {str(n): float(value) for n, value in enumerate(values)})
    (row,) = ours(entry(tmp_path, BFCL))
    error = 100 * values.std() / np.sqrt(200)
    assert row.interval == pytest.approx([row.value - 1.96 * error, row.value + 1.96 * error], abs=0.3 * error)


def test_a_loss_over_bytes(tmp_path):
    """Documents of other sizes: the value is over bytes, and so is its interval."""
    result = saved(tmp_path, HELD_OUT, 1, {"0": 1.0, "1": 3.0}, weights={"0": 300.0, "1": 100.0}, value=1.5)
    interval = interval_of(result)
    assert (interval.low, interval.value, interval.high) == (1.0, 1.5, 3.0)


@pytest.mark.parametrize("items", [passed("1" * 10), passed("0" * 10), dict.fromkeys("abc", 0.1), dict.fromkeys("abc", 0.7)])
def test_a_value_lies_in_its_interval(tmp_path, items):
    """Also with items that are all equal, however they are rounded."""
    saved(tmp_path, BFCL, 1, items)
    (row,) = ours(entry(tmp_path, BFCL))
    assert row.interval[0] <= row.value <= row.interval[1]
    assert scores_against_loops(compare([tmp_path], tmp_path))


def test_a_value_that_is_no_mean_of_items_has_none(tmp_path):
    saved(tmp_path, SPOKEN, 1, {"cpp/a": 1.0, "js/a": 0.0, "js/b": 0.0}, value=50.0)
    assert ours(entry(tmp_path, SPOKEN))[0].interval is None


@pytest.mark.parametrize("benchmark", [BFCL, HELD_OUT], ids=lambda benchmark: benchmark.name)
def test_one_item_has_no_interval_and_no_test(tmp_path, benchmark):
    """Bootstrapped over one item both would be no numbers, which JSON cannot hold."""
    for loops in (1, 2):
        saved(tmp_path, benchmark, loops, {"a": 0.3 * loops})
    found = entry(tmp_path, benchmark)
    assert [row.interval for row in ours(found)] == [None, None]
    assert [test.test for test in found.tests] == ["none: one item"]
    assert compare([tmp_path], tmp_path).format()


# What is compared


def test_the_same_items_are_paired(tmp_path):
    """In another order, and with other settings beside them."""
    saved(tmp_path, BFCL, 1, passed("1100000000"))
    saved(tmp_path, BFCL, 2, dict(reversed(passed("0111111110").items())))
    saved(tmp_path, BFCL, 4, passed("1100000000"), seed=9)
    found = entry(tmp_path, BFCL)
    (test,) = found.tests
    assert (test.base, test.other, test.test) == ("toy@1", "toy@2", "McNemar, exact")
    assert (test.won, test.lost, test.items) == (7, 1, 10)
    assert test.p == pytest.approx(2 * (1 + 8) / 256)
    assert test.difference == pytest.approx(60.0)
    assert len({row.settings for row in ours(found)}) == 2  # told apart


def test_other_items_are_not_paired(tmp_path):
    saved(tmp_path, BFCL, 1, passed("110"))
    saved(tmp_path, BFCL, 2, passed("1101"))
    (test,) = entry(tmp_path, BFCL).tests
    assert test == PairedTest("toy@1", "toy@2", "none: the items differ")


def test_each_is_tested_against_the_fewest_loops(tmp_path):
    for loops in (4, 2, 3):
        saved(tmp_path, BFCL, loops, passed("10"))
    assert [(test.base, test.other) for test in entry(tmp_path, BFCL).tests] == [
        ("toy@2", "toy@3"),
        ("toy@2", "toy@4"),
    ]


def test_unknown_loops_are_not_the_fewest(tmp_path):
    saved(tmp_path, BFCL, None, passed("11"), model="theirs")
    assert entry(tmp_path, BFCL).tests == []
    for loops in (2, 3):
        saved(tmp_path, BFCL, loops, passed("10"))
    assert [(test.base, test.other) for test in entry(tmp_path, BFCL).tests] == [
        ("toy@2", "toy@3"),
        ("toy@2", "theirs"),
    ]


@pytest.mark.parametrize("right", [1.0, 0.5])
def test_a_difference_of_means_that_are_not_the_values_says_so(tmp_path, right):
    """Values of MultiPL-E are means of languages."""
    saved(tmp_path, SPOKEN, 1, {"cpp/a": 0.0, "js/a": 0.0, "js/b": 0.0}, value=0.0)
    saved(tmp_path, SPOKEN, 2, {"cpp/a": right, "js/a": 0.0, "js/b": 0.0}, value=50.0 * right)
    (test,) = entry(tmp_path, SPOKEN).tests
    assert test.difference == pytest.approx(100 * right / 3)
    assert test.test.endswith(", of the items' means, not of the values")
    assert "of the items' means" in shown(compare([tmp_path], tmp_path))


def test_losses_are_paired_by_document_and_weighed_by_bytes(tmp_path):
    """The difference is that of the values."""
    sizes = {str(n): 100.0 * (1 + n % 4) for n in range(40)}
    one = {name: 1.0 + int(name) / 10 for name in sizes}
    two = {name: value - (0.2 if int(name) % 4 else 0.1) for name, value in one.items()}

    def total(losses):
        return sum(losses[name] * sizes[name] for name in losses) / sum(sizes.values())

    saved(tmp_path, HELD_OUT, 1, one, weights=sizes, value=total(one))
    saved(tmp_path, HELD_OUT, 2, two, weights=sizes, value=total(two))
    (test,) = entry(tmp_path, HELD_OUT).tests
    assert test.test == "paired bootstrap over items"
    assert test.difference == pytest.approx(total(two) - total(one))
    low, high = test.interval
    assert -0.2 <= low < test.difference < high < -0.15  # what documents have in common is taken out


def test_rows_say_who_measured_them(tmp_path):
    saved(tmp_path, BFCL, 2, passed("10"))
    summary = compare([tmp_path], tmp_path)
    assert [entry.benchmark for entry in summary.benchmarks] == list(benchmarks())
    for found in summary.benchmarks:
        paper = benchmarks()[found.benchmark].paper
        assert {int(loops): value for loops, value in found.paper.items()} == paper
        sources = [row.source for row in found.rows]
        if found.benchmark == "bfcl_v3":
            assert {row.loops: row.value for row in found.rows if row.source == "paper"} == paper
        else:  # a line each
            assert sources == ["not run"]
            assert all(str(value) in found.rows[0].model for value in paper.values())
        assert sources.count("ours") == (found.benchmark == "bfcl_v3")
        assert sources.count("not run") == (found.benchmark != "bfcl_v3")
        assert all(row.value is None for row in found.rows if row.source == "not run")
        assert all(row.interval is row.tokens_per_solved is None for row in found.rows if row.source == "paper")


def test_a_part_of_the_items_says_so(tmp_path):
    result = saved(tmp_path, BFCL, 2, passed("10"))
    (path,) = tmp_path.rglob("result.json")
    path.write_text(json.dumps(json.loads(result.to_json()) | {"settings": result.settings | {"limit": 5}}))
    assert ours(entry(tmp_path, BFCL))[0].limit == 5
    assert "first 5" in shown(compare([tmp_path], tmp_path))


# Costs


@pytest.mark.parametrize(
    ("items", "cost", "tokens", "seconds"),
    [
        (passed("1110"), (4, 900, 300, 60.0), 400.0, 20.0),
        ({"a": 0.5, "b": 0.25}, (2, 900, 300, 60.0), 1600.0, 80.0),
        (passed("0000"), (4, 900, 300, 60.0), None, None),
        (passed("11"), (0, 0, 0, 0.0), None, None),  # the tool did not ask through us
    ],
)
def test_cost_per_solved_item(tmp_path, items, cost, tokens, seconds):
    saved(tmp_path, BFCL, 2, items, cost=cost)
    (row,) = ours(entry(tmp_path, BFCL))
    assert (row.tokens_per_solved, row.seconds_per_solved) == (tokens, seconds)


def test_a_loss_solves_nothing(tmp_path):
    saved(tmp_path, HELD_OUT, 2, {"0": 1.5, "1": 2.0})
    assert ours(entry(tmp_path, HELD_OUT))[0].tokens_per_solved is None


# The report


@pytest.fixture
def summary(tmp_path):
    for loops, pattern in ((1, "1000000000"), (2, "1111111000")):
        saved(tmp_path, BFCL, loops, passed(pattern))
        saved(
            tmp_path,
            HELD_OUT,
            loops,
            {str(n): 1.0 / loops + n / 9 for n in range(9)},
            weights={str(n): 10.0 for n in range(9)},
            value=2.0,
        )
    leaks = {"item 0": [{"step": 3, "kind": "future commits", "command": "git log --all", "shown": 80}]}
    saved(tmp_path, SWE, 2, passed("10"), model="<b>org/[red]toy@2", parts={"leaks": leaks})
    saved(tmp_path, SWE, 2, passed("00"), temperature=1.0, cost=(0, 0, 0, 0.0))
    return compare([tmp_path], tmp_path)


def shown(summary):
    return summary.format(250)


def test_the_table(summary):
    lines = shown(summary).splitlines()
    (line,) = [line for line in lines if "toy@2" in line and "BFCL" not in line and "70.0" in line and "ours" in line]
    assert "39.7 .. 89.2" in line  # 7 of 10
    assert "143" in line  # 1,000 tokens over 7
    assert any("BFCL v3" in line and "toy@2 - toy@1" in line and "p = 0.0312, 6 won, 0 lost" in line for line in lines)
    assert any("<b>org/[red]toy@2" in line for line in lines)
    assert any("paper" in line and "40.1" in line for line in lines)
    rest = lines[next(n for n, line in enumerate(lines) if "not run: the paper's" in line) :]
    (line,) = [line for line in rest if "LiveCodeBench" in line]
    assert line.replace("│", " ").split() == ["LiveCodeBench", "27.4", "35.4", "28.6", "24.5"]
    assert sum(line.startswith("│") for line in rest) == len(benchmarks()) - 3  # a line each


class Links(HTMLParser):
    """Return the addresses that a page would fetch, and its text."""

    def __init__(self, html):
        super().__init__()
        self.links, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.links += [
            value for name, value in attributes if name in ("src", "href") and value and not value.startswith("#")
        ]

    def handle_data(self, data):
        self.text += data


def test_the_page(summary, tmp_path):
    summary.command = "parloop eval --report 'a b'"
    page = write_report(summary, tmp_path)
    assert page == tmp_path / "report.html"
    read = Links(page.read_text())
    assert [link for link in read.links if not link.startswith("data:")] == []
    for text in (
        "<b>org/[red]toy@2", "39.7 .. 89.2", "toy@2 minus toy@1", "McNemar, exact: p = 0.0312, 6 won, 0 lost", "not run",
        "parloop eval --report 'a b'", benchmarks()["bfcl_v3"].silent,
    ):  # fmt: skip
        assert text in read.text
    assert benchmarks()["mind2web"].silent not in read.text  # was not run
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in page.read_text()


def test_the_figure(summary):
    figure = scores_against_loops(summary)
    figure.draw_without_rendering()
    for axes in figure.axes:  # legends lie on no data, and nothing is cut off
        assert axes.get_legend().get_window_extent().y1 <= axes.xaxis.label.get_window_extent().y0
        assert axes.yaxis.label.get_window_extent().x0 >= 0
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}
    assert list(panels) == ["held-out code", "SWE-bench Verified", "BFCL v3"]
    bfcl = panels["BFCL v3"]
    lines = {container.get_label(): container[0].get_xydata().tolist() for container in bfcl.containers}
    assert lines == {"ours": [[1.0, 10.0], [2.0, 70.0]]}
    (paper,) = [line for line in bfcl.get_lines() if line.get_label() == "paper, 7B"]
    assert paper.get_xydata().tolist() == [[loops, value] for loops, value in BFCL.paper.items()]
    assert bfcl.get_xticks().tolist() == [1, 2, 3, 4]
    assert panels["held-out code"].get_ylabel() == "bits per byte"
    assert len(panels["SWE-bench Verified"].containers) == 2  # two settings, apart


def test_a_server_of_unknown_loops_has_a_row_and_no_point(tmp_path):
    saved(tmp_path, BFCL, None, passed("10"), model="theirs")
    summary = compare([tmp_path], tmp_path)
    assert "theirs" in shown(summary)
    assert (tmp_path / "report.html").exists()
    assert not any(axes.get_visible() for axes in scores_against_loops(summary).axes)


def test_settings_are_told_apart_in_the_table(tmp_path):
    """By the beginnings of their hashes, which may look like markup."""
    hashes = [saved(tmp_path, BFCL, 2, passed("10"), seed=seed).settings_hash[:6] for seed in range(4)]
    assert any(name[0].isalpha() for name in hashes)
    text = shown(compare([tmp_path], tmp_path))
    assert [name for name in hashes if f"[{name}]" not in text] == []


def test_many_settings_can_be_drawn(tmp_path):
    for seed in range(12):
        saved(tmp_path, BFCL, 2, passed("10"), seed=seed)
    assert len(scores_against_loops(compare([tmp_path], tmp_path)).axes[0].containers) == 12
