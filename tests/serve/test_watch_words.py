"""The live page in Chinese: every text in its scripts or from the server, found in the code that produces it."""

import ast
import inspect
import re
from itertools import product

from bessemer.addons.diagnose import alarms, faults
from bessemer.addons.plan.recipe_help import describe_keys
from bessemer.addons.serve import run_follower, watch
from bessemer.addons.watch import curves
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
    own, server = scripts.pop("words.js").split("const SERVER")
    listed, translated = ({re.sub(r"\{\w+\}", "{}", key) for pair in re.findall(r"""[ {]("[^"]*"|'[^']*'):""", text)
                      for key in [pair[1:-1]]} for text in (own, server))  # fmt: skip
    texts = said_by_server()
    assert len(texts) > 100 and texts - translated - {"{}"} == set()
    calls = {words for text in scripts.values() for call in re.findall(r"\bt\(([^()]*)", text)
             for words in re.findall(r'"([^"]+)"', call.split("{ ")[0])}  # fmt: skip
    assert len(calls) > 25 and {re.sub(r"\{\w+\}", "{}", words) for words in calls} - listed == set()


def test_advice_names_keys_that_exist():
    keys = describe_keys("rl", ModelConfig, list(PRESETS))
    advice = {text for text in said_by_server() if re.search(r"\b(raise|lower|add|set|choose|sample|continue)\b", text)}
    named = {name for text in advice for name in re.findall(r"\b[a-z]+(?:[._][a-z]+)+\b", text)}
    assert len(named) > 5
    for name in named - {"loss.clip_high"}:  # a setting of the loss that is named, not a key of the table
        assert re.search(rf"(?m)^  {re.escape(name)} \(", keys), name
