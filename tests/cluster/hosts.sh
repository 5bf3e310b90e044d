#!/bin/bash
# Several hosts on one machine, made of namespaces (net, uts, mount, pid, ipc): node1, node2, ... with addresses 10.77.0.I,
# an interface eth0, an sshd and a /run and /dev/shm of their own; every other folder is shared. Linux, root.
#
#   hosts.sh up N [--rate 200mbit]   start node1 .. nodeN; --rate limits what a node sends
#   hosts.sh on I CMD...             run CMD on nodeI, in this folder, with this environment
#   hosts.sh slurm                   start SLURM on all nodes, with eight pretended GPUs each (slurmctld on node1)
#   hosts.sh cut I                   nodeI loses its power: its link is gone first, then its processes
#   hosts.sh start I                 nodeI again after a cut, with its slurmd where SLURM runs
#   hosts.sh processes               what runs on the nodes beside their daemons: node, pid, command line
#   hosts.sh down                    end all nodes
#
# State is kept in $CLUSTER_DIR (default: .cluster). Nothing outlives `down`: the networks end with their processes.
# For SLURM's commands on a node: SLURM_CONF=$CLUSTER_DIR/slurm.conf hosts.sh on 1 sbatch ...
# Debian: iproute2 openssh-server openssh-client pdsh openmpi-bin slurm-wlm munge
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
mkdir -p "${CLUSTER_DIR:=$PWD/.cluster}"
dir=$(cd "$CLUSTER_DIR" && pwd)

#: A network needs a process that holds it, under a name by which `down` knows its own.
holder=lift-cluster

pid_of() { cat "$dir/$1.pid"; }

alive() { [ -f "$dir/$1.parent" ] && kill -0 "$(cat "$dir/$1.parent")" 2> /dev/null; }

nodes() { seq "$(cat "$dir/count")"; }

on() {
  local node=node$1
  shift
  alive "$node" || { echo "error: $node is not up" >&2; exit 2; }
  exec nsenter -t "$(pid_of "$node")" -n -u -m -p -i --wd="$PWD" "$@"
}

# The first process within new namespaces, by the process that made them.
child_of() {
  local parent=$1 child
  for _ in $(seq 100); do
    child=$(awk '{print $1}' "/proc/$parent/task/$parent/children" 2> /dev/null || true)
    [ -z "$child" ] || { echo "$child"; return; }
    sleep 0.05
  done
  return 1
}

write_ssh() {
  [ -f "$dir/key" ] || ssh-keygen -q -t ed25519 -N '' -f "$dir/key"
  [ -f "$dir/hostkey" ] || ssh-keygen -q -t ed25519 -N '' -f "$dir/hostkey"
  cat > "$dir/sshd_config" <<CONF
HostKey $dir/hostkey
AuthorizedKeysFile $dir/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
UseDNS no
MaxStartups 100
PidFile none
CONF
  cat > "$dir/ssh_config" <<CONF
Host *
  IdentityFile $dir/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
CONF
}

start() {
  local i=$1 parent child
  cat > "$dir/node$i.init" <<INIT
set -e
hostname node$i
ip link set lo up
mount --bind $dir/hosts /etc/hosts
mount --bind $dir/ssh_config /etc/ssh/ssh_config
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd /run/lock /run/munge
until ip addr show eth0 2> /dev/null | grep -q 10.77.0.$i; do sleep 0.05; done
exec /usr/sbin/sshd -D -e -f $dir/sshd_config
INIT
  : > "$dir/node$i.log"
  setsid unshare --net --uts --mount --ipc --pid --fork --kill-child --mount-proc \
    bash "$dir/node$i.init" > "$dir/node$i.log" 2>&1 < /dev/null &
  parent=$!
  echo $parent > "$dir/node$i.parent"
  child=$(child_of $parent)
  echo "$child" > "$dir/node$i.pid"
  nsenter -t "$(pid_of switch)" -n ip link del "v$i" 2> /dev/null || true
  nsenter -t "$(pid_of switch)" -n ip link add "v$i" type veth peer name eth0 netns "$child"
  nsenter -t "$(pid_of switch)" -n ip link set "v$i" master br0 up
  nsenter -t "$child" -n ip link set eth0 up
  if [ -s "$dir/rate" ]; then
    nsenter -t "$child" -n tc qdisc add dev eth0 root tbf rate "$(cat "$dir/rate")" burst 256kb latency 50ms
  fi
  nsenter -t "$child" -n ip addr add "10.77.0.$i/24" dev eth0
  for _ in $(seq 100); do
    ! grep -q listening "$dir/node$i.log" || break
    kill -0 $parent 2> /dev/null || { echo "error: node$i did not start: $(cat "$dir/node$i.log")" >&2; exit 1; }
    sleep 0.05
  done
  [ ! -f "$dir/slurm.conf" ] || start_slurmd "$i"
}

up() {
  local count=$1 rate=''
  if [ "${2:-}" = --rate ]; then rate=${3:?a rate such as 200mbit}; fi
  ! alive switch || { echo "error: the nodes of $dir are up already" >&2; exit 2; }
  rm -rf "$dir"/slurm "$dir"/slurm.conf "$dir"/*.pid "$dir"/*.parent
  echo "$count" > "$dir/count"
  printf %s "$rate" > "$dir/rate"
  write_ssh
  { echo 127.0.0.1 localhost; for i in $(nodes); do echo "10.77.0.$i node$i"; done; } > "$dir/hosts"
  setsid unshare --net bash -c "exec -a $holder sleep infinity" > /dev/null 2>&1 < /dev/null &
  echo $! | tee "$dir/switch.pid" > "$dir/switch.parent"
  until [ "$(readlink /proc/self/ns/net)" != "$(readlink "/proc/$(pid_of switch)/ns/net")" ]; do sleep 0.05; done
  nsenter -t "$(pid_of switch)" -n ip link add br0 type bridge
  nsenter -t "$(pid_of switch)" -n ip link set br0 up
  for i in $(nodes); do
    start "$i"
    echo "node$i 10.77.0.$i"
  done
}

start_slurmd() {
  local i=$1 log=$dir/slurm/log
  (on "$i" bash -c "setsid munged --force -F --key-file=$dir/munge.key --socket=/run/munge/munge.socket.2 \
    --pid-file=/run/munge/munged.pid --log-file=/run/munge/munged.log --seed-file=/run/munge/munged.seed \
    > $log/munged.$i 2>&1 < /dev/null & for _ in \$(seq 100); do [ ! -S /run/munge/munge.socket.2 ] || break; sleep 0.05; done")
  [ "$i" != 1 ] || (on 1 bash -c "SLURM_CONF=$dir/slurm.conf setsid slurmctld -D > $log/slurmctld.out 2>&1 < /dev/null &")
  (on "$i" bash -c "SLURM_CONF=$dir/slurm.conf setsid slurmd -D > $log/slurmd.$i.out 2>&1 < /dev/null &")
}

slurm() {
  local count i
  count=$(cat "$dir/count")
  mkdir -p "$dir/slurm/state" "$dir/slurm/log"
  [ -f "$dir/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom > "$dir/munge.key")
  # cred_expire: a requeued job waits as long, two minutes otherwise. SlurmdTimeout: after which a node is lost.
  cat > "$dir/slurm.conf" <<CONF
ClusterName=lift
SlurmctldHost=node1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/slurm/state
SlurmdSpoolDir=$dir/slurm/spool.%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=$dir/slurm/log/slurmctld.log
SlurmdLogFile=$dir/slurm/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdTimeout=15
KillWait=5
SlurmdParameters=config_overrides
GresTypes=gpu
$(for i in $(nodes); do echo "NodeName=node$i NodeAddr=10.77.0.$i CPUs=64 Boards=1 SocketsPerBoard=1 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=1000000 Gres=gpu:8 State=UNKNOWN"; done)
PartitionName=main Nodes=node[1-$count] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
CONF
  for i in $(nodes); do echo "NodeName=node$i Name=gpu File=/dev/tty[0-7]"; done > "$dir/gres.conf"
  for i in $(nodes); do start_slurmd "$i"; done
  export SLURM_CONF=$dir/slurm.conf
  for _ in $(seq 60); do
    [ "$( (on 1 sinfo -h -o '%T %D') 2> /dev/null || true)" != "idle $count" ] || break
    sleep 0.25
  done
  (on 1 sinfo)
}

cut_power() {
  local node=node$1
  nsenter -t "$(pid_of "$node")" -n ip link set eth0 down
  kill -9 "$(cat "$dir/$node.parent")"
  rm -f "$dir/$node.parent" "$dir/$node.pid"
}

processes() {
  local i root space process words
  for i in $(nodes); do
    alive "node$i" || continue
    root=$(pid_of "node$i")
    space=$(readlink "/proc/$root/ns/pid")
    for process in /proc/[0-9]*; do
      [ "$(readlink "$process/ns/pid" 2> /dev/null || true)" = "$space" ] || continue
      words=$(tr '\0' ' ' < "$process/cmdline" 2> /dev/null || true)
      case "$words" in
        '' | "sshd: /usr/sbin/sshd -D"* | "bash $dir/"* | "munged "* | "slurmctld -D"* | "slurmd -D"* | "slurmctld: "* | ': slurmscr'* | *slurmscriptd*) ;;
        *) echo "node$i ${process#/proc/} $words" ;;
      esac
    done
  done
}

down() {
  local file parent
  for file in "$dir"/*.parent; do # killing what made the namespaces takes all in them along
    [ -f "$file" ] || continue
    parent=$(cat "$file")
    if tr '\0' ' ' < "/proc/$parent/cmdline" 2> /dev/null | grep -q -e "$dir/node" -e "$holder"; then kill -9 "$parent"; fi
    rm -f "$file"
  done
  rm -f "$dir"/*.pid "$dir/slurm.conf"
}

command=${1:-}
shift || true
case $command in
  up) up "${1:?how many nodes}" "${@:2}" ;;
  on) on "$@" ;;
  slurm) slurm ;;
  cut) cut_power "${1:?which node}" ;;
  start) start "${1:?which node}" ;;
  processes) processes ;;
  down) down ;;
  *)
    sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'
    exit 2
    ;;
esac
