"""Progress bars and tables for the terminal, in one style, within 100 columns."""

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..diagnosis.lenses import LENSES


def progress_bars(console: Console) -> Progress:
    """Bars with the time left; tasks have a field `loss`, which may be empty."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def _interval(values: list[float], sign: str = "") -> str:
    middle, low, high = values
    return f"{middle:{sign}.3f} ±{max(high - middle, middle - low):.3f}"


def study_tables(results: dict[str, Any]) -> list[Table]:
    """What each loop count gives, and what it costs."""
    base = results["base"]
    gives = Table(
        title="what each loop count gives: held-out loss in bits per byte, with 95% intervals", title_justify="left"
    )
    for name in ("R", "loss", f"difference\nto R = {base}", "read out after each loop", "next\ntoken"):
        gives.add_column(name, justify="right", no_wrap=True)
    costs = Table(title="what it costs", title_justify="left")
    for name in (
        "R",
        "params",
        "train\ntok/s",
        "train\ns",
        "prefill\nms",
        "decode\nms/tok",
        "a pass per\nloop",
        "cache\nB/tok",
        "train\nMB",
    ):
        costs.add_column(name, justify="right", no_wrap=True)
    for row in results["rows"]:
        n = row["loops"]
        style = "bold" if n == results["chosen"] else ""
        difference = "" if n == base else _interval(row["difference_to_base"], "+")
        gives.add_row(
            str(n),
            _interval(row["bits_per_byte"]),
            difference,
            ", ".join(f"{value:.2f}" for value in row["bits_per_byte_after_loop"]),
            f"{100 * row['next_token_accuracy']:.1f}%",
            style=style,
        )
        costs.add_row(
            str(n),
            f"{row['parameters'] / 1e6:.2f}M",
            f"{row['training_tokens_per_second']:,.0f}",
            f"{row['training_seconds']:,.0f}",
            f"{row['prefill_ms']:.1f}",
            f"{row['decode_ms']:.2f}",
            f"{row['decode_pass_per_loop_ms']:.2f}",
            f"{row['cache_bytes']['per_token']:,.0f}",
            f"{row['peak_training_bytes'] / 1e6:,.0f}",
            style=style,
        )
    return [gives, costs]


def diagnosis_table(record: dict[str, Any]) -> Table:
    """One checkpoint's lenses, a column per loop, with 95% intervals."""
    loops = record["diagnosis"]["loops"]
    table = Table(title=f"{escape(record['checkpoint'])}: what each loop adds and costs", title_justify="left")
    table.add_column("lens (unit)")
    for loop in range(1, loops + 1):
        table.add_column(f"loop {loop}", justify="right", no_wrap=True)
    for name, lens in LENSES.items():
        values = record["diagnosis"]["summary"][name]
        if any(value is not None for value in values):
            table.add_row(f"{lens.title} ({lens.unit})", *[_short(value) for value in values])
    return table


def _short(value: list[float] | None) -> str:
    if value is None:
        return ""
    mean, low, high = value
    return f"{mean:.3g}" if low is None else f"{mean:.3g} ±{max(high - mean, mean - low):.1g}"


def _digits(value: float) -> str:
    """Three significant digits, or all of the integer part."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _quartiles(spread: dict[str, float] | None) -> str:
    return "" if spread is None else f"{_digits(spread['low'])}..{_digits(spread['high'])}"


def _ratio(spread: dict[str, float] | None) -> str:
    return "" if spread is None else f"{spread['median']:.2f}"


def bench_tables(results: dict[str, Any]) -> list[Table]:
    """A table per block: one line for each loop count and way to run it."""
    return [_bench_table(block) for block in results["blocks"]]


def _bench_table(block: dict[str, Any]) -> Table:
    decode = block["phase"] == "decode"
    rate = block["read_bytes_per_second"]["median"] / 1e9
    title = f"{block['phase']}, {block['tokens']:,} tokens, batch {block['batch_size']}"
    table = Table(
        title=f"{title}  (memory read at {_digits(rate)} GB/s)",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    speed = ("weights\nGB/s", "of\nread") if decode else ("tokens\nper s",)
    for name in (
        "ms per\ntoken" if decode else "ms",
        "quartiles",
        "over\nR = 1",
        "quartiles",
        "over\nLlama",
        *speed,
        "cache\nMB",
        "peak\nGB",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for row in block["rows"]:
        if decode:
            speeds = [
                _digits(row["weight_bytes_per_second"]["median"] / 1e9),
                f"{100 * row['bandwidth_share']['median']:.0f}%",
            ]
        else:
            speeds = [_digits(1e3 * block["tokens"] * block["batch_size"] / row["ms"]["median"])]
        table.add_row(
            row["label"],
            _digits(row["ms"]["median"]),
            _quartiles(row["ms"]),
            _ratio(row["over_one_loop"]),
            _quartiles(row["over_one_loop"]),
            _ratio(row["over_llama"]),
            *speeds,
            _digits(row["cache"]["bytes"] / 1e6),
            _digits(row["peak_bytes"] / 1e9),
        )
    return table


def bench_legend(results: dict[str, Any]) -> str:
    """What the lines and columns of the tables are."""
    settings = results["settings"]
    fastest = max(results["read_bandwidth"], key=results["read_bandwidth"].get)
    lines = {
        "R = n": "n loops in one pass over the weights. One copy of the weights serves all lines.",
        "pass per loop": "the scheme of the vendor's server, not their code.",
        "whole prompt": "all loops on all of it, as without the exact tail.",
        "Llama": "transformers' LlamaForCausalLM of the same shape on the same weights.",
        "compiled": "static cache and torch.compile; compared with R = 1 and Llama compiled as well.",
        "tokens": f"of the prompt; for decode those cached when {settings['steps']} timed steps begin (random values).",
        "ms, over": f"medians over {settings['repeats']} rounds, each running every line once; ratios taken within rounds.",
        "weights GB/s": "bytes of weights that a step reads, over its time.",
        "of read": f"that, over the rate at which memory is read ({fastest}).",
        "cache MB": "keys, values and carried states after the run, all sequences of the batch.",
        "peak GB": "most memory held in a run: on a CPU by the process, on a GPU by torch's allocator.",
    }
    labels = " ".join(row["label"] for block in results["blocks"] for row in block["rows"])
    hidden = {name for name in ("pass per loop", "whole prompt", "Llama", "compiled") if name not in labels}
    if all(block["phase"] == "prefill" for block in results["blocks"]):
        hidden |= {"weights GB/s", "of read"}
    return "\n".join(f"{name + ':':15}{text}" for name, text in lines.items() if name not in hidden)


def _count(number: float) -> str:
    """Of parameters: 7.616B, 2.9M."""
    return f"{number / 1e9:.3f}B" if number >= 1e8 else f"{number / 1e6:.1f}M" if number >= 1e5 else f"{number:,.0f}"


def plan_tables(plan: dict[str, Any]) -> list[Any]:
    """What a recipe takes: parameters, FLOPs and days against the loop count, memory of every GPU."""
    from ..train.plan import GPU_BYTES, PEAK_FLOPS, ROOM, UTILISATION

    recipe, config, counted = plan["recipe"], plan["config"], plan["parameters"]
    parts = f"{_count(counted['layers'])} in {config.num_hidden_layers} layers (gates {_count(counted['gates'])})"
    lines = [
        f"{_count(counted['total'])} parameters: {parts}, embedding {_count(counted['embedding'])}, head {_count(counted['head'])}"
    ]
    if plan["tokens"]:
        lines.append(
            f"{plan['tokens']:,} tokens in {plan['steps']:,} steps of {recipe.batch_size:,} rows of {recipe.length:,} tokens"
        )
    unit, flop = ("GFLOPs", 1e9) if plan["flops"][1] >= 1e9 else ("MFLOPs", 1e6)
    time, per_day = ("days", 1) if plan["days"][1][1] >= 1 else ("hours", 24)
    costs = Table(title="training, against the loop count", title_justify="left")
    costs.add_column("R", justify="right")
    costs.add_column(f"{unit}\nper token", justify="right")
    costs.add_column("over\nR = 1", justify="right")
    if plan["tokens"]:
        for gpus in plan["days"]:
            costs.add_column(f"{time} on\n{gpus} GPUs", justify="right")
    for n, flops in plan["flops"].items():
        spent = [by_loops[n] * per_day for by_loops in plan["days"].values()] if plan["tokens"] else []
        style = "bold" if n == plan["loops"] else ""
        shown = [f"{value:,.1f}" if value >= 0.1 else "< 0.1" for value in spent]
        costs.add_row(str(n), f"{flops / flop:,.1f}", f"{flops / plan['flops'][1]:.2f}", *shown, style=style)
    size, byte = ("GB", 1e9) if max(row["memory"].total for row in plan["gpus"]) >= 1e9 else ("MB", 1e6)
    memory = Table(
        title=f"{size} on every GPU, R = {plan['loops']}, recomputed: {recipe.gradient_checkpointing}", title_justify="left"
    )
    for name in ("GPUs", "accum.", "rows", "gather", "states", "weights", "activ.", "logits", "again", "grads", "peak"):
        memory.add_column(name, justify="right", no_wrap=True)
    for row in plan["gpus"]:
        m = row["memory"]
        held = (m.states, m.gathered + m.cast, m.activations, m.logits, m.recomputed, m.gradients)
        total = f"{m.total / byte:.1f}" + (" !" if m.total > GPU_BYTES * ROOM else "")
        how = (str(row["gpus"]), str(row["accumulation"]), str(row["rows"]), row["gather"] if row["gpus"] > 1 else "")
        memory.add_row(*how, *(f"{part / byte:.1f}" for part in held), total)
    notes = (
        f"{time.capitalize()} at {UTILISATION:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s per GPU (an H100 in bfloat16); what is recomputed does not count as "
        f"work. Memory in bfloat16 with FSDP2, for the smallest gradient_accumulation (accum.) that leaves {1 - ROOM:.0%} of {GPU_BYTES / 1e9:.0f} GB to "
        f"kernels and the allocator; ! does not. rows: at a time on a GPU. states: weights, gradients and Adam, sharded. weights: gathered, or cast. "
        f"again: a layer or loop that is recomputed. grads: sums over loops, before they are scattered. The peak is less than the sum, "
        f"since not all is there at once. Numbers of GPUs that do not divide batch_size={recipe.batch_size} are left out."
    )
    return ["\n".join(lines), costs, memory, notes]


def benchmark_table() -> Table:
    """What `parloop eval` can run, and what it takes."""
    from ..evaluate.benchmark import benchmarks

    table = Table(title="benchmarks", title_justify="left")
    table.add_column("name", no_wrap=True)
    for name in ("measures", "by", "needs", "hours", "paper, R = 1 / 2 / 3 / 4"):
        table.add_column(name, overflow="fold")
    for b in benchmarks().values():
        needs = [f"{b.needs.disk_gb:g} GB disk"]
        needs += ["Docker"] if b.needs.docker else []
        needs += ["bubblewrap"] if b.needs.sandbox else []
        needs += [f"Python {'.'.join(map(str, e.python))}" for e in b.environments if e.python > (3, 11)]
        needs += ["network"] if b.needs.network else []
        paper = " / ".join(f"{value:g}" for value in b.paper.values())
        table.add_row(b.name, b.measures, b.tool, ", ".join(needs), f"{b.needs.hours:g}", paper)
    return table


def evaluation_tables(summary: dict[str, Any]) -> list[Table]:
    """Of what was run a table of results and one of the tests between loop counts; of what was not, a line each."""
    table = Table(title="results: ours, and the paper's", title_justify="left")
    for name in ("benchmark", "by", "R", "model"):
        table.add_column(name)
    for name in ("value", "95% interval", "items", "tokens per\nsolved", "seconds per\nsolved", "leaks"):
        table.add_column(name, justify="right")
    tests = Table(title="against the fewest loops, on the same items", title_justify="left")
    for name in ("benchmark", "compared", "difference", "test"):
        tests.add_column(name)
    counts = sorted({loops for entry in summary["benchmarks"] for loops in entry["paper"]})
    others = Table("benchmark", *(f"R = {loops}" for loops in counts), title="not run: the paper's", title_justify="left")
    for entry in summary["benchmarks"]:
        if entry["rows"][0]["source"] == "not run":
            others.add_row(
                entry["title"], *(f"{entry['paper'][loops]:.1f}" if loops in entry["paper"] else "" for loops in counts)
            )
            continue
        shown = entry["title"]
        for row in entry["rows"]:
            value = "" if row["value"] is None else f"{row['value']:.4f}" if entry["unit"] != "%" else f"{row['value']:.1f}"
            interval = row.get("interval")
            spread = (
                "" if not interval else " .. ".join(f"{x:.1f}" if entry["unit"] == "%" else f"{x:.4f}" for x in interval)
            )
            model = escape(row["model"]) + (f", first {row['limit']}" if row.get("limit") else "")
            model += escape(f" [{row['settings'][:6]}]") if row.get("settings") else ""
            costs = [f"{row[key]:,.0f}" if key in row else "" for key in ("tokens_per_solved", "seconds_per_solved")]
            table.add_row(
                shown,
                row["source"],
                str(row["loops"] or ""),
                model,
                value,
                spread,
                str(row.get("items", "")),
                *costs,
                str(row.get("leaks", "")),
            )
            shown = ""
        for test in entry["tests"]:
            compared = f"{escape(test['other'])} - {escape(test['base'])}"
            if "difference" not in test:
                tests.add_row(entry["title"], compared, "", test["test"])
                continue
            detail = (
                f"p = {test['p']:.3g}, {test['won']} won, {test['lost']} lost"
                if "p" in test
                else " .. ".join(f"{x:+.4f}" for x in test["interval"])
            )
            tests.add_row(entry["title"], compared, f"{test['difference']:+.4g}", f"{test['test']}: {detail}")
    return [part for part in (table, tests, others) if part.row_count]
