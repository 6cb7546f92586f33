"""Agreement with the golden answers (tests/data/golden) of our graders, of math-verify and of lm-eval.

    python bench/golden_answers.py [--second] [--disagreements [GRADER]] [--family NAME ...] [--json PATH]

For every family and grader: the answers judged, the share of verdicts that agree with the label, right answers refused
and wrong answers paid. `--disagreements` lists them one by one. `--second` takes the second set,
tests/data/golden/second. The graders:

- ours: the `verify` of the task that the answer names.
- math-verify: `parse` of gold answer and completion, then `verify`, as its README has it; a choice by its
  `StringExtractionConfig`.
- lm-eval: the installed tasks' own code. Mathematics: aime24's `process_results`, a box, else what is between dollars;
  hendrycks_math and the exact match of minerva_math expect forms that a chat model does not write, the other metric of
  minerva_math is math-verify. GSM8K, choices: the filter `flexible-extract` of gsm8k and of gpqa_main_cot_zeroshot.

The two peers get what follows `</think>`, as with lm-eval's `think_end_token`. They judge no programs, so the family
`code` is counted apart. A grader that raises has refused the answer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bessemer.errors import UserError
from bessemer.tasks import get

FOLDER = Path(__file__).parents[1] / "tests" / "data" / "golden"
SECOND = FOLDER / "second"
THINK, END = "<think>", "</think>"
Entry = dict[str, Any]
Paid = dict[str, bool | None]
"""By id, whether a grader pays the answer; None if it does not judge this kind."""


def entries(families: Iterable[str] = (), folder: Path = FOLDER) -> list[Entry]:
    """The golden answers of the families, or all of them."""
    paths = [folder / f"{name}.jsonl" for name in families] or sorted(folder.glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text("utf-8").splitlines()]


def ours(answers: list[Entry]) -> Paid:
    """Verdicts of our tasks."""
    paid: Paid = {}
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        for task in dict.fromkeys(entry["task"] for entry in answers):
            paid |= _ours(task, [entry for entry in answers if entry["task"] == task], Path(folder))
    return paid


def _ours(task: str, answers: list[Entry], folder: Path) -> Paid:
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps(_line(entry)) + "\n" for entry in answers), "utf-8")
    try:
        judge = get(f"{task}:{path}@test")
    except UserError as error:  # a gold answer that the task cannot read: find it, and go on without it
        if len(answers) == 1:
            print(f"{answers[0]['id']}: {error}")
            return {answers[0]["id"]: False}
        half = len(answers) // 2
        return _ours(task, answers[:half], folder) | _ours(task, answers[half:], folder)
    problems = [judge.problem("test", number) for number in range(judge.size("test") or 0)]
    by_id = {problem.id.rpartition("/")[2]: problem for problem in problems}
    return {entry["id"]: judge.verify(by_id[entry["id"]], _whole(entry)).correct for entry in answers}


def _line(entry: Entry) -> Entry:
    fields = {key: entry[key] for key in ("id", "language", "question", "choices", "entry_point", "tests", "unit",
                                        "tolerance") if key in entry}  # fmt: skip
    return fields | ({"answer": entry["gold"]} if "gold" in entry else {})


def _whole(entry: Entry) -> str:
    """What follows `Assistant:`, with the thoughts' first tag where the template wrote it."""
    text = entry["completion"]
    return f"{THINK}\n{text}" if END in text and THINK not in text else text


def _answer(entry: Entry) -> str:
    return entry["completion"].rpartition(END)[2]


def math_verify(answers: list[Entry]) -> Paid:
    return {entry["id"]: _judged(_math_verify, entry) for entry in answers}


def _math_verify(entry: Entry) -> bool | None:
    from math_verify import StringExtractionConfig, parse, verify

    if entry["task"] == "code":
        return None
    if entry["task"] == "choice":
        letters = [StringExtractionConfig(strings=_letters(entry))]
        return bool(verify(parse(entry["gold"], letters), parse(_answer(entry), letters)))
    return bool(verify(parse(f"${_gold(entry)}$"), parse(_answer(entry))))


def lm_eval(answers: list[Entry]) -> Paid:
    return {entry["id"]: _judged(_lm_eval, entry) for entry in answers}


def _lm_eval(entry: Entry) -> bool | None:
    from lm_eval.tasks.aime.utils import process_results

    if entry["task"] == "code":
        return None
    if entry["task"] == "jsonl":
        return bool(process_results({"answer": entry["gold"]}, [_answer(entry)])["exact_match"])
    if entry["task"] == "gsm8k":
        return _filtered("gsm8k/gsm8k.yaml", entry["gold"], entry)
    return _filtered("gpqa/cot_zeroshot/_gpqa_cot_zeroshot_yaml", f"({entry['gold']})", entry)


def _filtered(task: str, gold: str, entry: Entry) -> bool:
    """The verdict of a task's filter `flexible-extract` and of its metric."""
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.filters import build_filter_ensemble

    config = _config(task)
    chain = next(chain for chain in config["filter_list"] if chain["name"] == "flexible-extract")
    steps = [(step["function"], {k: v for k, v in step.items() if k != "function"}) for step in chain["filter"]]
    texts: Any = [[_answer(entry)]]
    for step in build_filter_ensemble(chain["name"], steps).filters:
        texts = step().apply(texts, [entry])
    metric = {k: v for k, v in config["metric_list"][0].items() if k.startswith(("ignore_", "regexes_"))}
    return bool(exact_match_fn(predictions=list(texts), references=[gold], **metric)["exact_match"])


@cache
def _config(task: str) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML with lm-eval's tag for functions, which is not needed here."""

    Loader.add_constructor("!function", lambda loader, node: None)
    text = resources.files("lm_eval").joinpath("tasks", task).read_text("utf-8")
    return yaml.load(text, Loader)  # a SafeLoader


def _judged(judge: Callable[[Entry], bool | None], entry: Entry) -> bool | None:
    try:
        return judge(entry)
    except Exception:  # a peer's fault on this answer alone
        return False


def _letters(entry: Entry) -> tuple[str, ...]:
    return tuple("ABCDEFGHIJ"[: len(entry["choices"])])


def _gold(entry: Entry) -> str:
    return entry["gold"].rpartition("####")[2].strip()


GRADERS: dict[str, Callable[[list[Entry]], Paid]] = {"ours": ours, "math-verify": math_verify, "lm-eval": lm_eval}


def count(answers: list[Entry], paid: Paid) -> dict[str, int]:
    """Answers judged, right ones, verdicts that agree with the label, right refused, wrong paid."""
    pairs = [(entry["label"] == "right", paid[entry["id"]]) for entry in answers if paid[entry["id"]] is not None]
    seen = Counter(pairs)
    return {
        "judged": len(pairs),
        "right": seen[True, True] + seen[True, False],
        "agree": seen[True, True] + seen[False, False],
        "right_refused": seen[True, False],
        "wrong_paid": seen[False, True],
    }


def measure(answers: list[Entry], verdicts: dict[str, Paid]) -> dict[str, dict[str, dict[str, int]]]:
    """The counts by family and grader; `mathematics and choices` leaves out the families that only we judge."""
    ours_alone = {entry["family"] for entry in answers if verdicts["math-verify"][entry["id"]] is None}
    groups = {family: [e for e in answers if e["family"] == family] for family in {e["family"]: 0 for e in answers}}
    groups["all that each grader judges"] = [e for e in answers if e["family"] not in ours_alone]
    return {name: {grader: count(group, paid) for grader, paid in verdicts.items()} for name, group in groups.items()}


def disagreements(answers: list[Entry], verdicts: dict[str, Paid], grader: str) -> list[Entry]:
    """The answers that `grader`, or any of them for "any", judges unlike the label."""
    chosen = [grader] if grader in verdicts else list(verdicts)
    return [e for e in answers if any(verdicts[g][e["id"]] is (e["label"] != "right") for g in chosen)]


def _shown(entry: Entry, verdicts: dict[str, Paid]) -> str:
    words = {True: "right", False: "wrong", None: "-"}
    judged = ", ".join(f"{grader}: {words[paid[entry['id']]]}" for grader, paid in verdicts.items())
    gold = _gold(entry) if "gold" in entry else f"{len(entry['tests'])} tests"
    why = f" ({entry['why']})" if "why" in entry else ""
    return (
        f"{entry['id']}  {entry['question'][:160]!r}\n  gold {gold!r}, answer ...{entry['completion'][-110:]!r}\n"
        f"  label: {entry['label']}{why}; {judged}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--second", action="store_true", help="the second set, tests/data/golden/second")
    parser.add_argument("--family", nargs="+", default=[], help="only these files")
    parser.add_argument("--disagreements", nargs="?", const="any", choices=["any", *GRADERS])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    answers = entries(args.family, SECOND if args.second else FOLDER)
    verdicts = {name: grader(answers) for name, grader in GRADERS.items()}
    table = measure(answers, verdicts)
    print(f"{'family':28}" + "".join(f"| {name:^31}" for name in GRADERS))
    print(f"{'':28}" + "| judged  agree  refused    paid  " * len(GRADERS))
    for family, row in table.items():
        cells = (
            f"| {c['judged']:6} {100 * c['agree'] / c['judged']:5.1f}% {c['right_refused']:8} {c['wrong_paid']:7}  "
            if c["judged"] else f"| {'-':^31}" for c in row.values()
        )  # fmt: skip
        print(f"{family:28}" + "".join(cells))
    if args.disagreements:
        differing = disagreements(answers, verdicts, args.disagreements)
        print(f"\n{len(differing)} disagreements\n\n" + "\n\n".join(_shown(entry, verdicts) for entry in differing))
    if args.json:
        facts = {
            "versions": {name: version(name) for name in ("math-verify", "lm-eval")},
            "families": table,
            "disagreements": {g: [e["id"] for e in disagreements(answers, verdicts, g)] for g in GRADERS},
        }
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
