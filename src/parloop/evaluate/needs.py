"""Check whether this machine meets a benchmark's requirements."""

import importlib.util
import os
import shutil
import socket
import subprocess
from dataclasses import dataclass

from . import sandbox
from .benchmark import Benchmark, Job
from .environments import interpreter


@dataclass
class Check:
    """A requirement: whether it is met, and the remedy if not."""

    what: str
    met: bool
    remedy: str = ""


def check(benchmark: Benchmark, job: Job) -> list[Check]:
    """Check all requirements of a benchmark."""
    needs, checks = benchmark.needs, []
    for environment in benchmark.environments:
        version = ".".join(map(str, environment.python))
        found = interpreter(environment) is not None
        checks.append(Check(f"Python {version} or newer for {environment.name}", found, f"install python{version}"))
    if needs.docker:
        checks.append(Check("Docker, running", *_docker()))
    if needs.sandbox:
        problem = sandbox.problem()
        checks.append(Check("bubblewrap", not problem, problem))
    checks += [Check(f"the program {name}", shutil.which(name) is not None, f"install {name}") for name in needs.commands]
    checks += [
        Check(f"the package {name}", importlib.util.find_spec(name) is not None, 'pip install "parloop[eval]"')
        for name in needs.packages
    ]
    existing = next(folder for folder in (job.folder, *job.folder.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free / 1e9
    checks.append(
        Check(
            f"{needs.disk_gb:g} GB of disk",
            free >= needs.disk_gb,
            f"{existing} has {free:.1f} GB free: choose another --output",
        )
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    needed = max(needs.memory_gb, benchmark.memory_gb(job))
    checks.append(Check(f"{needed:.3g} GB of memory", memory >= needed, f"this machine has {memory:.0f} GB"))
    copy = f", or give a local copy, --data {benchmark.name}=PATH (docs/evaluation.md)" if benchmark.reads_data else ""
    hosts = dict.fromkeys(needs.network if job.data is None else (), copy) | dict.fromkeys(needs.registries, "")
    checks += [
        Check(f"the network, {host}", _reachable(host), f"{host} cannot be reached: check the connection{instead}")
        for host, instead in hosts.items()
    ]
    return checks


def _docker() -> tuple[bool, str]:
    if shutil.which("docker") is None:
        return False, "install Docker, or run this benchmark on a machine that has it"
    try:
        done = subprocess.run(
            ["docker", "info", "--format", "{{.ServerVersion}}"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return False, "docker info does not answer: is its engine running?"
    return not done.returncode, "start Docker's engine (docker info fails), or run this benchmark on a machine that has it"


def _reachable(host: str) -> bool:
    try:
        with socket.create_connection((host, 443), timeout=5):
            return True
    except OSError:
        return False
