"""Time variants side by side, and count the bytes of live tensors.

Machines are noisy, so variants are interleaved: every round runs each variant once, and ratios are taken within a round.
"""

import statistics
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import timer

Name = TypeVar("Name")
Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the median and the quartiles of at least one value; for a single value all three are equal."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * list(values)
        return cls(median, low, high)

    @classmethod
    def of_ratios(cls, values: Sequence[float], others: Sequence[float]) -> "Spread":
        """Return the median and the quartiles of the ratios within rounds."""
        return cls.of([value / other for value, other in zip(values, others, strict=True)])


def seconds_of(run: Callable[[], object]) -> float:
    """Return the seconds that a call takes; on a GPU until its work is done."""
    start = timer()
    run()
    return timer() - start


def interleaved(
    variants: Mapping[Name, Callable[[], Measured]],
    rounds: int,
    *,
    warm_up: int = 1,
    rotate: bool = False,
    before_round: Callable[[], object] | None = None,
    after_run: Callable[[], object] | None = None,
) -> dict[Name, list[Measured]]:
    """Run all variants once per round.

    Args:
        variants: name -> a call that measures itself; `functools.partial(seconds_of, run)` measures the time of `run`.
        rounds: number of rounds that count.
        warm_up: number of earlier rounds that do not count.
        rotate: begin every round with the next variant, so that none always follows the same one.
        before_round: called before every round, warm-up included.
        after_run: called after every run, warm-up included.

    Returns:
        name -> the values that its calls returned, one per round.
    """
    names = list(variants)
    measured: dict[Name, list[Measured]] = {name: [] for name in names}
    for number in range(warm_up + rounds):
        if before_round:
            before_round()
        first = number % len(names) if rotate else 0
        for name in names[first:] + names[:first]:
            value = variants[name]()
            if number >= warm_up:
                measured[name].append(value)
            if after_run:
                after_run()
    return measured


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensor storages after every operation, and their peak.

    Note: a later resize of a storage is missed, unless `resized` is true; all sizes are then read after every operation.

    Args:
        ignored: tensors that exist before, and do not count.
        resized: whether storages change their sizes, as FSDP's do.
    """

    def __init__(self, ignored: Iterable[torch.Tensor] = (), resized: bool = False) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self.resized = resized
        self._storages: dict[int, weakref.ref | None] = {t.untyped_storage()._cdata: None for t in ignored}

    @property
    def alive(self) -> int:
        """Bytes of live storages."""
        if not self.resized:
            return self._alive
        held = (ref() for ref in list(self._storages.values()) if ref is not None)
        return sum(storage.nbytes() for storage in held if storage is not None)

    def watch(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once, for its lifetime."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage)
            self._alive += size
            weakref.finalize(storage, self._release, key, size)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result) if self.resized else result):
            if isinstance(tensor, torch.Tensor):
                self.watch(tensor)
        self.peak = max(self.peak, self.alive)
        return result

    def _release(self, key: int, size: int) -> None:
        self._storages.pop(key, None)
        self._alive -= size


def reset_peak(device: torch.device) -> bool:
    """Reset the high-water mark of memory. Return False if the system cannot, so that the mark covers the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    """Return the high-water mark in bytes: of the allocator on a GPU, otherwise of the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
