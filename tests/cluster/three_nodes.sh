#!/bin/bash
# Three raylets on 127.0.0.1, .2 and .3 of a private network namespace, then a command. Ray listens on all interfaces, hence the namespace.
# usage: unshare --net --pid --fork --mount-proc --kill-child bash three_nodes.sh BIN_DIR TMP_DIR COMMAND...
# CPUS: the CPU shares of each node ("4 4 4"). DASHBOARD=true: with the job server, at 127.0.0.1:8265.
set -eu
bin=$1 tmp=$2
shift 2
read -ra cpus <<<"${CPUS:-4 4 4}"
ip link set lo up
export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$tmp/token
(umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$tmp/token")
node="--object-store-memory 80000000 --disable-usage-stats"
head="--port 6379 --include-dashboard=${DASHBOARD:-false} --dashboard-host 127.0.0.1 --dashboard-port 8265 --num-cpus ${cpus[0]}"
"$bin/ray" start --head --node-ip-address 127.0.0.1 $head $node --temp-dir "$tmp/r1" >"$tmp/node1.log" 2>&1
# Ray gives a raylet 30 s to register, too short on a busy machine: what it gave up is ended and started again.
add_node() {
  local i=$1
  for _ in 1 2 3 4; do
    "$bin/ray" start --address 127.0.0.1:6379 --node-ip-address 127.0.0.$i --num-cpus ${cpus[i - 1]} $node --temp-dir "$tmp/r$i" && return
    pkill -KILL -f -- "raylet.*--node_ip_address=127.0.0.$i " || true
  done
  return 1
}
started=()
for i in 2 3; do
  add_node $i >"$tmp/node$i.log" 2>&1 &
  started+=($!)
done
for pid in "${started[@]}"; do
  wait "$pid" || { tail -n 3 "$tmp"/node*.log >&2; exit 1; }
done
# Not exec: process 1 of the namespace must reap what its parents leave, or Ray waits for the dead.
"$@"
