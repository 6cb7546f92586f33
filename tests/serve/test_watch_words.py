"""The live page in Chinese: every text in its scripts or from the server, found in the code that produces it."""

import ast
import inspect
import re
from itertools import product

from bessemer.addons.serve import run_follower, watch
from bessemer.addons.watch import alarms, curves


def sentences(node, scope):
    """All texts that an expression can produce, with {} for the variable parts."""
    if isinstance(node, ast.Constant):
        return {str(node.value)}
    if isinstance(node, ast.IfExp):
        return sentences(node.body, scope) | sentences(node.orelse, scope)
    if isinstance(node, ast.FormattedValue):
        known = scope.get(node.value.id) if isinstance(node.value, ast.Name) else None
        return sentences(known, scope) if isinstance(known, ast.IfExp) else {"{}"}
    if isinstance(node, ast.Name) and node.id in scope:
        return sentences(scope[node.id], scope)
    parts = [node.left, node.right] if isinstance(node, ast.BinOp) else getattr(node, "values", None)
    assert parts, ast.dump(node)
    return {"".join(said) for said in product(*(sentences(part, scope) for part in parts))}


def said_by_server():
    """Names of all charts and curves, and the texts of alarms and errors, from the code that produces them."""
    found = {text for panel in curves.TRAINING + curves.LEARNING for text in (panel.title, panel.unit) if text}
    found |= {*curves.NAMES.values()}
    for module in (alarms, run_follower):
        for function in ast.walk(ast.parse(inspect.getsource(module))):
            if not isinstance(function, ast.FunctionDef):
                continue
            nodes = [*ast.walk(function)]
            scope = {one.targets[0].id: one.value for one in nodes
                     if isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Name)}  # fmt: skip
            for call in (one for one in nodes if isinstance(one, ast.Call)):
                if getattr(call.func, "id", "") == "Alarm":
                    found.add(call.args[0].value.replace("-", " "))
                    found |= set().union(*(sentences(text, scope) for text in call.args[1:]))
                elif getattr(call.func, "attr", "") == "append" and isinstance(call.args[0], ast.JoinedStr):
                    found |= sentences(call.args[0], scope)
                elif getattr(call.func, "attr", "") == "append" and isinstance(call.args[0], ast.Dict):
                    keys = [getattr(key, "value", None) for key in call.args[0].keys]
                    message = call.args[0].values[keys.index("message")] if "message" in keys else None
                    found |= sentences(message, scope) if isinstance(message, ast.JoinedStr) else set()
    return found


def test_every_word_of_the_page_has_a_translation():
    folder = watch.PAGES[0]
    scripts = {path.name: path.read_text("utf-8") for path in folder.glob("*.js")}
    own, server = scripts.pop("words.js").split("const SERVER")
    listed, known = ({re.sub(r"\{\w+\}", "{}", key) for pair in re.findall(r"""[ {]("[^"]*"|'[^']*'):""", text)
                      for key in [pair[1:-1]]} for text in (own, server))  # fmt: skip
    said = said_by_server()
    assert len(said) > 100 and said - known - {"{}"} == set()
    calls = {words for text in scripts.values() for call in re.findall(r"\bt\(([^()]*)", text)
             for words in re.findall(r'"([^"]+)"', call.split("{ ")[0])}  # fmt: skip
    assert len(calls) > 25 and {re.sub(r"\{\w+\}", "{}", words) for words in calls} - listed == set()
