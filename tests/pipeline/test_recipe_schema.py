"""Recipes: how they are read, and the message for each mistake."""

import tomllib

import pytest
import toy_stage

from bessemer.config.recipe import Recipe
from bessemer.config.units import Points
from bessemer.errors import UserError

GOOD = """
name = "toy"
seed = 7
[model]
preset = "tiny"
[[stage]]
kind = "count"
name = "first"
tokens = "8M"
lr = [["0", 0.0], ["200K", 3e-3]]
mixture = { fables = 0.3, "a b" = 0.7 }
[[stage]]
kind = "count"
[[stage]]
kind = "compare"
from = "first"
models = ["first", "count"]
"""


def test_a_good_recipe():
    recipe = Recipe.parse(GOOD)
    first, second, third = recipe.stages
    assert (recipe.name, recipe.seed, recipe.model) == ("toy", 7, {"preset": "tiny"})
    assert first.tokens == 8_000_000 and first.lr == Points([["0", 0.0], ["200K", 3e-3]])
    assert [stage.name for stage in recipe.stages] == ["first", "count", "compare"]
    assert (first.source, second.source, third.source) == (None, "first", "first")  # default: the previous stage


def test_the_resolved_recipe_reads_back_as_itself():
    recipe = Recipe.parse(GOOD, ["first.mixture.new=1", 'model.note=a "quoted" \\ \u00e9 \x7f', "count.pause=1e-7"])
    again = Recipe.parse(recipe.to_toml())
    assert again.to_toml() == recipe.to_toml()
    assert again.model == recipe.model and again.stages == recipe.stages
    assert tomllib.loads(recipe.to_toml())["stage"][0]["steps"] == 20  # defaults are written out


def test_overrides():
    first = ["first.tokens=9M", "first.mixture.code=0.5"]
    recipe = Recipe.parse(GOOD, [*first, "seed=8", "model.n_layers=3", "count.lr=[['0', 1.0]]", "compare.from=count"])
    assert recipe.stages[0].tokens == 9_000_000 and recipe.seed == 8 and recipe.model["n_layers"] == 3
    assert recipe.stages[1].lr(5) == 1.0 and recipe.stages[0].mixture["code"] == 0.5
    assert recipe.stages[2].source == "count"


LIKE = """
[[stage]]
name = "again"
like = "first"
lr = [["0", 1.0]]
mixture = { code = 1.0 }
[[stage]]
name = "third"
like = "again"
seed = 3
"""


def test_a_stage_like_another():
    recipe = Recipe.parse(GOOD + LIKE, ["first.tokens=9M", "again.steps=5"])
    first, again, third = (recipe.stage(name) for name in ("first", "again", "third"))
    assert (again.kind, again.tokens, again.steps) == ("count", 9_000_000, 5)  # what is set on the first applies too
    assert again.lr(0) == 1.0 and again.mixture == {"code": 1.0}, "a table of names is set whole"
    assert third.model_copy(update={"name": "again", "seed": None, "source": again.source}) == again
    assert first.lr(0) == 0.0 and recipe.seed_of(third) == 3
    assert Recipe.parse(recipe.to_toml()).stages == recipe.stages and "like" not in recipe.to_toml()


@pytest.mark.parametrize("order", [1, -1])
def test_a_key_set_in_a_table_leaves_the_rest_of_an_inherited_table(order):
    changes = ["third.mixture.new=0.5", "again.mixture.more=0.25"]
    recipe = Recipe.parse(GOOD + LIKE, changes[::order])
    assert recipe.stage("again").mixture == {"code": 1.0, "more": 0.25}
    assert recipe.stage("third").mixture == {"code": 1.0, "more": 0.25, "new": 0.5}
    whole = Recipe.parse(GOOD + LIKE, ["third.mixture={b = 1.0}", "third.mixture.c=2"]).stage("third")
    assert whole.mixture == {"b": 1.0, "c": 2}


TABLES = """
name = "tables"
[[stage]]
kind = "corpus"
parts = { a = "fables-en" }
[[stage]]
kind = "rl"
name = "one"
tasks = ["countdown"]
kl = 0.02
loss = { name = "grpo", clip_low = 0.1, clip_high = 0.3 }
general = { tasks = ["arithmetic"], prompts = 2 }
heldout = { every = 3, problems = 9 }
[[stage]]
name = "two"
like = "one"
kl.reference_every = 7
loss.clip_low = 0.2
general.prompts = 3
heldout.problems = 5
[[stage]]
name = "three"
like = "two"
kl = 0.5
loss.name = "gspo"
"""


def test_the_tables_of_a_stage_like_another_inherit_key_by_key():
    recipe = Recipe.parse(TABLES, ["three.heldout.every=1"])
    two, three = recipe.stage("two"), recipe.stage("three")
    assert (two.heldout.every, two.heldout.problems, three.heldout.every, three.heldout.problems) == (3, 5, 1, 5)
    assert (two.general.tasks, two.general.prompts) == (["arithmetic"], 3), "what a table requires may be inherited"
    assert (two.kl.weight, two.kl.reference_every) == (0.02, 7), "a value in place of a table stands for one key"
    assert (three.kl.weight, three.kl.reference_every) == (0.5, 7)
    assert two.loss.settings == {"clip_low": 0.2, "clip_high": 0.3}
    assert three.loss.settings == {}, "settings belong to the plug-in that is named"
    assert Recipe.parse(recipe.to_toml()).stages == recipe.stages


@pytest.mark.parametrize("other", ['"frist"', '"third"', '"again"', "3"])
def test_a_stage_like_none_before_it(other):
    with pytest.raises(UserError, match=r'"again": like = .* is not an earlier stage; '):
        Recipe.parse(GOOD + LIKE.replace('"first"', other, 1))


MIXTURE = 'mixture = { fables = 0.3, "a b" = 0.7 }'
MISTAKES = [
    ("steps = 3", "stepz = 3", ['"first"', 'unknown key "stepz"', 'did you mean "steps"?']),
    ('kind = "compare"', 'kind = "comparee"', ['unknown kind "comparee"', 'did you mean "compare"?', "number 3"]),
    ('kind = "compare"', "", ['"kind" is required']),
    ("seed = 7", 'seed = "7"', ['key "seed" is "7" (a string), expected a whole number']),
    ("seed = 7", "sede = 7", ['unknown key "sede"', 'did you mean "seed"?']),
    ("seed = 7", "[layout]\npp = 0", ["[layout]", '"pp" is 0', "1"]),
    ("seed = 7", '[layout]\nschedule = "dualpip"', ["[layout]", '"schedule" is "dualpip"', "dualpipe"]),
    ("seed = 7", "[layout]\npq = 1", ["[layout]", 'unknown key "pq"']),
    ("steps = 3", "steps = 1.5", ['key "steps" is 1.5 (a number), expected a whole number']),
    ("steps = 3", "steps = true", ['key "steps" is true (true or false), expected a whole number']),
    ("steps = 3", 'pause = "x"', ['key "pause" is "x" (a string), expected a number']),
    (MIXTURE, "mixture = 3", ['key "mixture" is 3', "expected a table"]),
    (MIXTURE, 'mixture = { a = "b" }', ['key "mixture.a" is "b"', "expected a number"]),
    ('"8M"', '"8Q"', ['key "tokens" is "8Q"', '"8M"']),
    ('[["0", 0.0], ["200K", 3e-3]]', '[["1M", 0.0], ["200K", 3e-3]]', ['key "lr"', "sort the points"]),
    ('from = "first"', 'from = "frist"', ['from = "frist" does not exist', "first, count"]),
    ('models = ["first", "count"]', 'models = ["compare"]', ['models = "compare" is the stage itself']),
    ("steps = 3", 'from = "count"', ['from = "count" comes later', "no stage comes before it"]),
    ('name = "first"', 'name = "count"', ['two stages are named "count"']),
    ('name = "first"', 'name = "../up"', ['a stage is named "../up"']),
    ('name = "first"', 'name = "model"', ["a word that --set reserves"]),
    ('name = "toy"', 'name = "../toy"', ['name is "../toy"']),
    ('name = "toy"', "", ['key "name" is required']),
    ("seed = 7", "seed = ", ["not valid TOML", "line 3"]),
]


@pytest.mark.parametrize(("old", "new", "words"), MISTAKES)
def test_a_mistake_is_named(tmp_path, old, new, words):
    text = GOOD.replace('tokens = "8M"', 'steps = 3\ntokens = "8M"')
    assert old in text
    path = tmp_path / "bad.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        Recipe.load(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("first.tokenz=3", 'did you mean "tokens"'),
        ("frist.steps=3", 'did you mean "first"'),
        ("steps=3", "stage.key=value"),
        ("first.steps", "stage.key=value"),
        ("first.lr=[[", "not a TOML value"),
        ("first.steps=ten", "expected a whole number"),
        ("first.steps=1\nseed=2", "one value"),
        ("first.steps.x=1", "is not a table"),
        ("seed=", "not a TOML value"),
        ("seed=-1", '"seed" is -1 .*, expected greater than or equal to 0'),
        ("first.seed=-1", '"first".*"seed" is -1 .*, expected greater than or equal to 0'),
        (f"first.seed={2**63}", "expected less than 9223372036854775808"),
    ],
)
def test_a_bad_override_is_named(override, words):
    with pytest.raises(UserError, match=words):
        Recipe.parse(GOOD.replace('tokens = "8M"', "steps = 3"), [override])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("pretrain.tokens", "0", "expected greater than or equal to 1"),
     ("extend.tokens", "0", "expected greater than or equal to 1"),
     *((key, value, "expected values of 0 or more")
       for key in ("pretrain.lr", "pretrain.gamma", "pretrain.mtp_lambda", "extend.gamma", "extend.mtp_lambda",
                   "zero.lr", "distill.lr")
       for value in ("-1", '[["0", 0.1], ["1M", -1e-9]]'))],
)  # fmt: skip
def test_a_schedule_below_zero_is_refused(key, value, words):
    """And training on nothing, or against the gradient."""
    text = """
name = "x"
[[stage]]
kind = "corpus"
[[stage]]
kind = "pretrain"
lr = 0
[[stage]]
kind = "extend"
corpus = "corpus"
length = 64
lr = 1e-3
[[stage]]
kind = "rl"
name = "zero"
tasks = ["countdown"]
[[stage]]
kind = "distill"
teacher = "zero"
tasks = ["countdown"]
"""
    Recipe.parse(text, [f"{key}=1"])
    with pytest.raises(UserError, match=f'key "{key.partition(".")[2]}".*{words}'):
        Recipe.parse(text, [f"{key}={value}"])


def test_missing_and_empty_recipes(tmp_path):
    (tmp_path / "other.toml").write_text("")
    with pytest.raises(UserError, match=r"no recipe at .*tinny.toml; available recipes: .*other.toml"):
        Recipe.load(tmp_path / "tinny.toml")
    with pytest.raises(UserError, match=r"no stages"):
        Recipe.load(tmp_path / "other.toml")
    with pytest.raises(UserError, match=r"is a directory; name the recipe itself$"):
        Recipe.load(tmp_path)
    (tmp_path / "recipe.toml").write_text("")
    with pytest.raises(UserError, match=r"recipe.toml: no stages"):  # a run stands for its recipe
        Recipe.load(tmp_path)


def test_each_key_has_its_help_text():
    fields = toy_stage.CountConfig.model_fields
    assert fields["steps"].description == "How many steps to take."
    assert all(field.description for field in fields.values())
