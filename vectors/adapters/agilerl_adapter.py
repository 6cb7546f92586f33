"""AgileRL: the rewards of `ReasoningGym` for a batch whose completions came after an evaluation."""

import torch
from agilerl.llm_envs.reasoning import ReasoningGym
from datasets import Dataset


class Words:
    """A tokenizer that knows whole texts; ids count from 1."""

    eos_token_id = pad_token_id = 0

    def __init__(self):
        self.texts = [""]

    def ids(self, text):
        if text not in self.texts:
            self.texts.append(text)
        return torch.tensor([[self.texts.index(text)]])

    def apply_chat_template(self, messages, **_):
        return messages[-1]["content"]

    def __call__(self, texts, **_):
        ids = self.ids(texts[0])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def batch_decode(self, rows, **_):
        return [self.texts[int(row[0])] for row in rows]


def rewards_after_evaluation(texts, gold, evaluation_gold):
    words = Words()
    train = Dataset.from_dict({"question": [f"problem {i}" for i in range(len(gold))], "answer": gold})
    asked = evaluation_gold or ["none"]
    test = Dataset.from_dict({"question": [f"test {i}" for i in range(len(asked))], "answer": asked})
    gym = ReasoningGym(
        train, test, words, lambda completion, answer, question: float(completion == answer),
        [{"role": "user", "content": "{question}"}], data_batch_size_per_gpu=max(len(gold), len(asked)),
        return_raw_completions=True,
    )  # fmt: skip
    prompts = gym.reset()
    rows = [int(prompt["text"].removeprefix("problem ")) for prompt in prompts]
    if evaluation_gold:
        with gym.eval_mode():
            gym.step([torch.cat([p["input_ids"], words.ids("none")], 1) for p in gym.reset()])
    completions = [
        torch.cat([torch.cat([prompt["input_ids"], words.ids(text)], 1) for text in texts[row]])
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    _, rewards = gym.step(completions)
    out = torch.full((len(gold), len(texts[0])), float("nan"))
    for row, reward in zip(rows, rewards, strict=False):  # a version may return fewer rows than it was asked for
        out[row] = reward
    return {"rewards": out}
