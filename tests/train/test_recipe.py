"""Recipes: YAML, overrides, and errors that name the field, the value and the remedy."""

from pathlib import Path

import pytest

from parloop.train import Recipe, RecipeError

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
