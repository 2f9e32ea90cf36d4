#!/usr/bin/env bash
# Trains on this machine with N processes, as a cluster would with N hosts.
#
#   launch/local_processes.sh N <arguments of train.py>
#
# If one process fails, the others are stopped. SIGTERM, SIGHUP and Ctrl-C are
# passed on: the run saves a checkpoint and the same command resumes it. A
# second Ctrl-C ends all at once.
set -euo pipefail

count=${1:?usage: launch/local_processes.sh N <arguments of train.py>}
shift
folder=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
port=$("$python" -c \
  'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

children=()
trap 'kill -KILL "${children[@]}" 2>/dev/null || true' EXIT
stop() { kill -TERM "${children[@]}" 2>/dev/null || true; }
trap stop TERM HUP
trap 'stop; trap "exit 130" INT' INT
for ((i = 0; i < count; i++)); do
  "$python" "$folder/train.py" "$@" --distributed \
    --coordinator "localhost:$port" --processes "$count" --process "$i" &
  children+=($!)
done

running=$count
while ((running)); do
  status=0
  wait -n -p finished "${children[@]}" || status=$?
  [[ -z ${finished:-} ]] && continue # interrupted by a signal: wait on
  ((status == 0)) || exit "$status"
  running=$((running - 1))
  remaining=()
  for child in "${children[@]}"; do
    [[ $child == "$finished" ]] || remaining+=("$child")
  done
  children=("${remaining[@]}")
done
