"""Model directories from a hostile sender: each must end in a one-line error, within 10 seconds and 2 GB.

    python bench/hostile_models.py                  every kind; results go to bench/results/hostile_models.json
    python bench/hostile_models.py fifo template    those whose names contain one of the words, to the screen only

Each kind is a small sound model, ours or a Llama, with one thing changed, and is given to `bessemer generate` in a
process of its own. The command must exit with 2 and print exactly one line, `error: ...`; time, memory (children
included) and the line are recorded. Memory is limited from outside too, so that a kind that gets through harms nobody.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / name) for name in ("data", "model", "shared")]

import hf_tokenizers as houses  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from hf_cases import made  # noqa: E402

from bessemer import cli  # noqa: E402
from bessemer.data.tokenizer import Tokenizer  # noqa: E402
from bessemer.engine import engine  # noqa: E402, F401  before the fork
from bessemer.hf import deepseek  # noqa: E402, F401
from bessemer.model.config import preset  # noqa: E402
from bessemer.model.transformer import Transformer  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "hostile_models.json"
SECONDS, BYTES = 10.0, 2 << 30
GIVEN_UP, ADDRESS_SPACE = 60, 8 << 30
WEIGHTS, TEMPLATE = "model.safetensors", "chat_template.jinja"
EXPLODING = r"(x+x+)+y"


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda d: edit(d / "config.json", lambda values: values.update(changes))


def edit(file: Path, change: Callable[[dict], Any]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def raw(name: str, data: bytes | str) -> Callable[[Path], Any]:
    return lambda d: (d / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def number(digits: int) -> Callable[[Path], Any]:
    return lambda d: raw("config.json", (d / "config.json").read_text().replace("{", f'{{"x": {"9" * digits},', 1))(d)


def replaced(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(d: Path) -> None:
        (d / name).unlink()
        make(d / name)

    return change


def bound(path: Path) -> None:
    """A socket in the file system; its name may be longer than an address allows."""
    before = os.getcwd()
    os.chdir(path.parent)
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(before)


def template(text: str) -> Callable[[Path], Any]:
    return raw(TEMPLATE, text)


def tokenizer(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    return lambda d: edit(d / "tokenizer.json", change)


def split(pattern: str) -> Callable[[Path], None]:
    rule = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return tokenizer(lambda spec: spec.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [rule, level]}))


def header(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    """Rewrites the header of the weights; the data stays."""

    def rewrite(d: Path) -> None:
        data = (d / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        entries = json.loads(data[8 : 8 + length])
        change(entries)
        head = json.dumps(entries).encode()
        (d / WEIGHTS).write_bytes(struct.pack("<Q", len(head)) + head + data[8 + length :])

    return rewrite


def first(entries: dict) -> dict:
    return next(entry for name, entry in entries.items() if name != "__metadata__")


def sparse_file(name: str, size: int) -> Callable[[Path], None]:
    return replaced(name, lambda path: (path.touch(), os.truncate(path, size)))


KINDS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    # config.json against the files
    "a billion layers": ("ours", config(num_hidden_layers=10**9)),
    "four thousand layers": ("ours", config(num_hidden_layers=4000)),
    "ten million experts": ("ours", config(n_routed_experts=10**7, n_group=1, topk_group=1)),
    "sixty thousand experts": ("ours", config(n_routed_experts=60000, n_group=1, topk_group=1)),
    "a billion MTP layers": ("ours", config(num_nextn_predict_layers=10**9)),
    "a width of 10^15": ("ours", config(hidden_size=10**15)),
    "a vocabulary of 10^12": ("ours", config(vocab_size=10**12)),
    "heads beyond 64 bits": ("ours", config(num_attention_heads=10**20, num_key_value_heads=10**20)),
    "negative layers": ("ours", config(num_hidden_layers=-1)),
    "a Llama of a billion layers": ("llama", config(num_hidden_layers=10**9)),
    "a Llama with a vocabulary of 10^10": ("llama", config(vocab_size=10**10)),
    "a Llama a million wide": ("llama", config(hidden_size=10**6, num_attention_heads=10)),
    "a Llama with a billion labels": ("llama", config(num_labels=10**9)),
    "a Llama without heads": ("llama", config(num_attention_heads=0)),
    "a Llama with a text for a number": ("llama", config(hidden_size="64")),
    "a model_type of another program": ("llama", config(model_type="evil", auto_map={"AutoConfig": "evil.Evil"})),
    # JSON
    "an integer of 5,000 digits": ("ours", number(5000)),
    "a Llama's integer of 5,000 digits": ("llama", number(5000)),
    "a config nested 100,000 deep": ("ours", raw("config.json", '{"a":' * 100_000)),
    "a tokenizer nested 100,000 deep": ("llama", raw("tokenizer.json", "[" * 100_000)),
    "a config of 20 GB": ("ours", sparse_file("config.json", 20 << 30)),
    "a config that is no UTF-8": ("ours", raw("config.json", b"\xff\xfe{}")),
    # not regular files
    "a FIFO as weights": ("ours", replaced(WEIGHTS, os.mkfifo)),
    "a FIFO as config": ("ours", replaced("config.json", os.mkfifo)),
    "a FIFO as a Llama's weights": ("llama", replaced(WEIGHTS, os.mkfifo)),
    "a FIFO as generation_config.json": ("llama", replaced("generation_config.json", os.mkfifo)),
    "a FIFO as chat template": ("llama", lambda d: os.mkfifo(d / TEMPLATE)),
    "a device as weights": ("ours", replaced(WEIGHTS, lambda path: path.symlink_to("/dev/zero"))),
    "a device as tokenizer": ("llama", replaced("tokenizer.json", lambda path: path.symlink_to("/dev/zero"))),
    "a socket as weights": ("ours", replaced(WEIGHTS, bound)),
    # safetensors
    "a header of 2^60 bytes": ("ours", lambda d: raw(WEIGHTS, b"\0" * 7 + b"\x10" + (d / WEIGHTS).read_bytes()[8:])(d)),
    "a header of 3 GB": ("ours", lambda d: (raw(WEIGHTS, struct.pack("<Q", 3 << 30))(d),
                                            os.truncate(d / WEIGHTS, 4 << 30))),
    "a shape beyond 64 bits": ("ours", header(lambda h: first(h).update(shape=[2**40, 2**40]))),
    "an offset behind the end": ("ours", header(lambda h: first(h).update(data_offsets=[0, 2**62]))),
    "a pickle beside the config": ("ours", lambda d: (d / WEIGHTS).rename(d / "pytorch_model.bin")),
    # tokenizers
    "a token with the id 4 billion": ("llama", tokenizer(lambda s: s["model"]["vocab"].update({"!!!": 2**32 - 2}))),
    "a pattern that explodes": ("llama", split(EXPLODING)),
    "a pattern of sixth degree": ("llama", split(r"\p{L}*\p{L}*\p{L}*\p{L}*\p{L}*\p{L}*9")),
    "a pattern that is none": ("llama", split("(")),
    "added tokens that are none": ("llama", tokenizer(lambda s: s.update(added_tokens=[5]))),
    "an adapter beside the model": ("llama", raw("adapter_config.json", '{"base_model_name_or_path": "/"}')),
    # chat templates
    "nested loops": ("llama", template("{% for i in range(99999) %}{% for j in range(99999) %}"
                                       "{% endfor %}{% endfor %}")),
    "a string of 10 GB": ("llama", template("{{ 'a' * 10**10 }}")),
    "a padded string of 10 GB": ("llama", template("{{ 'a'.center(10**10) }}")),
    "a text of 100 MB": ("llama", template("{{ 'a' * 10**8 }}")),
    "a power that takes years": ("llama", template("{{ 9**(9**(9**9)) }}")),
    "a macro without end": ("llama", template("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}")),
    "a list that doubles": ("llama", template("{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
                                              "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | length }}")),
    "a template of 30 MB": ("llama", template("{{ 1 }}" * 4_000_000)),
    "a template nested 10,000 deep": ("llama", template("{{ " + "(" * 10_000 + ")" * 10_000 + " }}")),
    "a way out of the sandbox": ("llama", template("{{ ''.__class__.__mro__[1].__subclasses__() }}")),
    "an error message of 10 MB": ("llama", template("{{ raise_exception('\x1b[2J' * 2000000) }}")),
}  # fmt: skip
"""Name -> (the model it starts from, the change)."""


def write_bases(folder: Path) -> None:
    tok = Tokenizer.train(["User: What is it?\nAssistant: It is so."] * 8, 300)
    tok.save(folder / "tokenizer")
    shape = dict(
        vocab_size=tok.vocab_size, dim=32, n_layers=2, inter_dim=48, moe_inter_dim=16, n_heads=2, q_lora_rank=16,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=8,
        n_activated_experts=2, n_expert_groups=4, n_limited_groups=2, max_seq_len=256,
    )  # fmt: skip
    Transformer(preset("tiny", **shape)).initialise(3).save(folder / "ours", tokenizer_dir=folder / "tokenizer")
    made("llama-tied", vocab_size=420, max_position_embeddings=256).save_pretrained(folder / "llama")
    houses.byte_level(folder / "llama")


def changed(bases: Path, name: str, directory: Path) -> Path:
    """Makes a directory of this kind."""
    base, change = KINDS[name]
    shutil.copytree(bases / base, directory)
    change(directory)
    return directory


def attempt(directory: Path, log: Path) -> dict[str, Any]:
    """`bessemer generate` on a directory, in a fork: exit status, seconds, megabytes and what it said."""
    log.touch()
    begun, pid = time.monotonic(), os.fork()
    if pid == 0:
        code: Any = 1
        try:
            os.setsid()
            signal.alarm(GIVEN_UP)
            resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
            os.dup2(os.open(log, os.O_WRONLY), 2)
            os.dup2(2, 1)
            sys.argv = ["bessemer", "generate", str(directory), "What is it?", "--max-tokens", "2"]
            cli.main()
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        except BaseException as error:
            print(f"Traceback: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(pid, 0)
    output = log.read_text(errors="replace")
    return {
        "status": os.waitstatus_to_exitcode(status), "seconds": round(time.monotonic() - begun, 2),
        "MB": round(usage.ru_maxrss / 1024), "lines": output.count("\n"),
        "said": output[:300].strip().replace(str(directory), "DIR"),
    }  # fmt: skip


def held(result: dict[str, Any]) -> bool:
    one_line = result["status"] == 2 and result["lines"] == 1 and result["said"].startswith("error: ")
    return one_line and result["seconds"] <= SECONDS and result["MB"] << 20 <= BYTES


def run(names: list[str]) -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_bases(folder)
        for base in ("ours", "llama"):  # the unchanged models answer
            result = attempt(folder / base, folder / "log")
            if result["status"]:
                raise SystemExit(f"the sound model {base} does not work: {result}")
        for n, name in enumerate(names):
            directory = changed(folder, name, folder / f"kind-{n}")
            results[name] = attempt(directory, folder / f"log-{n}")
            shutil.rmtree(directory)
    return results


def main(words: list[str]) -> None:
    names = [name for name in KINDS if any(word in name for word in words)] if words else [*KINDS]
    results = run(names)
    failed = [name for name, result in results.items() if not held(result)]
    for name, result in results.items():
        cost = f"{result['seconds']:5.1f} s {result['MB']:5} MB"
        print(f"{'FAILED' if name in failed else 'held'}  {cost}  {name}: {result['said']}")
    print(f"{len(results) - len(failed)} of {len(results)} kinds held")
    if not words:
        facts = {
            "machine": platform.processor() or platform.machine(), "transformers": transformers.__version__,
            "kinds": len(results), "held": len(results) - len(failed),
            "most seconds": max(result["seconds"] for result in results.values()),
            "most MB": max(result["MB"] for result in results.values()), "results": results,
        }  # fmt: skip
        RESULTS.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
