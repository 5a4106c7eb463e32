"""Several runs of a study at a time, a process each.

The threads of one small model wait for each other at every operation; separate runs do not. How much sooner a study finishes was not measured.
"""

import io
import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import torch
from rich.console import Console

from ..errors import RecipeError

MOST = 4  # default maximum, since each run needs its own memory

_messages: Any = None  # in a run's process: the queue for its steps


def default_jobs(device: str) -> int:
    """Return the number of concurrent runs: one on a GPU, otherwise one per thread that torch may use, at most MOST."""
    return 1 if device == "cuda" or torch.cuda.is_available() else min(MOST, torch.get_num_threads())


def side_by_side(
    work: Callable[..., Any], runs: list[Any], jobs: int, on_step: Callable[[int, int, float], None], console: Console
) -> list[Any]:
    """Call `work` for every run in several processes, and return its results in the order of the runs.

    Args:
        work: called in another process as `work(run, console=.., on_step=..)`. It and the runs must be picklable.
        jobs: number of processes; they share torch's threads.
        on_step: called in this process with a run's number, its step and its loss.
        console: where the runs' output is printed.

    Raises:
        RecipeError: a process was killed, most likely for lack of memory.
        Exception: the exception of a run; the others are stopped, and continue when the study is run again.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process that has used torch's threads may hang
    messages, others = context.SimpleQueue(), set(multiprocessing.active_children())
    threads = max(1, torch.get_num_threads() // jobs)
    results = [None] * len(runs)
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(messages, threads)) as pool:
        try:
            pending = {pool.submit(_run, work, run, number, console.width): number for number, run in enumerate(runs)}
            while pending:
                done, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                while not messages.empty():
                    on_step(*messages.get())
                for future in done:
                    results[pending.pop(future)], said = future.result()
                    console.print(said, end="", markup=False, highlight=False, soft_wrap=True)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise RecipeError(
                    f"a training process was killed, perhaps for lack of memory with {jobs} concurrent runs: run it again with --jobs 1."
                ) from error
            raise
    return results


def _begin(messages: Any, threads: int) -> None:
    global _messages
    _messages = messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the first process, which ends the others
    torch.set_num_threads(threads)


def _run(work: Callable[..., Any], run: Any, number: int, width: int) -> tuple[Any, str]:
    console = Console(file=io.StringIO(), width=width)
    result = work(run, console=console, on_step=partial(_report, number))
    return result, console.file.getvalue()  # type: ignore[attr-defined]


def _report(number: int, step: int, loss: float) -> None:
    _messages.put((number, step, loss))
