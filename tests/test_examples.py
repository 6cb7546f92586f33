"""Example files for clusters that the tests do not have: their format and what they start, with the scheduler's
commands replaced by programs that log how they were called."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

EXAMPLES = Path(__file__).parents[1] / "examples"
SAYS = """#!{python}
import json, os, sys
with open({log!r}, "a") as log:
    log.write(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], os.environ.get("SRUN_CPUS")]) + "\\n")
{then}
"""
SRUN = """
options = [a for a in sys.argv[1:] if a.startswith("--")][:2]
cpus = next(a.partition("=")[2] for a in options if a.startswith("--cpus-per-task"))
command = sys.argv[1 + len(options):]
os.execve(command[0], command, os.environ | {"SRUN_CPUS": cpus})
"""


@pytest.fixture
def commands(tmp_path):
    """A folder with stubs of srun, scontrol and a virtual environment's torchrun, and a function that lists calls."""
    log = tmp_path / "calls"

    def program(path, then):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SAYS.format(python=sys.executable, log=str(log), then=then))
        path.chmod(0o755)

    program(tmp_path / "bin" / "scontrol", "print('node7')\nprint('node8')")
    program(tmp_path / "bin" / "srun", SRUN)
    program(tmp_path / ".venv" / "bin" / "torchrun", "")
    return tmp_path, lambda: [json.loads(line) for line in log.read_text().splitlines()]


def launched(call):
    """(torchrun's arguments, parsed by torchrun; bessemer's arguments)."""
    parsed = get_args_parser().parse_args(call)
    assert parsed.module and parsed.training_script == "bessemer"
    return parsed, parsed.training_script_args


def test_slurm_starts_a_pre_flight_and_the_run_on_all_cores_of_every_node(commands):
    folder, calls = commands
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "41",
           "SLURM_CPUS_PER_TASK": "96", "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}  # fmt: skip
    command = ["bash", str(EXAMPLES / "slurm.sh"), "recipes/mine.toml", "/shared/runs/mine"]
    subprocess.run(command, check=True, cwd=folder, env=job)
    torchruns = [arguments for name, arguments, _ in calls() if name == "torchrun"]
    assert {cpus for name, _, cpus in calls() if name == "torchrun"} == {"96"}
    (first, look), (second, run) = map(launched, torchruns)
    assert look[0] == "doctor" and run == ["run", "recipes/mine.toml", "--out", "/shared/runs/mine"]
    assert (first.nnodes, first.nproc_per_node, first.rdzv_endpoint) == ("2", "8", "node7:29500")
    assert second.max_restarts == 3 and first.rdzv_id != second.rdzv_id


def test_skypilot_uses_every_gpu_of_a_machine_with_a_python_and_a_bucket_that_serve(commands):
    folder, calls = commands
    (task,) = yaml.safe_load_all((EXAMPLES / "skypilot.yaml").read_text())
    assert task["num_nodes"] == 1 and task["file_mounts"]["/runs"]["mode"] == "MOUNT_CACHED"
    assert "--python 3.12" in task["setup"] and task["envs"]["RECIPE"] == "recipes/mine.toml"
    environment = os.environ | task["envs"] | {"SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    subprocess.run(["bash", "-c", task["run"]], check=True, cwd=folder, env=environment)
    (one, look), (two, run) = (launched(arguments) for _, arguments, _ in calls())
    assert look[0] == "doctor" and run == ["run", "recipes/mine.toml", "--out", "/runs/mine"]
    assert one.standalone and two.standalone and two.nproc_per_node == "8"
    subprocess.run(["bash", "-n", "-c", task["setup"]], check=True)


def test_kubernetes_pods_find_each_other_and_pin_memory(commands):
    folder, calls = commands
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    assert service["kind"] == "Service" and service["spec"]["publishNotReadyAddresses"] and job["kind"] == "Job"
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
    assert (
        int(container["resources"]["requests"]["cpu"]) >= 8 and container["resources"]["limits"]["nvidia.com/gpu"] == 8
    )
    subprocess.run([*container["command"], *container["args"]], check=True, cwd=folder)
    (_, look), (two, run) = (launched(arguments) for _, arguments, _ in calls())
    assert look[0] == "doctor" and run == ["run", "recipes/mine.toml", "--out", "/runs/mine"]
    assert two.nnodes == str(job["spec"]["completions"]) and two.max_restarts == 3
    host, name = two.rdzv_endpoint.partition(":")[0].split(".")
    assert (host, name) == (f"{job['metadata']['name']}-0", service["metadata"]["name"]) and pod["subdomain"] == name


@pytest.mark.skipif(importlib.util.find_spec("kubernetes_validate") is None, reason="pip install kubernetes-validate")
def test_kubernetes_accepts_the_file():
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", str(EXAMPLES / "kubernetes.yaml")]
    subprocess.run(command, check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="apt install shellcheck")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", str(EXAMPLES / "slurm.sh")], check=True)
