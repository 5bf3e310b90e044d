#!/bin/bash
# LIFT on the hosts of a hostfile, by Open MPI's mpirun; the ranks find each other through mpi4py.
# Parameters: launch/environment.sh
set -euo pipefail
source "$(dirname "$0")/environment.sh"

command -v mpirun > /dev/null || fail "mpirun is not installed"
python -c 'from mpi4py import MPI' 2> /dev/null || fail "mpi4py is missing or finds no MPI library: pip install 'lift_ds[mpi4py]'"
check_hosts
check_nodes doctor_by_ssh 0
ranks=$(sed 's/#.*//' "$HOSTFILE" | awk 'NF {n = 1; for (i = 2; i <= NF; i++) if (split($i, p, "=") == 2 && p[1] == "slots") n = p[2]; s += n} END {print s}')

exports=()
for name in $(passed_on); do exports+=(-x "$name"); done

exec mpirun -np "$ranks" --hostfile "$HOSTFILE" --map-by slot --bind-to none "${exports[@]}" \
  python -u "${training[@]}" "$@" > >(tee -a "$log") 2> >(tee -a "$log" >&2)
