"""Recipes: YAML, overrides, and errors that name the field, the value and the remedy."""

from dataclasses import fields
from pathlib import Path

import pytest

import parloop
from parloop.errors import RecipeError
from parloop.train import ChatRecipe, Recipe, load_recipe
from parloop.train.recipe import ALLOWED, BOUNDS, shipped_recipes

RECIPES = shipped_recipes()


def test_round_trip(tmp_path):
    recipe = Recipe(loops=3, learning_rate=1e-3, extensions=[".py", ".md"])
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


def test_overrides_win_and_none_does_not(tmp_path):
    Recipe(loops=3, tokens=7000).save(tmp_path / "recipe.yaml")
    recipe = Recipe.load(tmp_path / "recipe.yaml", loops=4, tokens=None)
    assert (recipe.loops, recipe.tokens) == (4, 7000)


def test_yaml_numbers_written_in_exponents(tmp_path):
    (tmp_path / "recipe.yaml").write_text("learning_rate: 1e-3\ntokens: 2e6\n")  # text to YAML 1.1
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert (recipe.learning_rate, recipe.tokens) == (1e-3, 2_000_000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown field 'learning_rat'. Did you mean 'learning_rate'"),
        ("xyzzy: 1", "Known fields: .* source"),
        ("num_loops: 2", "unknown field 'num_loops'. Did you mean 'loops'"),
        ("loops: two", "loops='two' must be of type int or list: R, how often"),
        ("loops: 1.5", "loops=1.5 must be of type int"),
        ("loops: 0", "loops=0 must be at least 1"),
        ("loops: []", r"loops=\[\] must be of type int or list"),
        ("loops: [1, 0]", r"loops=\[1, 0\] must be at least 1"),
        ("compile: 1", "compile=1 must be of type bool"),
        ("gate: both", "gate='both' is unknown: use one of hidden, query"),
        ("num_attention_heads: 3", "num_attention_heads=3 must divide hidden_size=128"),
        ("num_key_value_heads: 3", "num_key_value_heads=3 must be a positive divisor"),
        ("window_tokens: -1", r"plt_window_size=\[-1, 0\]"),
        ("gradient_accumulation: 3", "gradient_accumulation=3 must divide batch_size"),
        ("num_attention_heads: 0", "num_attention_heads=0 must be at least 1"),
        ("warmup_share: 5", "warmup_share=5.0 must be from 0 to 1: share of the steps"),
        ("warmup_share: -0.1", "warmup_share=-0.1 must be from 0 to 1"),
        ("learning_rate: 0", "learning_rate=0.0 must be above 0: peak"),
        ("learning_rate: .inf", "learning_rate=inf must be a finite number"),
        ("emb_scale: .nan", "emb_scale=nan must be a finite number"),
        ("tokens: .inf", "tokens=inf must be of type int"),
        ("weight_decay: -1", "weight_decay=-1.0 must be at least 0"),
        ("adam_beta2: 1", "adam_beta2=1.0 must be at least 0 and below 1"),
        ("validation_share: 0", "validation_share=0.0 must be above 0 and below 1"),
        ("eval_every: -1", "eval_every=-1 must be at least 0"),
        ("keep_checkpoints: 0", "keep_checkpoints=0 must be at least 1"),
        ("seed: -1", "seed=-1 must be from 0 to 4294967295"),
        ("vocab_size: 100", "vocab_size=100 must be at least 259"),
        ("initializer_range: 0", "initializer_range=0.0 must be above 0"),
        ("attention: fast", "attention='fast' is unknown: use one of sdpa, eager, flex_attention"),
        ("attention: flash_attention_2", "attention='flash_attention_2' .* a single row.*: use sdpa or flex_attention"),
        ("- a list", "must be a mapping"),
        ("{", "is not valid YAML"),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        Recipe.load(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_recipes_in_unicode(tmp_path, encoding):
    (tmp_path / "recipe.yaml").write_text("source: café\n", encoding=encoding)
    assert Recipe.load(tmp_path / "recipe.yaml").source == "café"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("source: café\n".encode("latin-1"), r"is not UTF-8 \(invalid continuation byte, position 11\): save it as UTF-8"),
        (b'source: "a\0b"', r"is not text \(special characters are not allowed, position 10\)"),
        (b"a: " + b"[" * 20_000, "is nested too deeply"),
        (b"tokens: " + b"9" * 5000, "is not valid YAML"),
        (b"source: 2020-99-01", "is not valid YAML: month must be"),
        (b'compile: !!bool "x"', "is not valid YAML"),
        (b'source: !!timestamp "x"', "is not valid YAML"),
    ],
    ids=lambda value: str(value[:12]),
)
def test_recipes_that_are_no_text_or_no_yaml(tmp_path, content, message):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=rf"recipe '.*recipe.yaml' {message}"):
        Recipe.load(tmp_path / "recipe.yaml")


def test_a_missing_recipe(tmp_path):
    with pytest.raises(RecipeError, match="neither a file nor one of the shipped recipes"):
        Recipe.load(tmp_path / "nothing.yaml")


def test_scales_follow_from_the_initialisation():
    """Both terms of a * E + c * shift(h) start equally large, and their sum as large as E."""
    config = Recipe(initializer_range=0.05).plt_config()
    a, c = config.plt_emb_scale, config.plt_hidden_scale
    assert a * 0.05 == pytest.approx(c * 1.0)
    assert (a * 0.05) ** 2 + c**2 == pytest.approx(0.05**2)
    assert Recipe(emb_scale=0.5, hidden_scale=0.1).plt_config().plt_hidden_scale == 0.1


@pytest.mark.parametrize("by", ["name", "path"])
@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_load(name, by):
    path = name if by == "name" else RECIPES[name]
    if not name.startswith(("chat", "think")):
        assert load_recipe(path).steps > 100
        return
    with pytest.raises(RecipeError, match="model is missing: folder or Hub name of the PLT checkpoint"):
        load_recipe(path)
    with pytest.raises(RecipeError, match=r"chat is missing: a .jsonl file"):
        load_recipe(path, model="base")
    assert isinstance(load_recipe(path, model="base", chat="chat.jsonl"), ChatRecipe)


def test_recipes_are_in_the_package(monkeypatch, tmp_path):
    """By name from anywhere; a file of that name where the command runs is meant first."""
    assert list(RECIPES) == ["chat", "chat-lora", "gpu", "laptop", "loopcoder-v2-7b", "quick", "task", "think"]
    assert all(Path(str(file)).parent == Path(parloop.__file__).parent / "recipes" for file in RECIPES.values())
    monkeypatch.chdir(tmp_path)
    assert Recipe.load("quick") == Recipe.load(RECIPES["quick"]) != Recipe()
    (tmp_path / "quick").write_text("length: 77")
    assert Recipe.load("quick").length == 77


def test_several_loop_counts(tmp_path):
    recipe = Recipe(loops=[2, 1])
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml").loops == [2, 1]
    assert (recipe.loop_counts, recipe.num_loops) == ([2, 1], 2)
    assert recipe.plt_config().trained_loops == [2, 1]
    assert recipe.plt_config().plt_num_loops == 2
    assert Recipe(loops=2).plt_config().plt_trained_loops is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("a", "mixture='a' must be of type list"),
        (["a"], "mixture=.* must be of type list"),
        ([{"source": "a"}], "has the entry .*: each needs source and weight"),
        ([{"source": "a", "weight": 1, "column": "x"}], "may have extensions, text_column, max_file_bytes"),
        ([{"source": "a", "weight": 0}], "weight=0 of 'a' must be a number above 0"),
        ([{"source": "a", "weight": "much"}], "weight='much' of 'a' must be a number"),
        ([{"source": "a", "weight": 1, "extensions": ".py"}], "extensions='.py' of 'a' must be of type list"),
        ([{"source": "a", "weight": 1, "extensions": [3]}], r"extensions=\[3\] of 'a' must be endings of files"),
        ([{"source": "a", "weight": 1, "max_file_bytes": -1}], "max_file_bytes=-1 of 'a' must be at least 1"),
        ([{"source": "a", "weight": 10**400}], "weight=1000.* of 'a' must be a number above 0"),
    ],
)
def test_bad_mixtures(entry, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(mixture=entry)


def test_streams_of_a_mixture_divide_a_step():
    with pytest.raises(RecipeError, match="data_streams=8 must divide batch_size=12"):
        Recipe(mixture=[{"source": "a", "weight": 1}], batch_size=12)
    assert Recipe(batch_size=12).mixture == []


def test_the_released_recipe_is_the_released_shape():
    """Every field of the released configuration that training decides."""
    config = Recipe.load("loopcoder-v2-7b").plt_config()
    released = {
        "num_hidden_layers": 14, "hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 76800, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False, "plt_num_loops": 2, "plt_window_size": [64, 0], "plt_normalize_per_loop": True,
        "plt_gate_use_hidden_states": True, "plt_emb_scale": 0.707, "plt_hidden_scale": 0.053,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in released} == released
    assert config.rope_parameters["rope_theta"] == 500000
    recipe = Recipe.load("loopcoder-v2-7b")
    text, *code = (part["weight"] for part in recipe.mixture)
    assert text == pytest.approx(sum(code))
    optimizer = (recipe.adam_beta1, recipe.adam_beta2, recipe.adam_epsilon, recipe.weight_decay, recipe.max_grad_norm)
    assert optimizer == (0.9, 0.95, 1e-15, 0.1, 1.0)
    assert (recipe.learning_rate, recipe.warmup_share, recipe.tokens) == (4e-4, 0.05, 18e12)


def test_bounds_name_fields():
    names = [name for group in BOUNDS.values() for name in group]
    assert len(names) == len(set(names))
    assert set(names) < {f.name for kind in (Recipe, ChatRecipe) for f in fields(kind)}
    assert BOUNDS.keys() == ALLOWED.keys()


def test_paths_in_a_recipe_are_looked_for_beside_it_then_here(tmp_path, monkeypatch):
    """So that it can be run from anywhere. As they were spelt, where that means the same."""
    for place in ("here/only_here", "here/both", "recipes/both", "recipes/data/code", "recipes/base"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.py").write_text("")
    monkeypatch.chdir(tmp_path / "here")

    def loaded(text, **overrides):
        (tmp_path / "recipes" / "r.yaml").write_text(text)
        return load_recipe(tmp_path / "recipes" / "r.yaml", **overrides)

    beside = str(tmp_path / "recipes")
    assert loaded("source: data/code").source == f"{beside}/data/code"
    assert loaded("source: data/**/*.py").source == f"{beside}/data/**/*.py"
    assert loaded("source: both").source == f"{beside}/both"
    assert loaded("source: only_here").source == "only_here"
    assert loaded("source: nowhere").source == "nowhere"
    assert loaded("source: stdlib").source == "stdlib"
    assert loaded("source: hub:a/b").source == "hub:a/b"
    assert loaded(f"source: {beside}/both").source == f"{beside}/both"
    assert loaded("source: data/code", source="both").source == "both"  # an option is meant from here
    assert loaded("init_from: base\ntokenizer: openai/gpt").init_from == f"{beside}/base"
    assert loaded("init_from: base\ntokenizer: openai/gpt").tokenizer == "openai/gpt"
    mixture = loaded("mixture: [{source: data/code, weight: 1}, {source: only_here, weight: 2}]").mixture
    assert [entry["source"] for entry in mixture] == [f"{beside}/data/code", "only_here"]
    tuned = loaded("model: base\nchat: data/code/*.py")
    assert (tuned.model, tuned.chat) == (f"{beside}/base", f"{beside}/data/code/*.py")
    monkeypatch.chdir(tmp_path / "recipes")
    assert load_recipe("r.yaml").model == "base"


def test_a_run_keeps_absolute_paths(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, kept in [
        ("text", f"{tmp_path}/text"),
        ("./text/../text", f"{tmp_path}/text"),
        ("~/text", f"{tmp_path}/text"),
        ("text/*.py", f"{tmp_path}/text/*.py"),
        ("nowhere", "nowhere"),
        ("stdlib", "stdlib"),
        ("~nobody-of-that-name/x", "~nobody-of-that-name/x"),
        ("hub:a/b", "hub:a/b"),
    ]:
        assert Recipe(source=given).placed().source == kept
    recipe = Recipe(mixture=[{"source": "text", "weight": 1.0}], tokenizer="text", init_from="a/b")
    assert recipe.placed().mixture == [{"source": f"{tmp_path}/text", "weight": 1.0}]
    assert (recipe.placed().tokenizer, recipe.placed().init_from) == (f"{tmp_path}/text", "a/b")
    assert recipe.mixture == [{"source": "text", "weight": 1.0}]
