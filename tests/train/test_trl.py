"""TRL's trainers on a PLT: by path and by object, all weights and adapters, and as docs/trl.md has it."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from parloop import PLTForCausalLM, cli
from parloop.model.modeling import PLTForSequenceClassification
from tests.helpers.chats import chat_tokenizer
from tests.helpers.models import tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "trl.md"
trl = pytest.importorskip("trl")

ASKED = [{"role": "user", "content": "hello"}]
GOOD = [{"role": "assistant", "content": "hello there"}]
BAD = [{"role": "assistant", "content": "say it again"}]
PAIR = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
JUDGED = [{"prompt": ASKED, "completion": GOOD, "label": True}, {"prompt": ASKED, "completion": BAD, "label": False}]
GENERATED = {"num_generations": 2, "max_completion_length": 6}


def unequal(completions, **_):
    """A reward that differs within every group, so that there is something to learn."""
    return [float(i) for i in range(len(completions))]


# By trainer: rows, settings, what else it is given, and how it should start: as its own reference, so at these losses and distances.
TRAINERS = {
    "SFT": ([{"messages": ASKED + GOOD}] * 4, {"max_length": 64}, {}, {}),
    "DPO": ([PAIR] * 4, {"max_length": 64}, {}, {"loss": 0.6931}),
    "KTO": (JUDGED * 2, {"max_length": 64}, {}, {"loss": 0.5}),
    "GRPO": ([{"prompt": ASKED}] * 4, {"beta": 0.1, **GENERATED}, {"reward_funcs": unequal}, {"kl": 0.0}),
    "RLOO": ([{"prompt": ASKED}] * 4, {"beta": 0.1, **GENERATED}, {"reward_funcs": unequal}, {"kl": 0.0}),
    "Reward": ([PAIR] * 4, {"max_length": 64}, {}, {}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small checkpoint of two loops with a chat template."""
    folder = tmp_path_factory.mktemp("trl") / "base"
    tokenizer = chat_tokenizer()
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    tiny_model(dtype=torch.float32, vocab_size=len(tokenizer), **special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trainer_of(name, base, folder, model, adapters):
    from peft import LoraConfig

    rows, settings, given, _ = TRAINERS[name]
    arguments = getattr(trl, f"{name}Config")(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, report_to="none",
        save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, **settings,
    )  # fmt: skip
    task = "SEQ_CLS" if name == "Reward" else "CAUSAL_LM"
    return getattr(trl, f"{name}Trainer")(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(task_type=task, r=4) if adapters else None,
        **given,
    )


@pytest.mark.parametrize("adapters", [False, True], ids=["all-weights", "adapters"])
@pytest.mark.parametrize("by", ["path", "object"])
@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_by_path_and_by_object(name, by, adapters, base, tmp_path):
    """Two steps. Nothing is left as it was that should be learnt, gates of the second loop included, nothing else is touched, and
    the reference that a trainer loads by name is the model itself."""
    auto = AutoModelForSequenceClassification if name == "Reward" else AutoModelForCausalLM
    model = str(base) if by == "path" else auto.from_pretrained(base, **({"num_labels": 1} if name == "Reward" else {}))
    trainer = trainer_of(name, base, tmp_path / "out", model, adapters)
    stack = trainer.model.base_model.model if adapters else trainer.model
    assert type(stack) is (PLTForSequenceClassification if name == "Reward" else PLTForCausalLM)
    assert stack.config.num_loops == 2
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert torch.isfinite(torch.tensor(losses)).all()
    for key, expected in TRAINERS[name][3].items():
        assert trainer.state.log_history[0][key] == pytest.approx(expected, abs=1e-3)
    changed = {key for key, value in trainer.model.state_dict().items() if not torch.equal(before[key], value)}
    if adapters:
        assert changed == {key for key in before if "lora_" in key or "score.modules_to_save" in key}
    else:
        assert changed == set(before)

    trainer.save_model(str(tmp_path / "saved"))
    if not adapters:
        config = json.loads((tmp_path / "saved/config.json").read_text())
        expected = json.loads((base / "config.json").read_text())
        assert "auto_map" not in config
        assert config["architectures"] == [expected["architectures"][0].replace("CausalLM", type(stack).__name__[6:])]
        assert {key: value for key, value in config.items() if key.startswith("plt_")} == {
            key: value for key, value in expected.items() if key.startswith("plt_")
        }
        loaded = auto.from_pretrained(tmp_path / "saved").state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in trainer.model.state_dict().items())


def test_a_reward_model_rewards_by_path(base, tmp_path):
    """GRPO loads the model that RewardTrainer saves."""
    trainer_of("Reward", base, tmp_path / "out", str(base), False).save_model(str(tmp_path / "reward"))
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to="none", save_strategy="no", use_cpu=True,
        bf16=False, logging_steps=1, **GENERATED,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=str(base),
        args=arguments,
        reward_funcs=str(tmp_path / "reward"),
        train_dataset=Dataset.from_list([{"prompt": ASKED}] * 4),
    )
    assert type(trainer.reward_funcs[0]) is PLTForSequenceClassification
    trainer.train()
    assert trainer.state.log_history[0]["reward_std"] > 0


def test_the_page_runs_as_it_stands(base, tmp_path, monkeypatch, capfd):
    """Its files are written, and its commands run one after the other, only for two steps and on the CPU."""
    checkpoint = tmp_path / "runs/study-quick/r2-seed0"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.symlink_to(base)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), flags=re.M | re.S)
    commands = []
    for language, text in blocks:
        if language == "python":
            (tmp_path / text.split()[1]).write_text(text)
            continue
        for command in text.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(command)
            commands.append(arguments)
            if program == "python":
                runpy.run_path(arguments[0], run_name="__main__")
                continue
            assert program == "parloop"
            if arguments[0] == "run":
                arguments += ["--max_steps", "2", "--per_device_train_batch_size", "8", "--use_cpu", "--report_to", "none"]
            monkeypatch.setattr(sys, "argv", [program, *arguments])
            with pytest.raises(SystemExit) as done:
                cli.main()
            assert not done.value.code, command
    assert [arguments[2] for arguments in commands if arguments[0] == "run"] == [
        f"trl.scripts.{x}" for x in ("sft", "dpo", "grpo")
    ]

    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / x).state_dict() for x in ("sft", "dpo")]
    assert any(not torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values()))
    assert json.loads((tmp_path / "runs/grpo/config.json").read_text())["plt_num_loops"] == 2
    shown = capfd.readouterr()
    assert "rewards/parses/mean" in shown.out
    assert "not a prefix" not in shown.err  # TRL's words for a prompt that ends within a token
    rewards = sys.modules.pop("rewards")
    texts = ["\n    return (x)\n", "\n    return (x\n", "\n    return x"]  # right, wrong, not a whole line
    assert rewards.parses(["def f(x):"] * 3, texts) == [1.0, 0.0, 0.0]
    pairs = [json.loads(line) for line in (tmp_path / "data/train.jsonl").read_text().splitlines()]
    prompts = [pair["prompt"] for pair in pairs]
    assert set(rewards.parses(prompts, [pair["chosen"] for pair in pairs])) == {1.0}
    assert sum(rewards.parses(prompts, [pair["rejected"] for pair in pairs])) < len(pairs) / 10
