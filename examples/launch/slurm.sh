#!/usr/bin/env bash
# Two machines of four GPUs each, under SLURM:
#   sbatch examples/launch/slurm.sh train.py --its-arguments
#SBATCH --job-name=iada
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A job that was preempted is started again: resume with last_complete_checkpoint(output_dir), see docs/long_runs.md.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node 4 \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head:29500" \
    "$@"
