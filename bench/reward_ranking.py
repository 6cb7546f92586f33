"""What a helpful reward model can tell apart, on held-out everyday requests.

    python bench/reward_ranking.py runs/r1-small/08-dev3/model runs/r1-small/09-helpful/model [more reward models]

First the share of a policy's (right, wrong) pairs of answers to one request that a reward model ranks rightly, averaged
over the requests that have both; then, for every flaw that a written answer can have, how often it scores less than the
good answer. Chance is 0.5.
"""

import argparse
import random
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from bessemer import tasks
from bessemer.addons.r1.preference import judged_ids, score_by
from bessemer.addons.tasks.general_requests import GOOD, HARMLESS, MANNERS, answer_in_manner, sample_request
from bessemer.data.chat import question_ids
from bessemer.engine.engine import load_engine
from bessemer.hf.model_directory import load_scorer
from bessemer.tasks.answer import r1_form
from bessemer.train.collective import outputs_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", type=Path)
    parser.add_argument("rewards", type=Path, nargs="+")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--samples", type=int, default=8)
    args = parser.parse_args()
    engine, task = load_engine(args.policy), tasks.get("general")
    tokenizer = engine.tokenizer
    problems = [task.problem("test", number) for number in range(args.requests)]
    groups = engine.generate(
        [question_ids(tokenizer, problem.prompt) for problem in problems],
        samples=args.samples, seeds=list(range(args.requests)), temperature=0.7, max_new_tokens=100, batch_rows=64,
    )  # fmt: skip
    answers = [[tokenizer.opening + answer.text for answer in group] for group in groups]
    right = [[task.verify(p, text).correct for text in texts] for p, texts in zip(problems, answers, strict=True)]
    mixed = [number for number, marks in enumerate(right) if any(marks) and not all(marks)]
    print(f"{fmean(map(fmean, right)):.3f} of the policy's answers are right; {len(mixed)} requests have both kinds")
    manners = [GOOD, *(manner for manner in MANNERS[1:] if manner in HARMLESS)]
    rng, written = random.Random(1), []
    for number in range(args.requests):
        request = sample_request("helpful", "test", ("en", "zh")[number % 2], rng)
        texts = [r1_form(*answer_in_manner(request, manner, rng)) for manner in manners]
        written.append((request.language, request.asks()[0], texts))
    for path in args.rewards:
        model = load_scorer(path)

        def scores(pairs: list[tuple[str, list[str]]], model=model) -> list[list[float]]:
            ids = [judged_ids(tokenizer, "helpful", prompt, text) for prompt, texts in pairs for text in texts]
            scores_left = iter(score_by(outputs_of(model), ids, tokenizer.pad_id))
            return [[next(scores_left) for _ in texts] for _, texts in pairs]

        ranked = defaultdict(list)
        for number, of in zip(mixed, scores([(problems[n].prompt, answers[n]) for n in mixed]), strict=True):
            good, bad = ([s for s, ok in zip(of, right[number], strict=True) if ok is kind] for kind in (True, False))
            ranked[problems[number].language].append(fmean(g > b for g in good for b in bad))
        for (language, _, _), of in zip(written, scores([(p, texts) for _, p, texts in written]), strict=True):
            for manner, score in zip(manners[1:], of[1:], strict=True):
                ranked[f"{manner} {language}"].append(of[0] > score)
        print(path, f"{fmean(ranked['en'] + ranked['zh']):.3f} of the policy's pairs")
        print("  " + ", ".join(f"{name} {fmean(values):.2f}" for name, values in sorted(ranked.items())), flush=True)


if __name__ == "__main__":
    main()
