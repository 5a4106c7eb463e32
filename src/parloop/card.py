"""Model cards: a README.md beside a model's weights, with the metadata that the Hub reads.

A card is made to be published, so it contains no path of the machine that wrote it.
"""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .corpus.sources import HUB
from .model.configuration import PLTConfig

CARD = "README.md"
HOME = "https://github.com/parloop/parloop"
CITATION = f"""@software{{parloop,
  title = {{parloop: the Parallel Loop Transformer, run, trained and diagnosed}},
  author = {{The parloop maintainers}},
  url = {{{HOME}}},
  version = {{VERSION}},
}}

@article{{plt,
  title = {{Parallel Loop Transformer for Efficient Test-Time Computation Scaling}},
  journal = {{arXiv:2510.24824}},
  year = {{2025}},
}}"""


def model_card(
    name: str,
    config: Any,
    sections: dict[str, str],
    *,
    parameters: int | None = None,
    base_model: str | None = None,
    sources: tuple[str, ...] = (),
) -> str:
    """Return a model card, in Markdown.

    Args:
        name: name of the model.
        config: its configuration, a PLT's or a dense model's.
        sections: heading -> text, in addition to the sections on the model's shape, use and citation.
        parameters: number of its parameters.
        base_model: the model that it was made from; a model of the Hub is named in the metadata.
        sources: sources of its training text; data sets of the Hub are named in the metadata.
    """
    from . import __version__

    looped = isinstance(config, PLTConfig)
    datasets = sorted({source.removeprefix(HUB) for source in sources if source.startswith(HUB)})
    data = ModelCardData(
        license="unknown",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["parloop", "parallel-loop-transformer"] if looped else ["parloop"],
        base_model=base_model if base_model and of_the_hub(base_model) else None,
        datasets=datasets or None,
    )
    if looped:
        sections = {"What it is": _what_it_is(config, parameters), "Use": _use(name, config)} | sections
    else:
        sections = {"What it is": f"A dense model, `model_type: {config.model_type}`."} | sections
    sections.setdefault("Licence", "Not chosen yet: name one here, and in `license` at the top of this file.")
    sections["Citation"] = f"```bibtex\n{CITATION.replace('VERSION', __version__)}\n```"
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items())
    written = f"Written by [parloop]({HOME}) {__version__}."
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{body}\n\n{written}\n"))


def shown(source: str) -> str:
    """Return the name of a source or model in cards: for an absolute path, its last part."""
    path = Path(os.path.expanduser(source))
    return f"`{path.name if path.is_absolute() else source}`"


def of_the_hub(name: str) -> bool:
    """Return whether a model's name is one of the Hub, and not a folder."""
    return len(Path(name).parts) == 2 and not Path(name).is_absolute() and not Path(name).exists()


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _what_it_is(config: PLTConfig, parameters: int | None) -> str:
    size = "" if parameters is None else f" with {parameters:,} parameters"
    shape = {
        "loops R": str(config.plt_num_loops),
        "trained at R": ", ".join(map(str, config.trained_loops)),
        "layers": str(config.num_hidden_layers),
        "width": str(config.hidden_size),
        "heads (query / key)": f"{config.num_attention_heads} / {config.num_key_value_heads}",
        "window": f"{config.window_tokens} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "longest text": f"{config.max_position_embeddings:,} tokens",
    }
    return (
        f"A Parallel Loop Transformer{size}: one stack of layers that runs R times with the same weights, all loops of a token in one pass "
        f"over them ([arXiv:2510.24824](https://arxiv.org/abs/2510.24824)).\n\n{table(['', ''], [[*row] for row in shape.items()])}"
    )


def _use(name: str, config: PLTConfig) -> str:
    counts = ", ".join(map(str, config.trained_loops))
    return f"""```python
import parloop  # pip install parloop: registers model_type "{config.model_type}" with transformers, without remote code
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("def ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

`"{name}"` stands for the folder or the Hub name of this model. `generate(.., num_loops=1)` runs fewer loops; it was trained at R = {counts}, and is not as
good at others. `parloop serve` offers it to OpenAI clients, `parloop diagnose` shows what each loop adds."""
