"""Recipes: YAML, overrides, and errors that name the field, the value and the remedy."""

from dataclasses import fields
from pathlib import Path

import pytest

from parloop.errors import RecipeError
from parloop.train import Recipe
from parloop.train.recipe import ALLOWED, BOUNDS

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_round_trip(tmp_path):
    recipe = Recipe(num_loops=3, learning_rate=1e-3, extensions=[".py", ".md"])
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


def test_overrides_win_and_none_does_not(tmp_path):
    Recipe(num_loops=3, tokens=7000).save(tmp_path / "recipe.yaml")
    recipe = Recipe.load(tmp_path / "recipe.yaml", num_loops=4, tokens=None)
    assert (recipe.num_loops, recipe.tokens) == (4, 7000)


def test_yaml_numbers_written_in_exponents(tmp_path):
    (tmp_path / "recipe.yaml").write_text("learning_rate: 1e-3\ntokens: 2e6\n")  # text to YAML 1.1
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert (recipe.learning_rate, recipe.tokens) == (1e-3, 2_000_000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown field 'learning_rat'. Did you mean 'learning_rate'"),
        ("xyzzy: 1", "Known fields: source"),
        ("num_loops: two", "num_loops='two' must be of type int: R, how often"),
        ("num_loops: 1.5", "num_loops=1.5 must be of type int"),
        ("num_loops: 0", "num_loops=0 must be at least 1"),
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


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load(path):
    assert Recipe.load(path).steps > 100


def test_bounds_name_fields():
    names = [name for group in BOUNDS.values() for name in group]
    assert len(names) == len(set(names))
    assert set(names) < {f.name for f in fields(Recipe)}
    assert BOUNDS.keys() == ALLOWED.keys()
