"""The result of a bench, and its tables on a terminal."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..result import Result, not_kept
from ..timing import Spread
from .settings import Settings
from .variants import PLAIN, Variant


@dataclass
class CacheReport:
    """Bytes of a cache after a run.

    Attributes:
        bytes: bytes of keys, values and carries of all sequences.
        parts: the same by kind: full, window, carry.
        formula: expected bytes of each kind.
        over_formula: bytes over the sum of the expected ones.
        storage_bytes: bytes of the storages behind the tensors.
    """

    bytes: int
    parts: dict[str, int]
    formula: dict[str, int]
    over_formula: float
    storage_bytes: int


@dataclass
class Row:
    """One variant in one block.

    Attributes:
        label: its name in tables.
        variant: the model, the loop count and the way to run it.
        kind: the way to run it, in words.
        ms: milliseconds of the prefill, or per decode step, over rounds.
        ms_rounds: milliseconds of every round.
        over_one_loop: ratio to R = 1, taken within rounds.
        over_llama: ratio to the Llama, taken within rounds.
        weight_bytes: bytes of weights that a decode step reads; None for a prefill.
        weight_bytes_per_second: these bytes over the step's time.
        bandwidth_share: this rate over the machine's read bandwidth.
        cache: the cache after a run.
        peak_bytes: peak memory of a run.
        over_plain: of quantised weights, ratios within rounds to the same line with plain ones.
    """

    label: str
    variant: Variant
    kind: str
    ms: Spread
    ms_rounds: list[float]
    over_one_loop: Spread | None
    over_llama: Spread | None
    weight_bytes: int | None
    weight_bytes_per_second: Spread | None
    bandwidth_share: Spread | None
    cache: CacheReport
    peak_bytes: int
    over_plain: Spread | None = None


@dataclass
class BlockResult:
    """All variants at one length and batch size.

    Attributes:
        phase: prefill or decode.
        tokens: tokens of the prompt, or in the cache when the timed decode steps begin.
        context_range: first and last context of the timed decode steps; None for a prefill.
        batch_size: sequences at a time.
        read_bytes_per_second: read bandwidth of the memory, measured before every round.
        peak_is_of: whose memory `peak_bytes` is: the variant, or the process so far.
        rows: one per variant.
    """

    phase: str
    tokens: int
    context_range: list[int] | None
    batch_size: int
    read_bytes_per_second: Spread
    peak_is_of: str
    rows: list[Row]

    @property
    def key(self) -> tuple[str, int, int]:
        """Phase, tokens and batch size."""
        return self.phase, self.tokens, self.batch_size


@dataclass
class Skipped:
    """A block that was not measured, and why."""

    phase: str
    tokens: int
    batch_size: int
    reason: str


@dataclass
class BenchResult(Result):
    """Prefill and decode at every loop count, side by side.

    Attributes:
        settings: settings that all blocks share.
        environment: machine and versions.
        commands: the commands that made it.
        model: name, parameters, bytes, attention and configuration.
        read_bandwidth: way of reading memory -> bytes per second.
        blocks: ordered by phase, batch size and length.
        skipped: blocks that the last command left out.
        folder: folder of the files.
    """

    FORMAT: ClassVar[int] = 2

    settings: Settings
    environment: dict[str, Any]
    commands: list[str] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    read_bandwidth: dict[str, float] = field(default_factory=dict)
    blocks: list[BlockResult] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    folder: Path | None = not_kept(default=None)

    def add(self, block: BlockResult) -> None:
        """Insert a block, keeping the order of blocks."""
        self.blocks = sorted([*self.blocks, block], key=lambda one: (one.phase, one.batch_size, one.tokens))

    def shown(self) -> list[Any]:
        """Return what `rich` prints of the result."""
        from rich.text import Text

        return [*(_table(block) for block in self.blocks), Text(self.legend() + "\n")]

    def legend(self) -> str:
        """Return explanations of the tables' lines and columns."""
        variants = [row.variant for block in self.blocks for row in block.rows]
        packed = any(v.weights != PLAIN for v in variants)
        decode = any(block.phase == "decode" for block in self.blocks)
        fastest = max(self.read_bandwidth, key=lambda way: self.read_bandwidth[way])
        repeats, steps = self.settings.repeats, self.settings.steps
        lines = {
            "R = n": (True, "n loops in one pass over the weights. One copy of the weights serves all lines."),
            "pass per loop": (any(not v.one_pass for v in variants), "the scheme of the vendor's server, not their code."),
            "whole prompt": (any(not v.tail for v in variants), "all loops on the whole prompt, as without the exact tail."),
            "Llama": (
                any(v.llama for v in variants),
                "transformers' LlamaForCausalLM of the same shape on the same weights.",
            ),
            "int8, int4": (
                packed,
                "weights as parloop quantize makes them; over R = 1 of the same weights, and over plain weights at the same R.",
            ),
            "compiled": (
                any(v.compiled for v in variants),
                "static cache and torch.compile; compared with R = 1 and Llama compiled as well.",
            ),
            "tokens": (True, f"of the prompt; for decode those cached when {steps} timed steps begin (random values)."),
            "ms, over": (True, f"medians over {repeats} rounds, each running every line once; ratios taken within rounds."),
            "weights GB/s": (decode, "bytes of weights that a step reads, over its time."),
            "of read": (decode, f"this rate over the machine's read bandwidth ({fastest})."),
            "cache MB": (not packed, "keys, values and carries after the run, all sequences of the batch."),
            "peak GB": (not packed, "peak memory of a run: on a CPU of the process, on a GPU of torch's allocator."),
        }
        return "\n".join(f"{name + ':':15}{text}" for name, (shown, text) in lines.items() if shown)


def _table(block: BlockResult) -> Any:
    """Return a block's table: one line for each loop count and way to run it."""
    from rich import box
    from rich.table import Table

    decode = block.phase == "decode"
    title = f"{block.phase}, {block.tokens:,} tokens, batch {block.batch_size}"
    rate = _digits(block.read_bytes_per_second.median / 1e9)
    table = Table(
        title=f"{title}  (memory read at {rate} GB/s)", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip
    table.add_column("", no_wrap=True)
    speed = ("weights\nGB/s", "of\nread") if decode else ("tokens\nper s",)
    times = ("ms per\ntoken" if decode else "ms", "quartiles", "over\nR = 1", "quartiles")
    # A table about weights has no room for Llama and for memory.
    packed = any(row.over_plain for row in block.rows)
    compared = ("over\nplain", "quartiles") if packed else ("over\nLlama",)
    for name in (*times, *compared, *speed, *(() if packed else ("cache\nMB", "peak\nGB"))):
        table.add_column(name, justify="right", no_wrap=True)
    for row in block.rows:
        if row.weight_bytes_per_second is not None and row.bandwidth_share is not None:
            rates = _digits(row.weight_bytes_per_second.median / 1e9), f"{100 * row.bandwidth_share.median:.0f}%"
        else:
            rates = (_digits(1e3 * block.tokens * block.batch_size / row.ms.median),)  # type: ignore[assignment]
        over = (_ratio(row.over_plain), _quartiles(row.over_plain)) if packed else (_ratio(row.over_llama),)
        memory = () if packed else (_digits(row.cache.bytes / 1e6), _digits(row.peak_bytes / 1e9))
        table.add_row(
            row.label, _digits(row.ms.median), _quartiles(row.ms), _ratio(row.over_one_loop), _quartiles(row.over_one_loop),
            *over, *rates, *memory,
        )  # fmt: skip
    return table


def _digits(value: float) -> str:
    """Format with three significant digits, or all digits of the integer part."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _quartiles(spread: Spread | None) -> str:
    return "" if spread is None else f"{_digits(spread.low)}..{_digits(spread.high)}"


def _ratio(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.2f}"
