"""Chinese: every text of the live page and of the alarms, found in the code that produces it, and every item of the
papers' recipe."""

import ast
import inspect
import re
import tomllib
from itertools import product
from pathlib import Path

import pytest
from chinese_pages import NAMED, TERMS, WORD

from bessemer.addons.diagnose import alarms, faults
from bessemer.addons.plan import conformance
from bessemer.addons.plan.recipe_help import describe_keys
from bessemer.addons.serve import run_follower, watch
from bessemer.addons.watch import chinese, curves
from bessemer.config.recipe import Recipe
from bessemer.model.config import PRESETS, ModelConfig


def sentences(node, scope):
    """All texts that an expression can produce, with {} for the variable parts."""
    if isinstance(node, ast.Constant):
        return {str(node.value)}
    if isinstance(node, ast.IfExp):
        return sentences(node.body, scope) | sentences(node.orelse, scope)
    if isinstance(node, ast.FormattedValue):
        bound = scope.get(node.value.id) if isinstance(node.value, ast.Name) else None
        return sentences(bound, scope) if isinstance(bound, ast.IfExp) else {"{}"}
    if isinstance(node, ast.Name) and node.id in scope:
        return sentences(scope[node.id], scope)
    parts = [node.left, node.right] if isinstance(node, ast.BinOp) else getattr(node, "values", None)
    assert parts, ast.dump(node)
    return {"".join(combination) for combination in product(*(sentences(part, scope) for part in parts))}


def said_by_server():
    """Names of all charts and curves, and the texts of alarms and errors, from the code that produces them."""
    texts = {text for panel in curves.TRAINING + curves.LEARNING for text in (panel.title, panel.unit) if text}
    texts |= {*curves.NAMES.values()}
    for module in (alarms, faults, run_follower):
        for function in ast.walk(ast.parse(inspect.getsource(module))):
            if not isinstance(function, ast.FunctionDef):
                continue
            nodes = [*ast.walk(function)]
            scope = {node.targets[0].id: node.value for node in nodes
                     if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}  # fmt: skip
            for call in (node for node in nodes if isinstance(node, ast.Call)):
                if getattr(call.func, "id", "") == "Alarm":
                    texts.add(call.args[0].value.replace("-", " "))
                    texts |= set().union(*(sentences(text, scope) for text in call.args[1:]))
                elif getattr(call.func, "attr", "") == "append" and isinstance(call.args[0], ast.JoinedStr):
                    texts |= sentences(call.args[0], scope)
                elif getattr(call.func, "attr", "") == "append" and isinstance(call.args[0], ast.Dict):
                    keys = [getattr(key, "value", None) for key in call.args[0].keys]
                    message = call.args[0].values[keys.index("message")] if "message" in keys else None
                    texts |= sentences(message, scope) if isinstance(message, ast.JoinedStr) else set()
    return texts


def test_every_word_of_the_page_has_a_translation():
    folder = watch.PAGES[0]
    scripts = {path.name: path.read_text("utf-8") for path in folder.glob("*.js")}
    own = scripts.pop("words.js")
    listed = {re.sub(r"\{\w+\}", "{}", key) for key in re.findall(r'[ {]"([^"]*)":', own)}
    texts = {text for text in said_by_server() if re.search("[a-z]{2}", text)}
    known = {re.sub(r"\{\w+\}", "{}", key) for key in chinese.table()}
    assert len(texts) > 100 and texts - known == set()
    calls = {words for text in scripts.values() for call in re.findall(r"\bt\(([^()]*)", text)
             for words in re.findall(r'"([^"]+)"', call.split("{ ")[0])}  # fmt: skip
    assert len(calls) > 25 and {re.sub(r"\{\w+\}", "{}", words) for words in calls} - listed == set()


def test_no_text_of_the_table_has_two_translations():
    text = Path(chinese.__file__).with_suffix(".toml").read_text("utf-8")
    keys = [key for section in tomllib.loads(text).values() for key in section]
    assert len(keys) == len(set(keys)) > 700
    for english, said in chinese.table().items():
        assert set(re.findall(r"\{\w+\}", said)) <= set(re.findall(r"\{\w+\}", english)), english
        assert " %" not in said and not re.search(r"[\u4e00-\u9fff] [\u4e00-\u9fff]", said), said


@pytest.mark.parametrize(
    ("english", "said"),
    [
        ("14.8T tokens", "14.8 万亿个词元"),
        ("671B parameters, 37.6B per token; pp 16; 1f1b; FP8. Bound by computation.",
         "6,710 亿参数，每个词元激活 376 亿；pp 16；1f1b；FP8。瓶颈：计算。"),
        ("42.9 % of the BF16 peak", "BF16 峰值算力的 42.9%"),
        ("1m 05s", "1 分 05 秒"),
        ("zero · seed 7 · 2026-05-08", "zero · 种子 7 · 2026 年 5 月 8 日"),
        ("1.5K", "1,500"),
        ("no such words here", None),
        ("rl", None),
    ],
)  # fmt: skip
def test_numbers_and_dates_follow_chinese_usage(english, said):
    assert chinese.chinese(english) == said


def test_every_item_of_the_papers_recipe_has_its_chinese():
    names = {*WORD.findall("right random coin today zero dev1 question off policy whole vocabulary grpo gspo maths "
                           "aime python dp r1 helpful")}  # fmt: skip
    left = set()
    for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.toml")):
        if "[[stage]]" not in path.read_text("utf-8"):
            continue
        for row in conformance.rows(Recipe.load(path)):
            for text in row.values():
                words = set(WORD.findall(NAMED.sub("", chinese.said(text))))
                left |= {text} if words - TERMS - names else set()
    assert left == set()


def test_advice_names_keys_that_exist():
    keys = describe_keys("rl", ModelConfig, list(PRESETS))
    advice = {text for text in said_by_server() if re.search(r"\b(raise|lower|add|set|choose|sample|continue)\b", text)}
    named = {name for text in advice for name in re.findall(r"\b[a-z]+(?:[._][a-z]+)+\b", text)}
    assert len(named) > 5
    for name in named - {"loss.clip_high"}:  # a setting of the loss that is named, not a key of the table
        assert re.search(rf"(?m)^  {re.escape(name)} \(", keys), name
