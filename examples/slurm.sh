#!/bin/bash
# A recipe on a Slurm cluster: sbatch examples/slurm.sh recipes/mine.toml /shared/runs/mine
#
# [layout] in the recipe assigns the ranks; with dp = "auto" it uses every node of the job. The run directory must be
# writable from all nodes. After a kill, a time limit or a lost node, submit the job again and it resumes.
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
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 # for that checkpoint; torch's default is 30 seconds
recipe=$1 out=$2
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 .venv/bin/torchrun \
  --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:29500" \
  -m bessemer run "$recipe" --out "$out"
