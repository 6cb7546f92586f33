"""Settings of a stage's tasks: what is asked, how often, and which mistakes are named."""

import json
from collections import Counter

import pytest
import rl_stage

from bessemer import tasks
from bessemer.config.recipe import Recipe
from bessemer.config.rl import RLConfig
from bessemer.errors import UserError
from bessemer.pipeline.stages.rl import RL
from bessemer.rl.task_mix import mixture, turns

HEAD = '[[stage]]\nkind = "import"\nmodel = "m"\n[[stage]]\nkind = "rl"\n'


def config(**keys):
    return RLConfig(kind="rl", name="zero", **{"tasks": ["countdown", "arithmetic"], **keys})


def asked(settings, count, names=None):
    from bessemer.rl.rollout import problems_of

    return problems_of(mixture(settings, names or settings.tasks), "train", 0, count, 7)


def test_without_options_the_problems_are_what_they_were():
    plain = config()
    assert [p for _, p in asked(plain, 20)] == [
        tasks.get(plain.tasks[n % 2]).problem("train", n // 2, 7) for n in range(20)
    ]
    shared = config(task_options={"countdown": {"share": 3}})
    assert shared.fingerprint_values()["task_options"] != plain.fingerprint_values()["task_options"]


def test_languages_shares_and_the_generator_s_own_settings():
    settings = config(tasks=["countdown:4", "arithmetic"], task_options={
        "countdown:4": {"share": 3, "languages": ["en"], "largest": 20},
        "arithmetic": {"phrasing": "held-out"},
    })  # fmt: skip
    rows = asked(settings, 400)
    names = [task.name for task, _ in rows]
    assert Counter(names) == {"countdown:4": 300, "arithmetic": 100}
    assert all("arithmetic" in names[n : n + 4] for n in range(390)), "turns are spread evenly"
    of = {name: [problem for task, problem in rows if task.name == name] for name in set(names)}
    assert {(p.language, len(p.meta["numbers"])) for p in of["countdown:4"]} == {("en", 4)}
    assert 10 < max(max(p.meta["numbers"]) for p in of["countdown:4"]) <= 20
    assert {p.language for p in of["arithmetic"]} == {"en", "zh"}
    assert {"held-out" in p.meta["template"] for p in of["arithmetic"]} == {True}
    assert len({p.prompt for _, p in rows}) == 400


@pytest.mark.parametrize(
    ("shares", "order"),
    [([1, 1], [0, 1]), ([3, 1], [0, 0, 1, 0]), ([1, 2, 1], [1, 0, 2, 1]), ([5], [0] * 5), ([1, 1, 1], [0, 1, 2])],
)
def test_a_round_spreads_its_turns(shares, order):
    assert turns(shares) == order


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"task_options": {"countdwn": {"share": 2}}}, '"countdwn" is of no task'),
        ({"task_options": {"countdown": {"langages": 4}}}, "did you mean languages.*Known: share, languages"),
        ({"task_options": {"countdown": {"slip_sloppy": 0.1}}}, "no setting 'slip_sloppy'"),
        ({"task_options": {"arithmetic": {"largest": 4}}}, "no setting 'largest'.*Known: share"),
        ({"task_options": {"countdown": {"share": 0}}}, "share is 0"),
        ({"task_options": {"countdown": {"share": 1.5}}}, "share is 1.5"),
        ({"task_options": {"countdown": {"languages": "en"}}}, "languages is 'en'; write a list"),
        ({"task_options": {"countdown": {"languages": ["fr"]}}}, "no language 'fr'"),
        ({"task_options": {"countdown": {"phrasing": "new"}}}, "no phrasing 'new'"),
        ({"task_options": {"countdown": {"plain_answers": 0.5}}, "accuracy_needs_format": True}, "asks for the form"),
        ({"task_options": {"words": {"share": 2}}, "heldout": {"tasks": ["words"]}}, "only evaluated"),
    ],
)
def test_a_setting_that_cannot_work_is_named(keys, fault):
    recipe = Recipe.parse("name = 'x'\n" + HEAD + "tasks = ['countdown']\n")
    with pytest.raises(UserError, match=f'stage "zero".*{fault}'):
        RL().resolve(config(**keys), recipe)


def test_a_recipe_writes_and_reads_them_and_set_changes_one():
    text = (
        "name = 'x'\n"
        + HEAD
        + (
            'tasks = ["countdown", "gym:chain_sum"]\n[stage.task_options.countdown]\nshare = 4\n'
            '[stage.task_options."gym:chain_sum"]\nshare = 2\nlanguages = ["en"]\n'
        )
    )
    recipe = Recipe.parse(text, ["rl.task_options.countdown.share=5"])
    options = recipe.stage("rl").task_options
    assert options == {"countdown": {"share": 5}, "gym:chain_sum": {"share": 2, "languages": ["en"]}}
    assert Recipe.parse(recipe.to_toml()).stage("rl").task_options == options


def test_the_stage_asks_and_evaluates_by_them(tmp_path):
    base = rl_stage.write_base(tmp_path)
    stage = rl_stage.Stage(
        base, tmp_path / "run", rl_stage.COIN, 'tasks=["countdown", "arithmetic"]', "rollouts=1",
        'task_options={countdown={share=3, languages=["en"]}, arithmetic={languages=["zh"]}}',
    )  # fmt: skip
    loop = stage.loop()
    groups = []
    score = loop.generator.score
    loop.generator.score = lambda problems, *rest: groups.append(problems) or score(problems, *rest)
    loop.run()
    (trained,) = [problems for problems in groups if len(problems) == 4]
    assert [task.name for task, _ in trained] == ["countdown", "countdown", "arithmetic", "countdown"]
    lines = [json.loads(line) for line in (stage.out / "rollouts.jsonl").read_text().splitlines()]
    assert {line["id"].rpartition("/")[2] for line in lines if line["id"].startswith("countdown")} == {"en"}
    assert {line["id"].rpartition("/")[2] for line in lines if line["id"].startswith("arithmetic")} == {"zh"}
    assert {problem.language for task, problem in trained if task.name == "countdown"} == {"en"}
