"""parloop: the Parallel Loop Transformer in stock transformers. Importing it registers `model_type: iquestpltcoder`."""

# ruff: noqa: E402
import logging
import os.path
import signal
import sys

# Imports take seconds. Until the command's main is reached, Ctrl-C ends it as it ends other programs, without a traceback.
_started = "".join(sys.orig_argv[-len(sys.argv) :][:1])  # the word of the command line that says what is run
if os.path.basename(_started) == "parloop" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# Where torchao is installed without a GPU, importing transformers makes it tell of every GPU library that it could not load.
_level = logging.root.manager.disable
logging.disable(logging.WARNING)

import transformers
from transformers import AutoConfig

from .model.configuration import PLTConfig

__version__ = "0.1.0"
__all__ = ["Diagnosis", "PLTConfig", "PLTForCausalLM", "PLTModel", "cache_bytes", "diagnose", "make_cache"]

AutoConfig.register(PLTConfig.model_type, PLTConfig, exist_ok=True)

# vLLM pins an older transformers. Its plugin needs the configuration only.
TOO_OLD: str | None = None
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 23):
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    from .diagnosis import Diagnosis, diagnose
    from .model.cache import cache_bytes, make_cache
    from .model.modeling import PLTForCausalLM, PLTModel

    AutoModel.register(PLTConfig, PLTModel, exist_ok=True)
    AutoModelForCausalLM.register(PLTConfig, PLTForCausalLM, exist_ok=True)
    # Some checkpoints call the gate loop_gate_proj. They are saved again under the name they were read with.
    register_checkpoint_conversion_mapping(
        PLTConfig.model_type, [WeightRenaming(r"self_attn\.loop_gate_proj\.", "self_attn.plt_gate.")], overwrite=True
    )
else:
    TOO_OLD = (
        f"The model needs transformers >= 5.23, and {transformers.__version__} is installed, as vLLM asks for. Keep an environment "
        f"for vLLM, which serves PLT checkpoints, and another one to train, generate and diagnose: "
        f'pip install parloop "transformers>=5.23".'
    )

    def __getattr__(name: str) -> object:
        if name in __all__:
            raise ImportError(f"parloop.{name}: {TOO_OLD}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


logging.disable(_level)
