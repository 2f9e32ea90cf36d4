#!/usr/bin/env bash
# One process per GPU on a Slurm cluster; the nodes share the work directory.
#
#   sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh \
#     --config fairseg --workdir /shared/runs/fairseg
#
#SBATCH --job-name=fairdiff_jax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
# JAX finds the coordinator and the ranks in Slurm's environment.
srun --kill-on-bad-exit=1 .venv/bin/python launch/train.py --distributed "$@"
