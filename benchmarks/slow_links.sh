#!/bin/bash
# A scaling study on hosts of this machine whose links have different rates: full fine-tuning, LoRA and LIFT on two nodes
# of one rank each. Needs root and what tests/cluster/hosts.sh needs; ends its hosts when it ends.
#
#   benchmarks/slow_links.sh [RATE...]      rates such as 200mbit, 1gbit, unshaped (these three)
#
#   OUTPUT    folder of the study    (benchmarks/results/scaling/links)
#   NODES     how many hosts       (2)
#   SLOTS     ranks of a host      (1)
#   STUDY     options of launch/scaling_study.py in place of those below
set -euo pipefail
cd "$(dirname "$0")/.."
output=${OUTPUT:-benchmarks/results/scaling/links}
# So few tokens make the slowest link what a step waits for, as it is for large models on several GPUs.
study=${STUDY:---methods full lora lift --stages 2 --nodes 2 --ranks 2 --scaling weak --hidden 768 --intermediate 2048
  --layers 3 --vocabulary 1024 --sequence 16 --tokens 16 --steps 7 --repetitions 3}
[ $# -gt 0 ] || set -- 200mbit 1gbit unshaped

CLUSTER_DIR=$(mktemp -d "${TMPDIR:-/tmp}/slow-links.XXXXXX")
export CLUSTER_DIR
hosts=$PWD/tests/cluster/hosts.sh
trap '"$hosts" down; rm -rf "$CLUSTER_DIR"' EXIT
printf "node%s slots=${SLOTS:-1}\n" $(seq "${NODES:-2}") > "$CLUSTER_DIR/hostfile"

gbit() { awk -v rate="$1" 'BEGIN { print rate ~ /gbit$/ ? rate + 0 : rate / 1000 }'; }

for rate in "$@"; do
  shaped=() known=()
  if [ "$rate" != unshaped ]; then
    shaped=(--rate "$rate")
    known=(--link-gbit "$(gbit "$rate")")
  fi
  "$hosts" up "${NODES:-2}" "${shaped[@]}"
  # shellcheck disable=SC2086
  "$hosts" on 1 python launch/scaling_study.py --launcher hostfile --hostfile "$CLUSTER_DIR/hostfile" --interface eth0 \
    --link-name "$rate" "${known[@]}" --output "$output" $study
  "$hosts" down
done
