"""200 made-up answers in the form of a released R1, scored by hand: ten problems, twenty answers each.

The answers continue a prompt that has already opened `<think>`. Per problem: 11 right in R1's form, 3 right in another
form, 6 that earn nothing. So accuracy is 14/20 = 0.7, and format, which a wrong answer may keep, is 13/20 = 0.65.
"""

PROBLEMS = [  # question, gold answer, how R1 writes it, a wrong answer
    ("What is 6 * 7?", "42", "42", "43"),
    ("What is 100 - 1?", "99", "99", "98"),
    ("What is 2^10?", "1024", "1024", "1000"),
    ("How many primes are below 10?", "4", "4", "5"),
    ("What is 3/4 + 1/2 as a fraction?", "5/4", "\\frac{5}{4}", "\\frac{4}{5}"),
    ("What is the remainder of 17 divided by 5?", "2", "2", "3"),
    ("What is 5!?", "120", "120", "60"),
    ("How many days has a week?", "7", "7", "8"),
    ("What is 12 squared?", "144", "144", "121"),
    ("What is half of 9 as a fraction?", "9/2", "\\frac{9}{2}", "\\frac{2}{9}"),
]
PASS_AT_1, FORMATTED = 0.7, 0.65
REASONS = {"correct": 110, "no-think": 30, "wrong-value": 20, "several-answers": 10, "in-thoughts": 10,
           "unclosed": 10, "bad-tags": 10}  # fmt: skip

THOUGHTS = "Okay, let me see.\n\nFirst I work it out. Wait, check again.\n"
END = "</think>\n\n"


def answers(right: str, wrong: str) -> list[tuple[str, bool, bool]]:
    """(what the model wrote after `<think>` newline, right, in form) for one problem."""
    steps = "**Step 1.** We write it down.\n\n**Step 2.** We compute.\n\n"
    good = [
        f"\\boxed{{{right}}}",
        f"The answer is \\boxed{{{right}}}.",
        f"{steps}\\[\n\\boxed{{{right}}}\n\\]",
        f"{steps}**Answer:** $\\boxed{{{right}}}$",
        f"{steps * 20}Thus \\(\\boxed{{{right}}}\\).\n\nI hope this helps.",
        f"\\boxed{{{right}}}\n\nIndeed, \\boxed{{{right}}}.",
        f"<answer>{right}</answer>",
        f"So it is <answer> {right} </answer>.",
        f"{steps}\\boxed{{{right}}}, that is <answer>{right}</answer>.",
        f"<answer>It is \\boxed{{{right}}}.</answer>",
        f"Put it into \\boxed{{}}: \\boxed{{{right}}}",
    ]
    rows = [(THOUGHTS + END + text, True, True) for text in good]
    # a box among the thoughts does not count; the final part decides
    rows[0] = (f"Maybe \\boxed{{{wrong}}}? No.\n" + END + good[0], True, True)
    # R1 sometimes closes at once the block that the template opened: right, but not in form
    rows += [("\n" + END + text, True, False) for text in (good[0], good[2], good[6])]
    rows += [
        (THOUGHTS + END + f"{steps}\\boxed{{{wrong}}}", False, True),
        (THOUGHTS + END + f"So <answer>{wrong}</answer>.", False, True),
        (THOUGHTS + END + f"\\boxed{{{wrong}}} or \\boxed{{{right}}}", False, False),
        (f"It is \\boxed{{{right}}}.\n" + END + "Done.", False, False),
        (THOUGHTS * 40 + f"\\boxed{{{right}}}", False, False),
        (THOUGHTS + END + f"<answer>{right}</answer><answer>{right}</answer>", False, False),
    ]
    return rows
