"""Bits per byte of held-out code, by lm-eval, the tool in common use.

The text is what the checkpoint's training held out (by its recipe.yaml), or `--data FILE.jsonl` with a column `text`. For a model that was
trained on a task, the text is the answers to held-out questions, one of each group per document; the share of answers that are the
likeliest text is reported beside chance.
"""

import json
import math
from pathlib import Path
from typing import Any

from ...errors import EvaluationError
from ..benchmark import Benchmark, Environment, Job, Needs, Outcome, Step, digest, read_lines, reading

YAML = """task: held_out
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
  - metric: byte_perplexity
metadata: {{version: 1}}
"""

TASK_YAML = """task: held_out
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
metadata: {{version: 1}}
"""


def steps(job: Job) -> list[Step]:
    """Return the step that runs lm-eval."""
    s = job.settings
    common = [
        "--include_path",
        str(job.work / "task"),
        "--tasks",
        "held_out",
        "--output_path",
        str(job.work / "out"),
        "--log_samples",
        "--use_cache",
        str(job.work / "cache" / "answers"),
        *(["--limit", str(job.limit)] if job.limit else []),
    ]
    own = {"HF_HOME": str(job.work / "hf"), "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    lm_eval = [job.python("lm-eval"), "-m", "parloop", "run", "-m", "lm_eval"]
    if job.checkpoint is not None:
        model = {
            "pretrained": job.checkpoint,
            "backend": "causal",
            "add_bos_token": _task_of(job) is not None,  # lm-eval adds a prefix token to a text, but not to a question
            "softmax_dtype": "float32",
            "dtype": s["dtype"],
            "max_length": s["length"],
            "plt_num_loops": job.loops,
        }
        command = [*lm_eval, "--model", "hf", "--batch_size", str(s["batch_size"]), "--device", s["device"]]
    else:
        folder = Path(s["tokenizer"])  # the command runs elsewhere
        model = {
            "model": job.model,
            "base_url": f"{job.endpoint}/completions",
            "tokenizer": folder.absolute() if folder.is_dir() else s["tokenizer"],
            "tokenizer_backend": "huggingface",
            "max_length": s["length"] + 2,
            "num_concurrent": 4,
            "max_retries": 3,
            "timeout": 600,
        }
        command = [*lm_eval, "--model", "local-completions"]
    arguments = ",".join(f"{name}={value}" for name, value in model.items() if value is not None)
    return [Step("losses", [*command, "--model_args", arguments, *common], server=job.checkpoint is None, environment=own)]


def prepare(job: Job) -> None:
    """Write lm-eval's task and its text."""
    texts = job.work / "held_out.jsonl"
    (job.work / "task").mkdir(parents=True, exist_ok=True)
    if not texts.exists():
        task = _task_of(job)
        if task is not None:
            rows = questions(task, job.settings["documents"])
        elif job.data:
            rows = [{"text": row["text"]} for row in read_lines(job.data)]
        else:
            rows = [{"text": text} for text in held_out_texts(job)]
        partial = texts.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        partial.rename(texts)
    yaml = YAML if _task_of(job) is None else TASK_YAML
    (job.work / "task" / "held_out.yaml").write_text(yaml.format(file=texts.absolute()), encoding="utf-8")


def _task_of(job: Job) -> Any:
    """Return the task that the checkpoint was trained on, unless another text is given."""
    from ...corpus.tasks import is_task, task_of

    recipe = None if job.data or job.checkpoint is None else _recipe_of(job.checkpoint)
    return task_of(recipe.source) if recipe is not None and is_task(recipe.source) else None


def _recipe_of(checkpoint: str) -> Any:
    """Return the recipe that trained a checkpoint on text, or None if it is not known."""
    from ...train import Recipe, load_recipe

    file = Path(checkpoint, "recipe.yaml")
    recipe = load_recipe(file) if file.is_file() else None
    return recipe if isinstance(recipe, Recipe) else None


def questions(task: Any, documents: int) -> list[dict[str, Any]]:
    """Return held-out questions of a task: question, answer, group and chance. Worked steps, if the task has them, are
    part of the answer."""
    from ...corpus.tasks import HELD_OUT

    rows = []
    for number in range(documents):
        for group in task.groups:
            document = task.document(number, HELD_OUT, group=None if task.asks_every_group else group)
            symbols = task.symbols_of(document)
            last = int((document.groups == group).nonzero()[0][-1])
            if task.is_written:
                question = task.join(symbols[: document.prompt])[0]
                answer = task.text(document)[len(question) :]
            else:
                question = task.join(symbols[: last + 1])[0]
                answer = " " + task.symbol(document.targets[last])
            rows.append({"question": question, "answer": answer, "group": group, "chance": task.chance(group)})
    return rows


def held_out_texts(job: Job) -> list[str]:
    """Return the beginnings of documents that the checkpoint's training held out; without a recipe, of the standard
    library's."""
    from ...corpus import load_corpus
    from ...train import Recipe

    assert job.checkpoint is not None
    recipe = _recipe_of(job.checkpoint)
    if recipe is None or recipe.mixture:
        recipe = Recipe()
    corpus = load_corpus(recipe.corpus_settings())
    return [text[: job.settings["characters"]] for text in corpus.validation["text"][: job.settings["documents"]]]


def resolve(job: Job) -> None:
    """Set windows as long as the model allows, at most 2048 tokens, and a GPU if there is one.

    Raises:
        EvaluationError: the model is at a server, and its tokenizer or the text is not given.
    """
    import torch

    from ...checkpoints import load_config

    if job.checkpoint is None and job.data is None:
        raise EvaluationError("held_out of a server needs a text: --data held_out=FILE.jsonl, with a column `text`.")
    if job.checkpoint is None and job.settings["tokenizer"] is None:
        raise EvaluationError(
            "held_out of a server needs its model's tokenizer: --set held_out.tokenizer=FOLDER or a Hub name."
        )
    if job.settings["length"] is None:
        job.settings["length"] = (
            2046 if job.checkpoint is None else min(load_config(job.checkpoint).max_position_embeddings, 2048)
        )
    if job.settings["device"] is None:
        job.settings["device"] = "cuda" if torch.cuda.is_available() else "cpu"


def memory_gb(job: Job) -> float:
    """Return the GB of a checkpoint folder's weights, in the dtype that they are loaded in, plus a margin."""
    import torch

    from ...checkpoints import load_config

    if job.checkpoint is None or not Path(job.checkpoint).is_dir():
        return 0.0
    size = sum(path.stat().st_size for path in Path(job.checkpoint).glob("*.safetensors"))
    names = (str(dtype).removeprefix("torch.") for dtype in (job.settings["dtype"], load_config(job.checkpoint).dtype))
    loaded, stored = (getattr(torch, name, torch.float32).itemsize for name in names)
    return 1.1 * size * loaded / stored / 1e9


def parse(job: Job) -> Outcome:
    """Read the losses of the documents."""
    files = sorted((job.work / "out").rglob("samples_held_out_*.jsonl"), key=lambda path: path.stat().st_mtime)
    if not files:
        return Outcome({}, problems=["lm-eval left no samples: see losses.log"])
    items, sizes, parts = {}, {}, {}
    with reading(files[-1]):
        rows = read_lines(files[-1])
        task = _task_of(job)
        if task is not None:
            parts = _exact_matches(task, rows)
        for row in rows:
            if task is not None:
                log_likelihood, size = float(row["filtered_resps"][0][0]), len(row["doc"]["answer"].encode())
            else:
                log_likelihood, size = row["bits_per_byte"]
            items[str(row["doc_id"])] = -log_likelihood / math.log(2) / size
            sizes[str(row["doc_id"])] = float(size)
        total = sum(items[name] * sizes[name] for name in items) / sum(sizes.values())
    texts = job.work / "held_out.jsonl"
    asked = min(len(texts.read_bytes().splitlines()), job.limit or math.inf)
    problems = [] if len(items) == asked else [f"{len(items)} of {asked} documents have a loss: run it again"]
    return Outcome(
        items,
        value=total,
        parts=parts,
        problems=problems,
        weights=sizes,
        data=f"held-out text, {digest(texts)}",
    )


def _exact_matches(task: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the share of answers, in percent, that are the likeliest text, for every group."""
    parts = {}
    for group in task.groups:
        right = [bool(row["acc"]) for row in rows if row["doc"]["group"] == group]
        if right:
            parts[f"exact match, {task.unit} {group} (chance {100 * task.chance(group):.1f})"] = (
                100 * sum(right) / len(right)
            )
    return parts


BENCHMARK = Benchmark(
    name="held_out",
    title="held-out code",
    measures="the loss on text that training held out, in lm-eval",
    metric="bits per byte",
    tool="lm-eval 0.4.13",
    paper={},
    environments=(Environment("lm-eval", with_ours=True),),
    needs=Needs(disk_gb=1, memory_gb=2, hours=0.1),
    settings={
        "documents": 64,
        "characters": 3000,
        "length": None,
        "dtype": "float32",
        "device": None,
        "batch_size": 8,
        "tokenizer": None,
    },
    silent="not in the paper",
    run_here="end to end; its number is that of our own evaluation",
    steps=steps,
    parse=parse,
    resolve=resolve,
    prepare=prepare,
    unit="bits per byte",
    needs_server=False,
    memory_gb=memory_gb,
)
