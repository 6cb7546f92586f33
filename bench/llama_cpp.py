"""llama.cpp against our Engine: the same weights, prompts and greedy decoding, through a GGUF file that we write.

    python bench/llama_cpp.py
    python bench/llama_cpp.py --model runs/zero/03-zero/model --json bench/results/llama_cpp.json

Cases: random networks (norm gains off 1, negative routing biases) of the preset `tiny` and of `servable` cut to three
layers, variants of `tiny` for each option that the file records (YaRN, uncompressed queries, softmax gate, no group
limit, tied embeddings), and the model of --model with problems of its task as prompts. Weights and cache are F32 on
both sides, and no vocabulary has spare rows (the Engine never samples those, llama.cpp may). Compared: every generated
token; the logits of the prompts (largest difference relative to the largest logit); the token ids of texts in several
languages; and, for --model, the answer to a chat request with the model's own template. Requires llama-cpp-python,
which builds llama.cpp.
"""

# ruff: noqa: E402  (the path is fixed between imports)
from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

# This file has the same name as the library it measures, and its folder comes first on the path.
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
import llama_cpp
import numpy as np
import torch

import bessemer
from bessemer.addons.families import gguf_file
from bessemer.data.chat import question_ids, render
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer

LENGTHS = (1, 2, 5, 9, 17, 33, 70)
TEXTS = (
    "The quick brown fox's 3 jumps over 12345678 lazy dogs, don't they?",
    "  leading and   inner spaces\tand tabs \n\n and line ends.\r\nWindows\r\n\r\n   \n",
    "用数字 3、7 和 25 得到 96。答案是（25 + 7）× 3！你好，世界。",
    "カタカナとひらがな、漢字まじり。한국어도 조금. Ελληνικά, кириллица, עברית, العربية",
    "naïve café, e\u0301 combining, a\u0308\u0323, Å, ﬁ ligature, 𝔘𝔫𝔦𝔠𝔬𝔡𝔢, 👩‍👩‍👧 🇩🇪, zero\u200bwidth, nbsp\u00a0on",
    "½ ² Ⅷ ٣ 〇 1,234.56 0x1F 1e-9 3.14159 2026-01-31 12:34",
    "def f(x: int = 3) -> str:\n    return f\"{x!r}\" if x >= 0 else '-' * 4  # TODO\n\n\nassert f(2) == '2'\n",
    '#include <stdio.h>\nint main(void) { printf("%d\\n", a[i]->b & 0xff); }\n\t\treturn;',
    "<think>Try 3*7=21, 21+4=25.</think>\n<answer>3*7+4</answer> a<think>b</think>c<thinking>",
    "User: a question\nAssistant: <think>\n\nOkay.\n</think>\n\n$\\boxed{42}$ \\[x^2\\] ||a|| `code` ~~~ @user #tag",
    "control tokens are text here: <｜User｜>hi<｜Assistant｜><｜end▁of▁sentence｜> and <|EOT|>",
    "",
    " ",
    "\n",
)


class Peer:
    """llama.cpp on a GGUF file: greedy tokens, logits and ids, on one thread with an F32 cache."""

    def __init__(self, file: Path, length: int, flash: bool = False):
        self.llama = llama_cpp.Llama(
            str(file), n_ctx=length, n_batch=length, n_ubatch=length, n_threads=1, n_threads_batch=1, logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, flash_attn=flash, verbose=False,
        )  # fmt: skip

    def greedy(self, prompt: list[int], n: int, stop: int) -> list[int]:
        """At most n tokens; a stop token is included as the last one."""
        tokens: list[int] = []
        self.llama.reset()
        for token in self.llama.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
            tokens.append(int(token))
            if token == stop or len(tokens) == n:
                break
        return tokens

    def logits(self, prompt: list[int]) -> np.ndarray:
        """[tokens, vocabulary]"""
        self.llama.reset()
        self.llama.eval(prompt)
        return np.array(self.llama.scores[: len(prompt)])

    def ids(self, text: str, control: bool = False) -> list[int]:
        return self.llama.tokenize(text.encode(), add_bos=False, special=control)

    def close(self) -> None:
        self.llama.close()


@torch.no_grad()
def trained_like(cfg) -> Transformer:
    """Random weights that look trained: gains off 1, routing biases off 0 (negative, the harder sign)."""
    model = Transformer(cfg).initialise(0).eval()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith("bias_E"):
            tensor.uniform_(-1.6, -1.0, generator=generator)
        elif tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5, generator=generator)
    return model


def random_cases(vocabulary: int) -> dict:
    def tiny(**changes):
        return preset("tiny", vocab_size=vocabulary, n_mtp=0, init_std=0.12, **changes)

    yarn = dict(rope_factor=4.0, original_seq_len=128)
    return {
        "tiny": tiny(),
        "tiny, YaRN": tiny(**yarn),
        "tiny, YaRN with mscale 0.707": tiny(**yarn, mscale=0.707, mscale_all_dim=0.707),
        "tiny, queries not compressed": tiny(q_lora_rank=0),
        "tiny, softmax gate, greedy, gates not normalised": tiny(
            score_func="softmax", topk_method="greedy", norm_topk_prob=False, n_shared_experts=2, route_scale=1.0
        ),
        "tiny, all groups allowed": tiny(n_limited_groups=4),
        "tiny, tied embeddings, no dense layer": tiny(tie_embeddings=True, n_dense_layers=0),
        "tiny, dense layers only": tiny(n_dense_layers=4),
        "servable, 3 layers": preset("servable", vocab_size=vocabulary, n_layers=3, n_mtp=0, init_std=0.06),
    }


def compare(model, tokenizer, peer: Peer, prompts: list[list[int]], n: int) -> dict:
    """Compares greedy tokens and prompt logits of both engines."""
    begin = time.perf_counter()
    own = [list(rows[0].tokens) for rows in bessemer.Engine(model, tokenizer).generate(
        prompts, max_new_tokens=n, temperature=0)]  # fmt: skip
    between = time.perf_counter()
    peer_answers = [
        peer.greedy(prompt, len(answer), tokenizer.eos_id) for prompt, answer in zip(prompts, own, strict=True)
    ]
    end = time.perf_counter()
    error = 0.0
    for prompt in prompts:
        with torch.no_grad():
            expected = model(torch.tensor([prompt]))[0].float().numpy()
        error = max(error, float(np.abs(peer.logits(prompt) - expected).max() / np.abs(expected).max()))
    return {
        "prompts": len(prompts),
        "tokens": sum(map(len, own)),
        "distinct_tokens": len({token for row in own for token in row}),
        "tokens_equal": sum(a == b for x, y in zip(own, peer_answers, strict=True) for a, b in zip(x, y, strict=False)),
        "rows_equal": sum(x == y for x, y in zip(own, peer_answers, strict=True)),
        "rows_ended_by_stop": sum(row[-1] == tokenizer.eos_id for row in own),
        "largest_logit_difference": error,
        "seconds_ours": between - begin,
        "seconds_theirs": end - between,
    }


def texts_equal(tokenizer, peer: Peer) -> dict:
    bad = [text for text in TEXTS if peer.ids(text) != tokenizer.encode(text)]
    return {"texts": len(TEXTS), "tokens": sum(map(len, map(tokenizer.encode, TEXTS))), "texts_that_differ": bad}


def chat_equal(model, tokenizer, peer: Peer, question: str, n: int) -> dict:
    """Compares a chat request rendered and answered by llama-cpp-python with ours."""
    messages = [{"role": "user", "content": question}]
    ids = question_ids(tokenizer, question)
    reply = peer.llama.create_chat_completion(messages, temperature=0.0, max_tokens=n)
    [[own]] = bessemer.Engine(model, tokenizer).generate([ids], max_new_tokens=n, temperature=0)
    reference = reply["choices"][0]["message"]["content"]
    style = tokenizer.chat_style
    return {
        "prompt_ids_equal": peer.ids(render(messages, style), control=True) == ids,
        "prompt_tokens_equal": reply["usage"]["prompt_tokens"] == len(ids),
        "text_equal": reference == own.text,
        "text": reference,
    }


def passed(case: dict) -> bool:
    equal = case["rows_equal"] == case["prompts"] and case["tokens_equal"] == case["tokens"]
    texts = case.get("tokenizer", {"texts_that_differ": []})["texts_that_differ"]
    chat = case.get("chat", {})
    return equal and not texts and all(value for key, value in chat.items() if key.endswith("_equal"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of a trained model")
    parser.add_argument("--task", default="countdown", help="task whose test problems are the prompts for --model")
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64, help="greedy tokens per random prompt; 4x for --model")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, file = Path(scratch) / "model", Path(scratch) / "model.gguf"
        if args.model:
            model, tokenizer = bessemer.load(args.model, dtype="float32").eval(), bessemer.Tokenizer.load(args.model)
            gguf_file.write(args.model, file, "float32")
            task = bessemer.tasks.get(args.task)
            questions = [task.problem("test", i).prompt for i in range(args.problems)]
            prompts = [question_ids(tokenizer, question) for question in questions]
            for name, flash in (("trained", False), ("trained, flash attention", True)):
                peer = Peer(file, model.cfg.max_seq_len, flash)
                cases[name] = compare(model, tokenizer, peer, prompts, 4 * args.new_tokens)
                cases[name]["tokenizer"] = texts_equal(tokenizer, peer)
                cases[name]["chat"] = chat_equal(model, tokenizer, peer, questions[0], 4 * args.new_tokens)
                show(name, cases[name])
                peer.close()
        else:
            tokenizer = bessemer.Tokenizer.train([text for text in TEXTS for _ in range(4)], 600)
        tokenizer.save(Path(scratch) / "tokenizer")
        generator = torch.Generator().manual_seed(0)
        for name, cfg in random_cases(tokenizer.vocab_size).items():
            model = trained_like(cfg)
            model.save(folder, tokenizer_dir=Path(scratch) / "tokenizer")
            gguf_file.write(folder, file, "float32")
            peer = Peer(file, 256)
            prompts = [torch.randint(3, cfg.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
            cases[name] = compare(model, tokenizer, peer, prompts, args.new_tokens)
            if not args.model and name == "tiny":
                cases[name]["tokenizer"] = texts_equal(tokenizer, peer)
            show(name, cases[name])
            peer.close()
    result = {
        "llama_cpp_python": llama_cpp.__version__, "torch": torch.__version__, "machine": platform.machine(),
        "weights": "float32", "cache": "float32", "threads": 1, "all_equal": all(map(passed, cases.values())),
        "cases": cases,
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", "utf-8")
    print("all equal" if result["all_equal"] else "NOT all equal")
    sys.exit(not result["all_equal"])


def show(name: str, case: dict) -> None:
    print(
        f"{name}: {case['tokens_equal']} of {case['tokens']} tokens equal in {case['prompts']} rows "
        f"({case['distinct_tokens']} distinct), logits within {case['largest_logit_difference']:.1e}",
        flush=True,
    )


if __name__ == "__main__":
    main()
