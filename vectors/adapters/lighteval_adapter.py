"""lighteval: `VLLMModel.greedy_until` and `PassAtK`, one run over problems with their own numbers of samples.

The engine is canned: it returns as many of a problem's texts as it is asked for. Prompts of problems with fewer samples
are longer, as GPQA's are than AIME's (the two tasks of the thread).
"""

from types import SimpleNamespace

from table_model import absent

absent("inspect_ai", "vllm")

import lighteval.utils.imports as imports  # noqa: E402

imports.requires = lambda *_: lambda thing: thing  # newer versions hide the class where vLLM is not installed

from lighteval.metrics.metrics_sample import PassAtK  # noqa: E402
from lighteval.metrics.normalizations import math_normalizer  # noqa: E402
from lighteval.models.vllm.vllm_model import VLLMModel  # noqa: E402

try:
    from lighteval.tasks.requests import GreedyUntilRequest
except ImportError:  # 0.11 and later: one class of requests
    from lighteval.models.model_output import ModelResponse
    from lighteval.tasks.requests import Doc

    GreedyUntilRequest = None


def _engine(texts):
    model = object.__new__(VLLMModel)
    parameters = SimpleNamespace(max_new_tokens=8)
    model._config = model.config = SimpleNamespace(generation_parameters=parameters)
    model._max_length, model.use_chat_template, model._add_special_tokens = 10**6, True, False
    model.tok_encode = lambda text: list(text.encode())
    model._tokenizer = type(
        "T", (), {"eos_token": "", "__call__": lambda self, rows, **_: {"input_ids": [list(r.encode()) for r in rows]}}
    )()
    model.prompt_manager = SimpleNamespace(prepare_prompt=lambda doc: doc.query)

    def generate(inputs, num_samples=1, **_):
        outputs = []
        for row in inputs:
            canned = texts[int(bytes(row).decode().split()[0])]
            # a text has one token, 0; more samples than the case has repeat its last text
            answers = [canned[min(i, len(canned) - 1)] for i in range(num_samples)]
            outputs.append(SimpleNamespace(prompt_token_ids=row, outputs=[
                SimpleNamespace(text=a, token_ids=[0], logprobs=[{0: SimpleNamespace(logprob=0.0)}]) for a in answers
            ]))  # fmt: skip
        return outputs

    model._generate = generate
    return model


def pass_at_1(texts, gold):
    prompts = [f"{p} " + "x" * (1000 - len(samples)) for p, samples in enumerate(texts)]
    golds = [f"\\boxed{{{answer}}}" for answer in gold]
    if GreedyUntilRequest is not None:
        requests = [
            GreedyUntilRequest(
                "task", p, 0, prompt, [], stop_sequence=[], generation_size=8, num_samples=len(texts[p]), do_sample=True
            )
            for p, prompt in enumerate(prompts)
        ]
        predictions = [reply.result for reply in _engine(texts).greedy_until(requests)]
        scores = [
            PassAtK(k=1, n=len(texts[p]), strip_strings=True, normalize_gold=math_normalizer,
                    normalize_pred=math_normalizer,
                    sample_scoring_function=lambda prediction, answer, doc: int(prediction == answer))
            .compute(golds=[golds[p]], predictions=predictions[p], formatted_doc=None)
            for p in range(len(gold))
        ]  # fmt: skip
    else:
        docs = [
            Doc(
                query=prompt,
                choices=[golds[p]],
                gold_index=0,
                num_samples=len(texts[p]),
                generation_size=8,
                stop_sequences=[],
            )
            for p, prompt in enumerate(prompts)
        ]
        replies = _engine(texts)._greedy_until(docs)
        scores = [
            PassAtK(k=1, n=len(texts[p]), strip_strings=True, normalize=math_normalizer)
            .compute(doc=docs[p], model_response=ModelResponse(text=replies[p].text))
            for p in range(len(gold))
        ]  # fmt: skip
    return {"per_problem": scores, "mean": sum(scores) / len(scores)}


def pass_at_k(n, c, k):
    estimates = [
        float(PassAtK(k=int(k), n=int(m)).pass_at_k([1] * int(right) + [0] * int(m - right)))
        for m, right in zip(n, c, strict=True)
    ]
    return {"estimates": estimates, "mean": sum(estimates) / len(estimates)}
