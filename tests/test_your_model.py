"""docs/your-model.md: its files and commands in an empty folder, with a small random Llama as the imported model."""

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import httpx
import pytest

pytest.importorskip("peft")
sys.path.append(str(Path(__file__).parent / "data"))
from hf_cases import made
from hf_tokenizers import byte_level

from bessemer.config.builtin import builtin_recipes

PAGE = (Path(__file__).parents[1] / "docs" / "your-model.md").read_text("utf-8")
PAGE = re.sub(r"git clone https://\S+", "git clone <this repository>", PAGE)  # .ci/address.py writes the address
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines() if line]
ELSEWHERE = {
    "git clone <this repository> bessemer": "the wheel of the tree is installed and run by",
    "pip install './bessemer[hf,lora]'": "tests/test_recipes.py::test_the_wheel_runs_outside_the_clone",
    "pip install './bessemer[hf,lora,vllm]'": "the same",
    "bessemer run gpu.toml": "tests/plan/test_recipes_in_miniature.py runs the recipe in miniature",
    "bessemer run eight.toml": "the same",
}
"""Commands that are not run here, and what runs them."""
SMALLER = {
    "bessemer why runs/mine": ["--problems", "8", "--samples", "4"],
    "bessemer doctor": ["--json"],
}
"""Options that a command gets here to take less time."""
SERVERS = {"bessemer watch runs/mine": ("--no-browser", "/api/state"), "bessemer serve runs/mine": ("", "/health")}
"""Commands that run until they are stopped, what they get here, and the path that answers."""


def files_of_page():
    """File name -> text, for every block that begins with its name."""
    return {name: text for name, text in re.findall(r"```(?:python|toml)\n# (\w+\.\w+)\n(.*?)```", PAGE, re.S)}


def program(command, *more):
    words = [*shlex.split(command.replace("OWNER/NAME", "own/name")), *more]
    return [sys.executable, *(["-m", *words] if words[0] == "bessemer" else words[1:])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of the page, with a small model in place of SmolLM2 and steps that suit it."""
    folder = tmp_path_factory.mktemp("own")
    made("llama", vocab_size=400, max_position_embeddings=8192, initializer_range=0.1).save_pretrained(folder / "model")
    byte_level(folder / "model")
    for name, text in files_of_page().items():
        (folder / name).write_text(text)
    text = (folder / "mine.toml").read_text()
    changes = {
        '"package:smollm2-135m"': '"model"', "lr = 1e-3": "lr = 0.1", "\nrollouts = 12": "\nrollouts = 30",
        "prompts_per_rollout = 4": "prompts_per_rollout = 8",
    }  # fmt: skip
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "mine.toml").write_text(text)
    return folder


def run(folder, command, *more, stdin=""):
    done = subprocess.run(program(command, *more), cwd=folder, input=stdin, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout + done.stderr


def wait_for_answer(folder, command, option, path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(program(command, *option.split(), "--port", str(port)), cwd=folder)
    try:
        for _ in range(600):
            assert server.poll() is None
            try:
                if httpx.get(f"http://127.0.0.1:{port}{path}").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError(f"{command} does not answer")
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def test_the_files_are_short_and_every_command_is_run_or_named():
    files = files_of_page()
    assert files.keys() == {"problems.py", "reward.py", "mine.toml"}
    code = [line for line in files["reward.py"].splitlines() if line.strip()]
    assert len(code) <= 10
    assert ELSEWHERE.keys() | SMALLER.keys() | SERVERS.keys() <= set(COMMANDS)
    for name in re.findall(r"--from ([\w.-]+)|`bessemer run ([\w.-]+)`", PAGE):
        assert "".join(name) in builtin_recipes(), name


@pytest.mark.timeout(1800)
def test_every_command_runs_in_order_and_the_reward_rises(folder):
    """The commands of one CPU, as the page has them, in an empty folder."""
    begin, end = (
        COMMANDS.index(command) for command in ("python problems.py", "bessemer init gpu.toml --from qwen2.5-1.5b-grpo")
    )
    own = [command for command in COMMANDS[begin:end] if command not in ELSEWHERE]
    output = {}
    for command in own:
        if command in SERVERS:
            wait_for_answer(folder, command, *SERVERS[command])
        else:
            output[command] = run(folder, command, *SMALLER.get(command, ()), stdin="What is 4 + 7?\n")
    assert "no fault found" in output["bessemer run mine.toml --dry-run"]
    lines = [json.loads(line) for line in (folder / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["values"]["rl/reward"] for line in lines if "rl/reward" in line["values"]]
    assert len(rewards) == 30 and fmean(rewards[-5:]) > 1.4 * fmean(rewards[:5]), rewards
    import transformers

    transformers.AutoModelForCausalLM.from_pretrained(folder / "runs" / "mine" / "02-rl" / "model")
    assert (folder / "runs" / "mine" / "02-rl" / "adapter").is_dir()


@pytest.mark.parametrize("name", ["gpu", "eight"])
def test_a_recipe_for_gpus_is_one_of_your_own(folder, name):
    """`bessemer init` writes it, and with a model from a directory its dry run finds every file."""
    init, dry = (
        next(command for command in COMMANDS if part in command)
        for part in (f"init {name}.toml", f"run {name}.toml --dry")
    )
    run(folder, init)
    file = folder / f"{name}.toml"
    file.write_text(re.sub(r'"hf://[^"]+"', '"model"', file.read_text()))
    assert "no fault found" in run(folder, dry)
