#!/bin/bash
# Installs what the tests of this folder need beside the Python environment, on Debian as root; elsewhere the tests skip
# themselves and say why. The environment's programs are in $1.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin DEBIAN_FRONTEND=noninteractive

packages=()
for pair in ip:iproute2 sshd:openssh-server ssh:openssh-client pdsh:pdsh mpirun:openmpi-bin sbatch:slurm-client \
  slurmctld:slurmctld slurmd:slurmd munged:munge; do
  command -v "${pair%%:*}" > /dev/null || packages+=("${pair#*:}")
done
if [ ${#packages[@]} != 0 ]; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "not installed: ${packages[*]}; that takes root and apt-get" >&2
    exit 0
  fi
  # Their own services are not wanted: the tests start what they need inside their hosts.
  policy=/usr/sbin/policy-rc.d
  if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' > $policy
    chmod +x $policy
    trap 'rm -f $policy' EXIT
  fi
  apt-get -qq update || true
  apt-get -qq install --yes --no-install-recommends "${packages[@]}" > /dev/null || echo "apt-get failed" >&2
fi
"$1/python" -c 'from mpi4py import MPI' 2> /dev/null ||
  "$1/pip" install --quiet --disable-pip-version-check --constraint "$(dirname "$0")/../../constraints.txt" 'mpi4py>=4.0' || echo "mpi4py could not be installed" >&2
