#!/bin/bash
# A real slurmctld and three slurmd of this machine in a private network namespace, then a command. Nothing outlives the namespace.
# usage: unshare --net --mount --pid --fork --mount-proc --kill-child bash cluster.sh TMP_DIR CPUS_PER_NODE COMMAND...
set -eu
dir=$1 cpus=$2
shift 2
ip link set lo up
ip addr add 10.45.0.1/32 dev lo # with 127.0.0.1 alone a host counts as one without a network, and Slurm resolves no name
# Slurm and Hydra look up this host's own name, which a namespace without name service must know by itself.
echo "127.0.0.1 localhost $(hostname)" >"$dir/hosts"
mount --bind "$dir/hosts" /etc/hosts
mkdir -m 700 "$dir/slurm" "$dir/slurm/state" "$dir/slurm/log"
cat >"$dir/slurm/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=17817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/slurm/munge.sock
StateSaveLocation=$dir/slurm/state
SlurmdSpoolDir=$dir/slurm/spool-%n
SlurmctldPidFile=$dir/slurm/ctld.pid
SlurmdPidFile=$dir/slurm/slurmd-%n.pid
SlurmctldLogFile=$dir/slurm/log/ctld.log
SlurmdLogFile=$dir/slurm/log/slurmd-%n.log
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SlurmdTimeout=120
InactiveLimit=0
KillWait=10
MessageTimeout=60
SchedulerParameters=sched_interval=5
NodeName=s[0-2] NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=[17900-17902] CPUs=$cpus RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=s[0-2] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
END
(umask 077 && head -c 1024 /dev/urandom >"$dir/slurm/munge.key")
munged --force --key-file="$dir/slurm/munge.key" --socket="$dir/slurm/munge.sock" --pid-file="$dir/slurm/munged.pid" \
  --log-file="$dir/slurm/log/munged.log" --seed-file="$dir/slurm/munged.seed"
export SLURM_CONF=$dir/slurm/slurm.conf
slurmctld
for node in s0 s1 s2; do slurmd -N $node; done
up() { [ "$(timeout 5 sinfo --noheader --states=idle --format=%D 2>/dev/null)" = 3 ]; }
deadline=$((SECONDS + 60))
until up; do
  ((SECONDS < deadline)) || { tail -n 3 "$dir"/slurm/log/* >&2; exit 1; }
  sleep 0.1
done
exec "$@"
