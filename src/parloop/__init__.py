"""parloop: the Parallel Loop Transformer in stock transformers. Importing it registers `model_type: iquestpltcoder`."""

# ruff: noqa: E402
import logging

# Where torchao is installed without a GPU, importing transformers makes it tell of every GPU library that it could not load.
_level = logging.root.manager.disable
logging.disable(logging.WARNING)

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from .diagnosis import Diagnosis, diagnose
from .model.cache import cache_bytes, make_cache
from .model.configuration import PLTConfig
from .model.modeling import PLTForCausalLM, PLTModel

logging.disable(_level)

__version__ = "0.1.0"
__all__ = ["Diagnosis", "PLTConfig", "PLTForCausalLM", "PLTModel", "cache_bytes", "diagnose", "make_cache"]

AutoConfig.register(PLTConfig.model_type, PLTConfig, exist_ok=True)
AutoModel.register(PLTConfig, PLTModel, exist_ok=True)
AutoModelForCausalLM.register(PLTConfig, PLTForCausalLM, exist_ok=True)
# Some checkpoints call the gate loop_gate_proj. They are saved again under the name they were read with.
register_checkpoint_conversion_mapping(
    PLTConfig.model_type, [WeightRenaming(r"self_attn\.loop_gate_proj\.", "self_attn.plt_gate.")], overwrite=True
)
