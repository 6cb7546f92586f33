"""Files for clusters that no test has at hand: at least their form."""

import subprocess
from pathlib import Path

import yaml

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_slurm_script_is_a_script():
    subprocess.run(["bash", "-n", EXAMPLES / "slurm.sh"], check=True)


def test_skypilot_and_kubernetes_files_are_what_these_read():
    (task,) = yaml.safe_load_all((EXAMPLES / "skypilot.yaml").read_text())
    assert task["num_nodes"] == 2 and "bessemer run $RECIPE" in task["run"]
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    assert service["kind"] == "Service" and job["kind"] == "Job"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert f"--nnodes={job['spec']['completions']}" in container["args"][0]
