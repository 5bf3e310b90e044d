# Shared by the scripts of this folder, which source it. Parameters are environment variables; all further arguments of a
# script go to launch/train.py unchanged, as in `SIZE=7B DATA=rows.json OUTPUT=/shared/run launch/hostfile.sh --max_steps 100`.
#
#   SIZE           a preset such as 7B: its model and its DeepSpeed file
#   MODEL          a model's folder or hub name, in place of the preset's
#   DATA           a file of rows, JSON array or JSON lines. With neither MODEL, SIZE nor DATA: the small built-in run
#   OUTPUT         the run's folder, on storage that all nodes see; its parent exists             (lift_output)
#   DS_CONFIG      DeepSpeed file    (ds_configs/sizes/<size>_8x<GPU_MEMORY>gb.json; without SIZE ds_configs/lift_zero2.json)
#   GPU_MEMORY     of a preset: 80 or 141                                                         (80)
#   GPUS_PER_NODE  ranks on each node: one_machine.sh, torchrun.sh    (all GPUs of this node; on SLURM those of the job)
#   NODES, HEAD    torchrun.sh: how many nodes, and the name of the one where they meet           (1, this one)
#   HOSTFILE       hostfile.sh, openmpi.sh: lines such as `node1 slots=8`                         (hostfile)
#   PORT           where the ranks meet    (a free one; torchrun.sh on several nodes: 29500; openmpi.sh always finds its own)
#   MEETING        seconds within which all ranks have to come                                    (300)
#   DOCTOR         0 starts without a look at the nodes by lift-ds doctor --quick    (1)
#   VENV           Python environment, on storage that all nodes see; PATH's Python where there is none    (.venv)
#
# A run continues from the last whole checkpoint in OUTPUT, where there is one. $OUTPUT/launch/ has a log per attempt and
# resolved.json: command line, settled DeepSpeed and LIFT settings, versions, nodes.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  echo "error: $* ($(hostname))" >&2
  exit 2
}

# A port on this machine: the given one if it is free, any free one for 0.
probe='import socket, sys
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("", int(sys.argv[1])))
print(s.getsockname()[1])'

choose_port() {
  python -c "$probe" "${PORT:-0}" 2> /dev/null || fail "port ${PORT:-0} is in use on this node; name another by PORT, or none for a free one"
}

# A free port of another host, or the wanted one; likewise.
choose_port_of() {
  ssh -o BatchMode=yes "$1" "$(command -v python)" - "$2" <<< "$probe" 2> /dev/null ||
    fail "port $2 is in use on $1; name another by PORT, or none for a free one"
}

# Names of the variables that ranks on other nodes need; no passwords, since they are written to OUTPUT.
passed_on() {
  compgen -e | grep -E '^(PATH|LD_LIBRARY_PATH|PYTHON.*|VIRTUAL_ENV|CUDA_HOME|(HF|TRANSFORMERS|TOKENIZERS|OMP|MKL|NCCL|GLOO|UCX|TORCH|TRITON|DS|DEEPSPEED|LIFT_DS)_.*)$' |
    grep -vE 'TOKEN$|^DS_ENV_FILE$'
}

# The hosts of HOSTFILE answer, and see the repository, the environment and OUTPUT; else all that do not are named.
check_hosts() {
  [ -f "$HOSTFILE" ] || fail "HOSTFILE=$HOSTFILE: there is no such file"
  hosts=$(sed 's/#.*//' "$HOSTFILE" | awk 'NF {print $1}')
  [ -n "$hosts" ] || fail "HOSTFILE=$HOSTFILE names no host"
  local host wrong
  wrong=$(for host in $hosts; do ask_host "$host" & done; wait)
  [ -z "$wrong" ] || fail "hosts of $HOSTFILE cannot be used: $(sort <<< "$wrong" | paste -sd '|' | sed 's/|/; /g')"
}

ask_host() {
  local needed answer
  answer=$(
    for needed in "$repository/launch/train.py" "$(command -v python)" "$OUTPUT/launch"; do
      echo "[ -e '$needed' ] || { echo 'does not see $needed'; exit 1; }"
    done | timeout 20 ssh -o BatchMode=yes -o ConnectTimeout=5 "$1" bash 2>&1
  ) || tr -d '\r' <<< "$1: ${answer:-does not answer ssh}" | head -n 1
}

# Runs a command that examines all nodes; ends where that finds an error, by which the training would fail too.
check_nodes() {
  local code=0
  [ "$DOCTOR" != 0 ] || return 0
  "$@" 2>&1 | tee -a "$log" >&2 || code=${PIPESTATUS[0]}
  [ "$code" -lt 2 ] || exit "$code"
}

# The doctor on every host of HOSTFILE, one process each; the first one speaks. They meet at a port of it, or any for 0.
doctor_by_ssh() {
  local first count port address exports name host rank=0 code=0
  first=$(head -n 1 <<< "$hosts")
  count=$(wc -l <<< "$hosts")
  port=$(choose_port_of "$first" "$1") || return
  address=$(ssh -o BatchMode=yes "$first" hostname -I | awk '{print $1}') # as deepspeed finds it
  exports=$(for name in $(passed_on); do printf 'export %s=%q\n' "$name" "${!name}"; done)
  doctor+=(--hosts "$(paste -sd , <<< "$hosts")")
  for host in $hosts; do
    ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 "$host" bash -s <<< "$exports
      cd '$repository'
      export RANK=$rank WORLD_SIZE=$count LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=$address MASTER_PORT=$port
      exec ${doctor[*]@Q}" &
    rank=$((rank + 1))
  done
  for name in $(jobs -p); do wait "$name" || code=$?; done
  return "$code"
}

# A SLURM step whose job is started again as long as its attempts get further: one that ends before a checkpoint of its
# own is the last.
step_with_requeue() {
  local code=0
  attempt=$OUTPUT/launch/.attempt-$SLURM_JOB_ID
  touch "$attempt"
  trap requeue_if_further USR1 # the time limit is near: --signal
  srun --kill-on-bad-exit=1 "$@" &
  until wait $! || code=$?; [ "$code" -lt 128 ] || ! kill -0 $! 2> /dev/null; do code=0; done
  [ "$code" != 0 ] || return 0
  requeue_if_further
  echo "this attempt ended (exit code $code) before a checkpoint of its own, so the job is not started again" >&2
  exit "$code"
}

requeue_if_further() {
  find "$OUTPUT" -maxdepth 2 -path '*/checkpoint-*/lift.json' -newer "$attempt" | grep -q . || return 0
  echo "the job goes back into the queue, to continue from its last checkpoint" >&2
  scontrol requeue "$SLURM_JOB_ID"
  sleep infinity # until SLURM ends this attempt
}

# Ends with the exit code of DeepSpeed's command. Where its launcher was killed it returns 0 all the same; so the record of
# the run has to say that it has finished.
train_by_deepspeed() {
  local code=0 started=$OUTPUT/launch/.started-$$
  touch "$started"
  deepspeed "$@" > >(tee -a "$log") 2> >(tee -a "$log" >&2) &
  # A signal that ends this script ends the command; its ranks see to themselves.
  trap 'kill -TERM $! 2> /dev/null' TERM INT HUP
  wait $! || code=$?
  while kill -0 $! 2> /dev/null; do wait $! || code=$?; done
  if [ "$code" = 0 ] && ! { [ "$OUTPUT/launch/resolved.json" -nt "$started" ] && grep -q '"finished"' "$OUTPUT/launch/resolved.json"; }; then
    echo "error: the deepspeed command has ended before the training had; continue by the same command" >&2
    code=1
  fi
  rm -f "$started"
  exit "$code"
}

cd "$repository"
VENV=${VENV:-$repository/.venv}
if [ -x "$VENV/bin/python" ]; then export PATH="$VENV/bin:$PATH"; fi
command -v python > /dev/null || fail "there is no python in $VENV/bin or on PATH; run 'make setup', or name the environment by VENV"

GPU_MEMORY=${GPU_MEMORY:-80}
if [ -n "${SIZE:-}" ]; then
  if [ -z "${DS_CONFIG:-}" ]; then
    DS_CONFIG=ds_configs/sizes/${SIZE,,}_8x${GPU_MEMORY}gb.json
    [ -f "$DS_CONFIG" ] || fail "SIZE=$SIZE, GPU_MEMORY=$GPU_MEMORY: no such preset; there are: $(find ds_configs/sizes -name '*_8x*gb.json' -printf '%f ' 2> /dev/null | sed 's/\.json//g')"
  fi
  if [ -z "${MODEL:-}" ]; then
    MODEL=$(python -m lift_ds.planner.presets "$SIZE") || fail "SIZE=$SIZE: no such preset; name a model by MODEL"
  fi
fi
DS_CONFIG=${DS_CONFIG:-ds_configs/lift_zero2.json}
[ -f "$DS_CONFIG" ] || fail "DS_CONFIG=$DS_CONFIG: there is no such file"
[ -n "${MODEL:-}" ] || [ -z "${DATA:-}" ] || fail "DATA is given without a model; name SIZE or MODEL too"
[ -n "${DATA:-}" ] || [ -z "${MODEL:-}" ] || fail "MODEL or SIZE is given without data; name DATA too"
[ -z "${DATA:-}" ] || [ -f "$DATA" ] || fail "DATA=$DATA: there is no such file"

OUTPUT=$(realpath -m "${OUTPUT:-lift_output}")
[ -d "$(dirname "$OUTPUT")" ] || fail "OUTPUT=$OUTPUT: its parent folder does not exist; is the shared storage mounted here?"
mkdir -p "$OUTPUT/launch" || fail "OUTPUT=$OUTPUT cannot be written to"

HOSTFILE=${HOSTFILE:-hostfile}
DOCTOR=${DOCTOR:-1}
export DS_CONFIG OUTPUT MODEL=${MODEL:-} # for the scripts that a script starts
export LIFT_DS_MEETING_SECONDS=${MEETING:-300}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

gpus_here() { nvidia-smi --list-gpus 2> /dev/null | grep -c . || true; }

ranks_here() {
  local count=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-$(gpus_here)}}
  [ "$count" != 0 ] || fail "this node has no GPU; say how many ranks by GPUS_PER_NODE"
  echo "$count"
}

doctor=(env TORCH_CPP_LOG_LEVEL=ERROR python -m lift_ds.doctor --quick --output-dir "$OUTPUT")
training=(launch/train.py --deepspeed "$DS_CONFIG" --output_dir "$OUTPUT" --resume_from_checkpoint auto)
[ -z "${MODEL:-}" ] || training+=(--model_name_or_path "$MODEL")
[ -z "${DATA:-}" ] || training+=(--train_file "$DATA")

log=$OUTPUT/launch/$(date +%Y%m%d-%H%M%S)-$(basename "$0" .sh)-$(hostname).log
