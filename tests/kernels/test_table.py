"""The kernels' place in the operations table (`model.ops`)."""

import subprocess
import sys

from bessemer.addons.accelerate.kernels import library


def test_the_kernels_register_at_the_first_call_of_an_operation():
    """They come by an entry point. If this fails, the metadata of the installed package is older than pyproject.toml:
    run `pip install -e .` again."""
    code = "from bessemer.model import norm, ops; found = ops.instructions(), len(norm.rms_norm.implementations); "
    run = subprocess.run([sys.executable, "-c", f"{code}print(*found)"], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [library.status().instructions, "2"]
