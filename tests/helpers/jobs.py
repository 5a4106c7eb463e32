"""Work that other processes can import."""

import os
import time


def double(run, console, on_step):
    """Return twice the number, and say so."""
    console.print(f"[{run}] has {threads()} thread")
    on_step(run, float(run))
    return 2 * run


def die(run, console, on_step):
    """End the process as the kernel does where memory is short."""
    os._exit(9)


def fail_first(run, console, on_step):
    """Fail as run 0, and take for ever as any other."""
    if run == 0:
        raise ValueError("run 0 failed")
    time.sleep(600)


def threads() -> int:
    """Return the threads that torch may use."""
    import torch

    return torch.get_num_threads()
