"""Cases of pass@k, boxed answers and votes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from bessemer_vectors.case import Case, Rival, integers
from bessemer_vectors.exact import mean
from bessemer_vectors.reference import evaluation as reference

Outputs = dict[str, Any]


def pass_at_k() -> list[Case]:
    def plugged_in(n: Any, c: Any, k: int) -> Outputs:
        estimates = 1 - (1 - c / n) ** k
        return {"estimates": estimates, "mean": mean(estimates.tolist())}

    def any_of_first(n: Any, c: Any, k: int) -> Outputs:
        estimates = (c > 0).astype(float)
        return {"estimates": estimates, "mean": mean(estimates.tolist())}

    def pooled(n: Any, c: Any, k: int) -> Outputs:
        """The estimate of all samples together, as if they were of one problem."""
        whole = reference.pass_at_k(np.array([n.sum()]), np.array([c.sum()]), k)
        return {"mean": whole["mean"]}

    biased = Rival("biased", "1 - (1 - c / n)^k", "Codex (arXiv 2107.03374) 2.1 warns of it", function=plugged_in)
    some = Rival("any of n", "1 if c > 0", "pass@n in place of pass@k", function=any_of_first)
    pool = Rival("samples of all problems pooled", "mean = 1 - C(N - C, k) / C(N, k)", "a pooled mean", function=pooled)

    def case(name: str, why: str, n: Any, c: Any, k: int, *rivals: Rival) -> Case:
        return Case(name, why, {"n": n, "c": c, "k": k}, rivals)

    n, c = integers(16, 16, 16, 16, 16), integers(0, 1, 4, 13, 16)
    return [
        case("pass@1 of 16", "The mean over samples.", n, c, 1, some),
        case("pass@4 of 16", "None, one, some, nearly all and all correct.", n, c, 4, biased, some, pool),
        case("pass@8 of 8", "k = n: one correct sample is enough.", integers(8, 8), integers(0, 1), 8, biased),
        case(
            "different n",
            "Problems with 4 and 64 samples weigh the same.",
            integers(4, 64),
            integers(3, 2),
            2,
            biased,
            pool,
        ),
        case("large n", "C(10,000, 100) does not fit a float64.", integers(10000), integers(37), 100, biased),
    ]


TEXTS = [
    r"The sum is 12, so \boxed{12}.",
    r"First \boxed{3} apples. No: the answer is \boxed{ 4 }",
    r"Hence $\boxed{\frac{1}{2}}$.",
    r"\boxed{\left\{ x : x > \sqrt{2} \right\}}",
    "The answer is 7.",
    r"Therefore \boxed{5} is the answer, or rather \boxed{6",
    r"\boxed{\boxed{9}}",
    r"\boxed{}",
    "",
    r"<think>maybe \boxed{1}</think> So \boxed{204}",
]


def first_box(texts: list[str]) -> list[str | None]:
    answers = []
    for text in texts:
        start = text.find("\\boxed{")
        rest = [text[start:end] for end in range(start, len(text) + 1)] if start >= 0 else []
        answers.append(next((answer for part in rest if (answer := reference.boxed(part)) is not None), None))
    return answers


def flat_pattern(texts: list[str]) -> list[str | None]:
    r"""By the pattern \boxed{([^}]*)}, last match."""
    found = [re.findall(r"\\boxed\{([^}]*)\}", text) for text in texts]
    return [matches[-1].strip() if matches else None for matches in found]


def last_or_none(texts: list[str]) -> list[str | None]:
    """The last box, and nothing if its braces do not close."""
    return [reference.boxed(text[max(text.rfind("\\boxed{"), 0) :]) for text in texts]


def boxed_answer() -> list[Case]:
    rivals = (
        Rival(
            "first box",
            "content of the first box that closes",
            "a search from the front",
            function=lambda texts: {"answers": first_box(texts)},
        ),
        Rival(
            "pattern without nesting",
            r"\boxed{([^}]*)}",
            "a regular expression",
            function=lambda texts: {"answers": flat_pattern(texts)},
        ),
        Rival(
            "not extracted",
            "the whole text",
            "EleutherAI/lm-evaluation-harness#3353",
            function=lambda texts: {"answers": texts},
        ),
        Rival(
            "last box or nothing",
            "no answer if the last box does not close",
            "another convention (lm-evaluation-harness)",
            function=lambda texts: {"answers": last_or_none(texts)},
        ),
    )
    deep = [
        r"\boxed{a_{b_{c_{d}}}} and then {} {{",
        r"\boxed{x}\boxed{y}",
        "\\boxed{1\n+\n2}",
    ]
    return [
        Case("ten solutions", "Several boxes, nested braces, no box, an open box, thoughts.", {"texts": TEXTS}, rivals),
        Case(
            "braces",
            "Depth four, neighbours, line breaks.",
            {"texts": deep},
            rivals[:2],
        ),
    ]


def pass_at_1() -> list[Case]:
    def box(*answers: str) -> list[str]:
        return [f"I get \\boxed{{{answer}}}." for answer in answers]

    even = [box("4", "4", "5", "4"), box("7", "1", "1", "1"), [*box("9"), "No idea.", *box("9", "9")]]
    gold = ["4", "7", "9"]
    uneven = [box("4", "5"), box("7", "1", "7", "7", "7", "7", "1", "7")]

    def first_number(texts: list[list[str]], gold: list[str]) -> Outputs:
        """As many samples scored as the first problem has, divided by the problem's own number."""
        some = len(texts[0])
        shares = [
            sum(reference.boxed(text) == right for text in of[:some]) / len(of)
            for of, right in zip(texts, gold, strict=True)
        ]
        return {"per_problem": np.array(shares), "mean": mean(shares)}

    def first_by_n(texts: list[list[str]], gold: list[str]) -> Outputs:
        shares = [(reference.boxed(of[0]) == right) / len(of) for of, right in zip(texts, gold, strict=True)]
        return {"per_problem": np.array(shares), "mean": mean(shares)}

    def any_sample(texts: list[list[str]], gold: list[str]) -> Outputs:
        shares = [
            float(any(reference.boxed(text) == right for text in of)) for of, right in zip(texts, gold, strict=True)
        ]
        return {"per_problem": np.array(shares), "mean": mean(shares)}

    def over_all(texts: list[list[str]], gold: list[str]) -> Outputs:
        hits = [reference.boxed(text) == right for of, right in zip(texts, gold, strict=True) for text in of]
        return {"mean": mean(map(float, hits))}

    def without_silent(texts: list[list[str]], gold: list[str]) -> Outputs:
        kept = [[text for text in of if reference.boxed(text) is not None] for of in texts]
        return reference.pass_at_1(kept, gold)

    def not_extracted(texts: list[list[str]], gold: list[str]) -> Outputs:
        return {"per_problem": np.zeros(len(gold)), "mean": 0.0}

    halved = Rival(
        "one sample counted, divided by n", "1[first answer = gold] / n", "a missing loop", function=first_by_n
    )
    shared = Rival(
        "the first problem's n for all",
        "hits among the first n of problem 1, divided by the problem's own n",
        "huggingface/lighteval#771, huggingface/open-r1#655",
        function=first_number,
    )
    raw = Rival(
        "answers not extracted", "the text is compared", "EleutherAI/lm-evaluation-harness#3353", function=not_extracted
    )
    return [
        Case(
            "four samples",
            "pass@1 does not fall as n grows.",
            {"texts": even, "gold": gold},
            (
                halved,
                Rival("any sample", "1 if one of the n is correct", "pass@n in place of pass@1", function=any_sample),
                Rival(
                    "samples without an answer left out",
                    "mean over answers",
                    "another convention",
                    function=without_silent,
                ),
                raw,
            ),
        ),
        Case(
            "two samples and eight",
            "Problems weigh the same, and each has its own n.",
            {"texts": uneven, "gold": ["4", "7"]},
            (halved, shared, Rival("mean over all samples", "hits / samples", "a pooled mean", function=over_all)),
        ),
        Case(
            "one sample in prose",
            "n = 1: plain accuracy, of the answer in the box.",
            {"texts": [["Adding both bases gives \\boxed{70}. So the answer is 70."]], "gold": ["70"]},
            (raw,),
        ),
    ]


def cons_at_k() -> list[Case]:
    clear: list[list[str | None]] = [
        ["4", "4", "5", "4"],
        ["1", "7", "1", "1"],
        [None, None, None, "9"],
        [None, None, None, None],
    ]
    gold = ["4", "7", "9", "3"]
    tied: list[list[str | None]] = [["2", "3", "3", "2"], ["5", "6", None, None], ["1", "2", "3", "3"]]

    def null_votes(answers: list[list[str | None]], gold: list[str], ties: str) -> Outputs:
        named: list[list[str | None]] = [["" if answer is None else answer for answer in of] for of in answers]
        return reference.cons_at_k(named, gold, ties)

    def any_of(answers: list[list[str | None]], gold: list[str], ties: str) -> Outputs:
        hits = [float(right in of) for of, right in zip(answers, gold, strict=True)]
        return {"correct": np.array(hits), "mean": mean(hits)}

    def average(answers: list[list[str | None]], gold: list[str], ties: str) -> Outputs:
        hits = [mean(float(answer == right) for answer in of) for of, right in zip(answers, gold, strict=True)]
        return {"correct": np.array(hits), "mean": mean(hits)}

    others = (
        Rival("missing answers vote", "no answer counts as an answer", "a vote over strings", function=null_votes),
        Rival("any sample", "1 if gold is among the answers", "pass@k", function=any_of),
        Rival("mean over samples", "share of correct answers", "pass@1", function=average),
    )
    return [
        Case(
            "clear majorities",
            "Right, wrong, one answer among blanks, blanks alone.",
            {"answers": clear, "gold": gold, "ties": "share"},
            others,
        ),
        Case(
            "ties, shared",
            "A tie of a right and a wrong answer counts one half.",
            {"answers": tied, "gold": ["3", "5", "3"], "ties": "share"},
            (Rival("first of the tied", "the answer that occurred first", "another convention", {"ties": "first"}),),
        ),
        Case(
            "ties, first",
            "The answer that occurred first wins.",
            {"answers": tied, "gold": ["3", "5", "3"], "ties": "first"},
            (Rival("shared tie", "the winners share the vote", "another convention", {"ties": "share"}),),
        ),
    ]
