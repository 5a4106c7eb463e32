"""Where code that a model wrote may run: never in our process, and never where it can change anything but its own folder.

bubblewrap gives a command a view of this machine that can only be read, without the user's home, without the sockets of services below
/run (Docker's, for one) and without other processes; it can write to the job's folder and to a /tmp of its own, and has no network unless the step must reach the server. Tools that bring
containers use these.
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
KEPT = ("LANG", "LC_ALL", "TZ", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")  # variables


def sandboxed(
    command: list[str], folder: Path, readable: list[Path], environment: dict[str, str], network: bool
) -> list[str]:
    """The command in a sandbox.

    Args:
        folder: what it may write to, and where it starts.
        readable: folders below the user's home that it must see.
        environment: its variables; no others are passed on but KEPT.
        network: let it reach the network.

    Raises:
        EvaluationError: there is no bubblewrap.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        raise EvaluationError(f"what a model writes runs in a sandbox only, and bubblewrap is not here: {REMEDY}.")
    homes = {Path("/home"), Path("/root"), Path.home()}
    arguments = ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp"]
    # Reading is enough to talk to a socket. /var/run mostly leads to /run.
    sockets = {Path(place).resolve() for place in SOCKETS}
    for place in sorted(place for place in homes | sockets if place.is_dir()):
        arguments += ["--tmpfs", str(place)]
    names = RESOLVER.resolve()  # systemd keeps it below /run
    if names.is_file() and any(names.is_relative_to(place) for place in sockets):
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
    """Why nothing can be run in a sandbox here; or nothing."""
    program = shutil.which(PROGRAM)
    if program is None:
        return f"bubblewrap is not here: {REMEDY}"
    tried = subprocess.run(
        [program, "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--unshare-all", "true"],
        capture_output=True,
        text=True,
    )
    if tried.returncode:
        return f"bubblewrap cannot make a sandbox here ({tried.stderr.strip()}): allow user namespaces, also of the container that this runs in"
    return ""
