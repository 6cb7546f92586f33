"""Answers right or wrong by construction, judged by every verifier: counts wrong verdicts in both directions.

`python bench/verifier_properties.py [COUNT] [FAMILY...]` writes bench/results/verifier_properties.json. A maker returns
(task, problem, answer, whether it is right) without looking at any verifier: a right answer writes the value in another
way; a wrong one has another value, or is not an answer at all (other alphabets, other units, two answers).
tests/tasks/test_verifier_properties.py judges a few hundred of each.
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from bessemer.tasks import Problem, Task, get

COUNT, SLOW = 100_000, {"expression": 10_000}
"""Answers per family; math-verify takes milliseconds for each."""
Case = tuple[Task, Problem, str, bool]
Maker = Callable[[random.Random], Case]
TEMPORARY = tempfile.TemporaryDirectory(prefix="verifier-properties-")
SPACE = ("", "", " ", "\n", "\r\n", "  \t", "\n\n")


def task_of(name: str, line: dict[str, object]) -> Task:
    path = Path(TEMPORARY.name) / f"{name}.jsonl"
    path.write_text(json.dumps(line) + "\n", "utf-8")
    return get(f"{name}:{path}")


MATHS = task_of("jsonl", {"question": "Q?", "answer": "1"})
CHOICE = task_of("choice", {"question": "Q?", "choices": ["a", "b"], "answer": "A"})
PUZZLE = task_of("puzzle", {"question": "Q?", "answer": "x"})
NAMED = {name: get(name) for name in ("arithmetic", "words", "logic", "countdown")}


def ask(gold: object, question: str = "How many?", key: str = "gold", **meta: object) -> Problem:
    return Problem("p", question, "en", {key: gold, **meta})


def spaced(rng: random.Random, text: str) -> str:
    return rng.choice(SPACE) + text + rng.choice(SPACE)


def integer_of(rng: random.Random) -> int:
    return rng.choice((-1, 1)) * rng.randrange(10 ** rng.choice((1, 2, 3, 6, 9, 12, 18, 40)))


def look_alikes(rng: random.Random, text: str) -> str:
    """The text with a character replaced from another alphabet, or with an invisible one inserted."""
    position = rng.randrange(len(text))
    others = {**{str(n): chr(0xFF10 + n) for n in range(10)}, "-": "\u2010", "x": "х", "a": "а", "e": "е", "T": "Т"}
    if text[position] in others and rng.random() < 0.7:
        return text[:position] + others[text[position]] + text[position + 1 :]
    return text[:position] + rng.choice("\u200b\u00ad\u2060\u0301") + text[position:]


def integer(rng: random.Random) -> Case:
    value, task = integer_of(rng), NAMED[rng.choice(("arithmetic", "words"))]
    problem = ask(value, key="value")
    if rng.random() < 0.5:
        return task, problem, spaced(rng, str(value)), True
    other = value + rng.choice((-1, 1)) * rng.choice((1, 2, 10, 10**6, abs(value) + 1))
    wrong = (
        str(other),
        f"{value} or {other}",
        f"{value}.5",
        look_alikes(rng, str(value)),
        f"{value}%",
        f"{value}{abs(other)}",
    )
    return task, problem, spaced(rng, rng.choice(wrong)), False


UNITS = {  # sign of the unit: how it is written after a number, and a question that names it
    "%": (("%", "\\%", " percent", "\\text{ percent}"), "What percent of them is it?"),
    "$": (("\\$", " dollars", "\\text{ dollars}"), "How many dollars does she earn?"),
    "cm": ((" cm", "\\text{ cm}", "\\ \\mathrm{cm}", "\\,\\text{cm}"), "How long is it in cm?"),
    "cm^2": ((" cm^2", "\\text{ cm}^2", "\\text{ cm}^{2}", " cm²"), "How large is it in cm^2?"),
    "°": (("°", "^\\circ", "^{\\circ}", " degrees"), "What is the angle?"),
    "hours": ((" hours", "\\text{ hours}", "~\\text{hours}"), "How many hours does it take?"),
}


def number(rng: random.Random) -> Case:
    kind = rng.choice(("integer", "decimal", "fraction", "power"))
    unit = rng.choice([*UNITS, None, None, None])
    question = UNITS[unit][1] if unit else "How many are there?"
    if kind == "fraction":
        value = Fraction(integer_of(rng), rng.randrange(2, 10 ** rng.choice((1, 2, 6))))
        forms = [f"{value.numerator}/{value.denominator}"] if value.denominator > 1 else [str(value)]
        if value.denominator > 1:
            n, d, k = abs(value.numerator), value.denominator, rng.randrange(2, 20)
            sign = "-" if value < 0 else ""
            forms += [f"{sign}\\{form}{{{n}}}{{{d}}}" for form in ("frac", "dfrac", "tfrac")]
            forms += [f"{sign}{n * k}/{d * k}", f"{sign}\\frac{{{n * k}}}{{{d * k}}}", f"\\frac{{{sign}{n}}}{{{d}}}"]
            if n < 10 and d < 10:
                forms += [
                    f"{sign}\\frac{n}{d}",
                    f"{sign}\\frac {n} {d}",
                    f"{sign}\\frac{{{n}}}{d}",
                    f"{sign}\\frac{n}{{{d}}}",
                ]
    elif kind == "power":
        base, exponent = rng.randrange(2, 30), rng.randrange(2, 12)
        value, forms = Fraction(base**exponent), [f"{base}^{{{exponent}}}", f"{base}^{exponent}", str(base**exponent)]
    else:
        digits = rng.randrange(1, 9) if kind == "decimal" else 0
        value = Fraction(integer_of(rng), 10**digits)
        plain = f"{'-' if value < 0 else ''}{abs(value.numerator * 10**digits // value.denominator):0{digits + 1}d}"
        plain = f"{plain[:-digits]}.{plain[-digits:]}" if digits else plain
        whole, point, part = plain.partition(".")
        grouped = f"{int(whole):,}" if int(whole) or not whole.startswith("-") else whole
        forms = [plain, grouped + point + part, f"{grouped.replace(',', '{,}')}{point}{part}", f"{whole}.{part}000"]
        if whole == "0" and part:
            forms.append(f".{part}")
    gold = rng.choice(forms[:1] if kind != "power" else forms[2:])
    if unit and rng.random() < 0.5:
        gold += rng.choice(UNITS[unit][0])
    problem = ask(gold, question)

    def dressed(text: str) -> str:
        if unit and rng.random() < 0.5:
            text += rng.choice(UNITS[unit][0])
        if rng.random() < 0.3:
            wraps = ("${}$", "\\({}\\)", "\\boxed{{{}}}", "\\[{}\\]", "{}.", "x = {}", "$$\n{}\n$$")
            wrap = rng.choice(wraps if "\\$" not in text and not text.endswith(".") else wraps[1:2])
            text = wrap.format(text)
        return spaced(rng, text)

    if rng.random() < 0.5:
        return MATHS, problem, dressed(rng.choice(forms)), True
    other = value + rng.choice((-1, 1)) * rng.choice((Fraction(1), Fraction(1, 10), Fraction(1, 10**9), abs(value) + 1))
    foreign = rng.choice([other_unit for other_unit in UNITS if other_unit not in (unit, "°" if unit == "%" else "")])
    wrong = (
        f"{other.numerator}/{other.denominator}",
        forms[0] + rng.choice(UNITS[foreign][0]),
        look_alikes(rng, forms[0]),
        f"{forms[0]}, {forms[0]}1",
        f"{forms[0]} + 0",
        f"{forms[0]}x",
        "1+" + forms[0].removeprefix("-"),
    )
    return MATHS, problem, spaced(rng, rng.choice(wrong)), False


def quantity(rng: random.Random) -> Case:
    written = {"m/s": ("m/s", "\\text{ m/s}", "\\,\\mathrm{m}/\\mathrm{s}"), "N m": ("N m", "N·m", "\\text{N m}"),
               "kg": ("kg", "\\text{ kg}", "~\\mathrm{kg}"), "°C": ("°C", " ^\\circ\\text{C}", "^{\\circ} C"),
               "m/s^2": ("m/s^2", "\\text{ m/s}^2", "m/s²")}  # fmt: skip
    unit, tolerance = rng.choice(list(written)), rng.choice((0, 0.01, 0.05))
    cents = rng.randrange(100, 10**6)
    problem = ask(f"{cents / 100:.2f}", unit=unit, tolerance=tolerance)
    factor = 1 + tolerance * rng.uniform(-0.9, 0.9)
    near = f"{cents / 100 * factor:.8f}" if tolerance else f"{cents / 100:.2f}"
    if rng.random() < 0.5:
        text = rng.choice((near, f"{float(near):.12e}" if tolerance else near))
        return MATHS, problem, spaced(rng, f"{text}{rng.choice(('', ' ' + rng.choice(written[unit])))}"), True
    far = f"{cents / 100 * (1 + rng.choice((-1, 1)) * (tolerance + rng.uniform(0.001, 0.5))):.8f}"
    other = rng.choice([candidate for candidate in (*written, "%", "ms", "g", "Nm") if candidate != unit])
    wrong = (far, f"{near} {other}", f"{near} {unit} {near} {unit}", look_alikes(rng, near), f"${near} {unit}", unit)
    return MATHS, problem, spaced(rng, rng.choice(wrong)), False


def choice(rng: random.Random) -> Case:
    letters = "ABCDEFGH"[: rng.randrange(2, 9)]
    choices, gold = [f"answer {n}" for n in rng.sample(range(99), len(letters))], rng.choice(letters)
    problem = ask(gold, choices=choices)
    text = choices[letters.index(gold)]
    if rng.random() < 0.5:
        forms = (
            gold,
            gold.lower(),
            f"({gold})",
            f"{gold}.",
            f"{gold}) {text}",
            f"\\text{{{gold}}}",
            f"\\boxed{{{gold}}}",
        )
        return CHOICE, problem, spaced(rng, rng.choice(forms)), True
    other = rng.choice(letters.replace(gold, "")) if len(letters) > 1 else "Z"
    alike = {"A": "А", "B": "В", "C": "С", "E": "Е", "H": "Н"}.get(gold, chr(ord(gold) + 0xFEE0))
    wrong = (
        other,
        f"{gold} or {other}",
        f"{gold}{other}",
        f"{gold}) {choices[letters.index(other)]}",
        alike,
        text,
        "Z",
    )
    return CHOICE, problem, spaced(rng, rng.choice(wrong)), False


def value_of(rng: random.Random, depth: int = 2) -> object:
    kinds = ("int", "text", "bool") if depth == 0 else ("int", "text", "bool", "list", "dict")
    kind = rng.choice(kinds)
    if kind == "list":
        return [value_of(rng, depth - 1) for _ in range(rng.randrange(1, 4))]
    if kind == "dict":
        return {rng.choice("abcdef") + str(n): value_of(rng, depth - 1) for n in range(rng.randrange(1, 4))}
    return {
        "int": rng.randrange(-999, 999),
        "text": rng.choice(("Ann", "Bo", "red axe", "x")),
        "bool": rng.random() < 0.5,
    }[kind]


def puzzle(rng: random.Random) -> Case:
    gold = [value_of(rng)]
    problem = ask(gold)
    if rng.random() < 0.5:
        text = json.dumps(gold, indent=rng.choice((None, 1)), sort_keys=rng.random() < 0.5)
        return PUZZLE, problem, spaced(rng, rng.choice((text, f"```json\n{text}\n```"))), True
    text = json.dumps(gold)
    wrong = (
        json.dumps([*gold, gold[0]]),
        json.dumps([[gold]]),
        json.dumps(["Cy"]),
        look_alikes(rng, text[:-1]) + "]]",
        *(text[:-1], text + text, "null", "NaN", "[]"),
    )
    return PUZZLE, problem, spaced(rng, rng.choice(wrong)), False


def logic(rng: random.Random) -> Case:
    values = [rng.random() < 0.5 for _ in range(3)]
    problem = ask(values, key="values")
    words = rng.choice((("true", "false"), ("True", "False"), ("真", "假")))
    comma = rng.choice((",", ", ", "，", "、"))
    if words[0] == "True":
        words = ("true", "false")
    named = [words[0] if value else words[1] for value in values]
    if rng.random() < 0.5:
        return NAMED["logic"], problem, spaced(rng, comma.join(named)), True
    position = rng.randrange(3)
    flipped = [words[0] if value != (n == position) else words[1] for n, value in enumerate(values)]
    text = comma.join(named)
    wrong = (comma.join(flipped), comma.join(named[:2]), text + comma + named[0], look_alikes(rng, text), text + ".")
    return NAMED["logic"], problem, spaced(rng, rng.choice(wrong)), False


def countdown(rng: random.Random) -> Case:
    numbers = [rng.randrange(1, 10 ** rng.choice((1, 1, 2, 8))) for _ in range(3)]
    nodes = [(str(n), Fraction(n)) for n in numbers]
    while len(nodes) > 1:
        (a, x), (b, y) = (nodes.pop(rng.randrange(len(nodes))) for _ in range(2))
        op = rng.choice("+-*/" if y else "+-*")
        value = {"+": x + y, "-": x - y, "*": x * y, "/": x / (y or 1)}[op]
        nodes.append((f"({rng.choice(('', ' '))}{a}{rng.choice(('', ' '))}{op}{b})", value))
    text, value = nodes[0]
    problem = Problem("p", "Use them.", "en", {"numbers": numbers, "target": value})
    if rng.random() < 0.5:
        return NAMED["countdown"], problem, spaced(rng, rng.choice((text, text[1:-1]))), True
    wrong = (
        f"{text}+1",
        f"{text}*1",
        f"-{text}",
        f"{text}={value}",
        str(value),
        look_alikes(rng, text),
        f"{text}\n{text}",
        text[:-1],
    )
    return NAMED["countdown"], problem, spaced(rng, rng.choice(wrong)), False


def expression(rng: random.Random) -> Case:
    """Sums of terms in x, y, roots and pi, in another order, with factors taken out or fractions in another form."""
    atoms = ("x", "x^2", "y", "xy", "\\sqrt{2}", "\\pi", "x^3", "t")
    terms = [(rng.randrange(1, 12), atom) for atom in rng.sample(atoms, rng.randrange(2, 4))]

    def written(some: list[tuple[int, str]]) -> str:
        return "+".join(f"{k if k != 1 else ''}{atom}" for k, atom in some)

    problem = ask(written(terms), "Write it down.")
    shuffled = rng.sample(terms, len(terms))
    if rng.random() < 0.5:
        common = rng.randrange(2, 5)
        forms = (
            written(shuffled),
            f"${written(shuffled)}$",
            f"\\frac{{{written([(k * common, atom) for k, atom in shuffled])}}}{{{common}}}",
            "+".join(f"{atom} \\cdot {k}" for k, atom in shuffled),
            f"{written(shuffled[:1])} - \\left(-{shuffled[1][0]}{shuffled[1][1]}\\right)"
            + "".join(f"+{k}{atom}" for k, atom in shuffled[2:]),
        )
        return MATHS, problem, spaced(rng, rng.choice(forms)), True
    k, atom = shuffled[0]
    wrong = (
        written([(k + 1, atom), *shuffled[1:]]),
        written(shuffled[1:]),
        written(shuffled) + "+1",
        f"-({written(shuffled)})",
        f"{k}+" + written(shuffled[1:]),  # without its letter
        written(shuffled).replace("x", "х") if "x" in written(shuffled) else written(shuffled) + "х",
        written(shuffled) + "\\text{ cm}",
    )
    return MATHS, problem, spaced(rng, rng.choice(wrong)), False


def form(rng: random.Random) -> Case:
    """Whole replies to one question: the two forms are right, anything else around the answer is wrong."""
    task, problem = NAMED["words"], ask(7, key="value")
    thoughts = f"<think>{rng.choice(('3+4=7', '想一想', 'so it is'))}</think>"
    prose = rng.choice(("So it is", "**Result**", "所以答案是", "We add.\n\nThen")) * rng.randrange(1, 9)
    box = rng.choice(("\\boxed{7}", "<answer>7</answer>", "\\(\\boxed{7}\\)", "<answer>\n7\r\n</answer>"))
    good = (
        f"{thoughts}{rng.choice(SPACE)}<answer>7</answer>{rng.choice(SPACE)}",
        f"{thoughts}\n\n{prose} {box}\n\n{prose}",
        f"{thoughts}\r\n\r\n{prose} {box}",
    )
    if rng.random() < 0.5:
        return task, problem, rng.choice(good), True
    hidden = rng.choice(
        ("\u200b", "\u2062" * 50, "<!-- right -->", "\U000e0041", "\u202e", " " * 100, "\x00", "word " * 2000)
    )
    bad = (
        f"{thoughts}\n\n{prose}{hidden} {box}",
        f"{thoughts}\n\n{box}{hidden}.",
        f"{thoughts}{prose} {box}",
        f"{thoughts}<answer>7</answer>{prose}",
        f"{hidden}{thoughts}<answer>7</answer>",
        f"{thoughts}\n\n{box} or \\boxed{{8}}",
        f"<think>{hidden if hidden.isspace() else ' '}</think><answer>7</answer>",
        f"{thoughts}<answer>7{hidden}</answer>",
    )
    return task, problem, rng.choice(bad), False


FAMILIES: dict[str, Maker] = {
    maker.__name__: maker for maker in (integer, number, quantity, choice, puzzle, logic, countdown, expression, form)
}


def wrong_verdicts(name: str, count: int, seed: int = 0) -> tuple[list[Case], int, int]:
    """(cases that were judged wrongly, right answers, wrong answers) of a family."""
    rng, failed, n_right = random.Random(f"{name}/{seed}"), [], 0
    for _ in range(count):
        task, problem, answer, right = case = FAMILIES[name](rng)
        n_right += right
        if name == "form":
            judged = task.verify(problem, answer).sound
        else:
            judged = task.grade(problem, answer)[0] == "correct"
        if judged != right:
            failed.append(case)
    return failed, n_right, count - n_right


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else COUNT
    names = sys.argv[2:] or list(FAMILIES)
    result = {}
    for name in names:
        began = time.process_time()
        failed, right, wrong = wrong_verdicts(name, min(count, SLOW.get(name, count)))
        result[name] = {"right": right, "refused though right": sum(case[3] for case in failed), "wrong": wrong,
                        "paid though wrong": sum(not case[3] for case in failed)}  # fmt: skip
        print(name, result[name], f"{time.process_time() - began:.0f} s")
        for _, problem, answer, is_right in failed[:8]:
            print("   ", problem.meta, problem.prompt, repr(answer), is_right)
    if not sys.argv[2:]:
        path = Path(__file__).parent / "results" / "verifier_properties.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
