#!/bin/bash
# A recipe on a Slurm cluster: sbatch examples/slurm.sh recipes/mine.toml /shared/runs/mine
#
# [layout] in the recipe assigns the ranks; with dp = "auto" it uses every node of the job. The run directory must be
# writable from all nodes, on a file system that renames and appends (Lustre, NFS, GPFS). After a kill, a time limit or a
# lost node, submit the job again and it resumes.
#SBATCH --job-name=bessemer
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
# SIGTERM reaches every step five minutes before the time limit: the run writes a final checkpoint and stops

set -euo pipefail
recipe=$1 out=$2
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 # for that checkpoint; torch's default is 30 seconds
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}     # INFO names the network that NCCL has chosen
# Where NCCL chooses wrongly, say which cards carry tensors and which interface carries the first handshake:
#   export NCCL_IB_HCA=mlx5 NCCL_SOCKET_IFNAME=bond0

on_every_node() { # srun has ignored the job's --cpus-per-task since Slurm 22.05; without it a node has one core
  srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 .venv/bin/torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" --max-restarts="$1" --numa-binding=node \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID-$1" --rdzv-endpoint="$head:29500" -m bessemer "${@:2}"
}

on_every_node 0 doctor --folder "$out" # the pre-flight: a bad node or a slow link shows before the run waits for it
on_every_node 3 run "$recipe" --out "$out"
