"""lm-evaluation-harness: its task `aime`, run by its own evaluator over canned texts.

The installed package, or a checkout (LM_EVAL=folder). The task's file is the project's own; only its data set is
replaced by the problems of the case, one row for each sample, because the task asks for one sample of a problem.
"""

import json
import os
import tempfile
from pathlib import Path

if os.environ.get("LM_EVAL"):
    from table_model import checkout

    checkout("LM_EVAL")

import lm_eval
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import load_yaml_config

TASK = Path(lm_eval.__file__).parent / "tasks" / "aime" / "aime.yaml"


class Canned(LM):
    def __init__(self, texts):
        super().__init__()
        self.texts = texts

    def generate_until(self, requests, disable_tqdm=False):
        return [self.texts[request.doc["row"]] for request in requests]

    loglikelihood = loglikelihood_rolling = None


def pass_at_1(texts, gold):
    flat = [(p, text) for p, samples in enumerate(texts) for text in samples]
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text(
            "".join(
                json.dumps({"row": i, "Question": f"problem {p}", "Answer": gold[p]}) + "\n"
                for i, (p, _) in enumerate(flat)
            )
        )
        config = load_yaml_config(str(TASK))
        config.update(dataset_path="json", dataset_kwargs={"data_files": {"train": str(rows)}, "cache_dir": folder})
        config.pop("tag", None)
        config.pop("dataset_name", None)
        out = lm_eval.evaluate(Canned([t for _, t in flat]), {"aime": ConfigurableTask(config=config)})
    scores = {sample["doc"]["row"]: float(sample["exact_match"]) for sample in out["samples"]["aime"]}
    shares, start = [], 0
    for samples in texts:
        shares.append(sum(scores[start + i] for i in range(len(samples))) / len(samples))
        start += len(samples)
    return {"per_problem": shares, "mean": sum(shares) / len(shares)}


def boxed_answer(texts):
    from lm_eval.tasks.aime.utils import last_boxed_only_string, remove_boxed

    answers = []
    for text in texts:
        try:
            answers.append(remove_boxed(last_boxed_only_string(text)).strip())
        except (AssertionError, AttributeError, IndexError, TypeError):  # the task goes on without a box
            answers.append(None)
    return {"answers": answers}
