#!/bin/bash
# LIFT on the hosts of a DeepSpeed hostfile, by DeepSpeed's command and pdsh. Parameters: launch/environment.sh
set -euo pipefail
source "$(dirname "$0")/environment.sh"

command -v pdsh > /dev/null || fail "pdsh is not installed"
for argument in "$@"; do # pdsh gives them to a shell on the other side
  [[ $argument != *[\"\'\`\$\\\;\&\|\<\>\(\)\{\}\*\?\#\!]* ]] || fail "pdsh cannot pass the argument $argument on; put it into a file"
done
check_hosts
first=$(head -n 1 <<< "$hosts")
PORT=$(choose_port_of "$first" "${PORT:-0}")
check_nodes doctor_by_ssh "$PORT"

# DeepSpeed exports what this file has to the other nodes.
export DS_ENV_FILE=$OUTPUT/launch/deepspeed_env
for name in $(passed_on); do echo "$name=${!name}"; done > "$DS_ENV_FILE"

# A node that is gone without a word is noticed after half a minute.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3"

train_by_deepspeed --hostfile "$HOSTFILE" --launcher pdsh --force_multi --master_port "$PORT" "${training[@]}" "$@"
