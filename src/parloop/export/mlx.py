"""PLT checkpoints for mlx-lm: our class under the name that mlx-lm imports, and folders that contain the class.

Only quantisation needs MLX: otherwise a folder for a Mac can be made anywhere.
"""

import importlib.abc
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import ExportError
from ..registration import too_old

MODEL_FILE = Path(__file__).with_name("mlx_model.py")  # self-contained: exported folders get a copy of it
MLX_MODULE = "mlx_lm.models.iquestpltcoder"  # mlx-lm imports `mlx_lm.models.{model_type}`
EXPORTED_AS = "plt_mlx.py"
BITS = (4, 8)
# Files of a checkpoint that mlx-lm reads.
PARTS = (
    "model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "vocab.*", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "*.tiktoken", "chat_template*", "LICENSE*",
)  # fmt: skip


class _ModelFinder(importlib.abc.MetaPathFinder):
    """Finds our model file as one of mlx-lm's modules. It is the last finder, so a class in mlx-lm itself would take precedence."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        return importlib.util.spec_from_file_location(fullname, MODEL_FILE) if fullname == MLX_MODULE else None


def register() -> None:
    """Let mlx-lm load PLT checkpoints in this process, without a trust flag. mlx-lm is neither changed nor imported."""
    if not any(isinstance(finder, _ModelFinder) for finder in sys.meta_path):
        sys.meta_path.append(_ModelFinder())


def mlx_lm_version() -> str | None:
    """Return the version of the installed mlx-lm; None if there is none."""
    try:
        return version("mlx-lm")
    except PackageNotFoundError:
        return None


def read_config(folder: Path) -> dict[str, Any]:
    """Return a PLT checkpoint's `config.json`, checked against the MLX model.

    Raises:
        ExportError: there is none, it is of another architecture, or it has options that the MLX model does not implement (checked here
            only if mlx-lm is installed, otherwise when the folder is first used).
    """
    try:
        config = dict[str, Any](json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ExportError(f"checkpoint {str(folder)!r} has no config.json that can be read ({error}).") from error
    kind = config.get("model_type")
    if kind != MLX_MODULE.rpartition(".")[2]:
        raise ExportError(f"checkpoint {str(folder)!r} has model_type {kind!r}: not a PLT; mlx-lm may know it by itself.")
    if config.get("quantization_config") and "quantization" not in config:  # mlx-lm's own folders have both
        raise ExportError(
            f"checkpoint {str(folder)!r} is quantised, but not by MLX: export what it was made from, with --bits."
        )
    if mlx_lm_version() is not None:
        register()
        try:
            importlib.import_module(MLX_MODULE).ModelArgs.from_dict(config)
        except (TypeError, ValueError) as error:
            raise ExportError(f"checkpoint {str(folder)!r} cannot be run with MLX: {error}") from error
    return config


def export_mlx(checkpoint: Path, folder: Path, bits: int | None = None) -> None:
    """Write a folder that mlx-lm runs by itself: weights, tokenizer, and the model file that `config.json` names.

    Args:
        checkpoint: folder of a PLT.
        folder: an empty folder.
        bits: quantise the linear layers and the embedding to this many bits, in groups of 64 weights with a scale and an offset each (32,
            if a size of the model is not a multiple of 64). Gates and norms stay as they are. None: all weights stay.

    Raises:
        ExportError: the checkpoint is not a PLT, is quantised already, or cannot be quantised.
    """
    config = read_config(checkpoint)
    if not too_old():  # otherwise this transformers has no model to compare with
        from ..checkpoints import check_weights

        check_weights(checkpoint)
    if bits is None:
        for path in _parts(checkpoint):
            shutil.copyfile(path, folder / path.name)
    else:
        _quantise(checkpoint, folder, config, bits)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shutil.copyfile(MODEL_FILE, folder / EXPORTED_AS)
    (folder / "config.json").write_text(json.dumps(config | {"model_file": EXPORTED_AS}, indent=4) + "\n", encoding="utf-8")


def _parts(checkpoint: Path) -> Iterator[Path]:
    yield from sorted({path for pattern in PARTS for path in checkpoint.glob(pattern) if path.is_file()})


def _quantise(checkpoint: Path, folder: Path, config: dict[str, Any], bits: int) -> None:
    if bits not in BITS:
        raise ExportError(
            f"bits={bits} must be 4 or 8. Others by mlx-lm: parloop run -m mlx_lm convert -q --q-bits {bits} ..."
        )
    if "quantization" in config:
        raise ExportError(f"checkpoint {str(checkpoint)!r} is quantised already: export the original checkpoint.")
    if mlx_lm_version() is None:
        raise ExportError('mlx-lm quantises, and is not installed: pip install "parloop[mlx]", or leave --bits out.')
    heads = config["num_attention_heads"] * (
        config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    )
    sizes = {"hidden_size": config["hidden_size"], "intermediate_size": config["intermediate_size"], "heads": heads}
    group = next((n for n in (64, 32) if not any(size % n for size in sizes.values())), None)
    if group is None:  # mlx-lm would silently leave such layers as they are
        raise ExportError(f"{sizes} must be multiples of 32 to be quantised in groups: leave --bits out.")
    from mlx_lm.convert import convert

    scratch = folder / "quantised"  # convert creates its folder itself
    convert(str(checkpoint), str(scratch), quantize=True, q_bits=bits, q_group_size=group)
    for path in scratch.iterdir():
        path.rename(folder / path.name)
    scratch.rmdir()
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card
