#!/bin/bash
# LIFT on the GPUs of one machine, by DeepSpeed's command. Parameters: launch/environment.sh
set -euo pipefail
source "$(dirname "$0")/environment.sh"

ranks=$(ranks_here)
PORT=$(choose_port)
check_nodes "${doctor[@]}"
train_by_deepspeed --num_gpus "$ranks" --master_port "$PORT" "${training[@]}" "$@"
