# From nothing to a small reasoning model in a container:
#   docker build -t bessemer .                            for CPUs
#   docker build -t bessemer --build-arg TORCH=cu128 .    for NVIDIA GPUs: docker run --gpus all ...
#   docker run -v "$PWD/runs:/home/user/runs" bessemer         the demo; runs/tiny is left behind
#   docker run -v "$PWD/runs:/home/user/runs" -p 127.0.0.1:8000:8000 bessemer serve runs/tiny --host 0.0.0.0 --api-key SECRET
FROM python:3.12-slim

# g++ builds the CPU kernels at first use; bubblewrap is the stronger sandbox for code rewards. Docker's default seccomp
# profile forbids the namespaces of both sandboxes: without --security-opt seccomp=unconfined code rewards are refused.
RUN apt-get update && apt-get install -y --no-install-recommends g++ bubblewrap && rm -rf /var/lib/apt/lists/*

# The one package whose build depends on the machine; everything else comes with its hash checked, as `make` has it.
ARG TORCH=cpu
WORKDIR /bessemer
COPY constraints.txt requirements.lock ./
RUN pip install --no-cache-dir --require-hashes --no-deps -r requirements.lock \
 && pip install --no-cache-dir -c constraints.txt --index-url "https://download.pytorch.org/whl/${TORCH}" torch

COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY recipes recipes
COPY examples examples
COPY src src
RUN pip install --no-cache-dir --no-build-isolation -c constraints.txt .

RUN useradd --create-home --uid 1000 user && mkdir /home/user/runs && chown user /home/user/runs
USER 1000
WORKDIR /home/user
ENTRYPOINT ["bessemer"]
CMD ["run", "tiny"]
