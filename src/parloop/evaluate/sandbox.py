"""The sandbox for code that a model wrote: it never runs in our process, and can change nothing but its own folder.

bubblewrap gives a command a read-only view of this machine, without the user's home, without the sockets of services below /run (such as
Docker's) and without other processes. The command can write to the job's folder and to a /tmp of its own, and has no network unless the
step must reach the server. Tools that come with containers use these instead.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ..errors import EvaluationError

PROGRAM = "bwrap"
REMEDY = "install bubblewrap (apt install bubblewrap, dnf install bubblewrap)"
SOCKETS, RESOLVER = ("/run", "/var/run"), Path("/etc/resolv.conf")
KEPT = ("LANG", "LC_ALL", "TZ", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")  # environment variables that are passed on


def sandboxed(
    command: list[str], folder: Path, readable: list[Path], environment: dict[str, str], network: bool
) -> list[str]:
    """Return the command that runs `command` in a sandbox.

    Args:
        command: the command.
        folder: its working directory, the only folder that it can write to.
        readable: folders below the user's home that it can read.
        environment: its environment variables; of this process's, only those in KEPT are passed on.
        network: whether it has network.

    Raises:
        EvaluationError: there is no bubblewrap.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        raise EvaluationError(f"code of a model only runs in a sandbox, and bubblewrap is not installed: {REMEDY}.")
    homes = {Path("/home"), Path("/root"), Path.home()}
    arguments = ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp"]
    # A read-only view is enough to use a socket. /var/run is usually a link to /run.
    sockets = {Path(name).resolve() for name in SOCKETS}
    for hidden in sorted(path for path in homes | sockets if path.is_dir()):
        arguments += ["--tmpfs", str(hidden)]
    names = RESOLVER.resolve()  # systemd keeps it below /run
    if names.is_file() and any(names.is_relative_to(path) for path in sockets):
        arguments += ["--ro-bind", str(names), str(names)]
    for shown in dict.fromkeys(map(str, [Path(sys.base_prefix), *readable])):
        arguments += ["--ro-bind", shown, shown]
    arguments += ["--bind", str(folder), str(folder), "--chdir", str(folder)]
    arguments += ["--unshare-all", *(["--share-net"] if network else []), "--die-with-parent", "--new-session", "--clearenv"]
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    for name, value in (kept | {"PATH": os.defpath, "HOME": str(folder)} | environment).items():
        arguments += ["--setenv", name, value]
    return [program, *arguments, "--", *command]


def problem() -> str:
    """Return why the sandbox does not work here; empty if it does."""
    program = shutil.which(PROGRAM)
    if program is None:
        return f"bubblewrap is not installed: {REMEDY}"
    tried = subprocess.run(
        [program, "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--unshare-all", "true"],
        capture_output=True,
        text=True,
    )
    if tried.returncode:
        return f"bubblewrap cannot make a sandbox here ({tried.stderr.strip()}): allow user namespaces, also in the container that this runs in"
    return ""
