#!/usr/bin/env bash
# The same command on every host of a TPU pod slice.
#
#   launch/tpu_pod.sh NAME ZONE \
#     --config fairseg --workdir /mnt/shared/runs/fairseg
#
# The project lies in ~/fairdiff_jax on each host, with its data and the work
# directory on a disk that all hosts mount.
set -euo pipefail
name=$1 zone=$2
shift 2
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command \
  "cd ~/fairdiff_jax && .venv/bin/python launch/train.py --distributed $(printf '%q ' "$@")"
