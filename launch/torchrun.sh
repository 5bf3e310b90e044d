#!/bin/bash
# LIFT by torchrun, started once on each of NODES nodes; they meet at HEAD. Parameters: launch/environment.sh
set -euo pipefail
source "$(dirname "$0")/environment.sh"

NODES=${NODES:-1}
ranks=$(ranks_here)
if [ "$NODES" = 1 ]; then
  HEAD=${HEAD:-localhost}
  PORT=$(choose_port)
else
  [ -n "${HEAD:-}" ] || fail "NODES=$NODES, but HEAD does not name the node where they meet"
  PORT=${PORT:-29500}
  address=$(getent ahostsv4 "$HEAD" | awk 'NR == 1 {print $1}') || fail "HEAD=$HEAD is not a known host"
  if ip -4 -o addr show | grep -qwF "$address"; then PORT=$(choose_port); fi
  doctor+=(--meet "$HEAD:$PORT" --nodes "$NODES")
fi

check_nodes "${doctor[@]}"

exec torchrun --nnodes "$NODES" --nproc-per-node "$ranks" --max-restarts 0 \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "${SLURM_JOB_ID:-lift_ds}" \
  --rdzv-conf "join_timeout=$LIFT_DS_MEETING_SECONDS,read_timeout=$LIFT_DS_MEETING_SECONDS" \
  "${training[@]}" "$@" > >(tee -a "$log") 2> >(tee -a "$log" >&2)
