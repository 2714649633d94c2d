#!/bin/bash
# Three raylets on 127.0.0.1, .2 and .3 of a private network namespace, then a command. Ray listens on all interfaces, hence the namespace.
# usage: unshare --net --pid --fork --mount-proc --kill-child bash three_nodes.sh BIN_DIR TMP_DIR COMMAND...
set -eu
bin=$1 tmp=$2
shift 2
ip link set lo up
export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$tmp/token
(umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$tmp/token")
node="--num-cpus 4 --object-store-memory 80000000 --disable-usage-stats"
"$bin/ray" start --head --node-ip-address 127.0.0.1 --port 6379 --include-dashboard=false $node --temp-dir "$tmp/r1" >"$tmp/node1.log" 2>&1
started=()
for i in 2 3; do
  "$bin/ray" start --address 127.0.0.1:6379 --node-ip-address 127.0.0.$i $node --temp-dir "$tmp/r$i" >"$tmp/node$i.log" 2>&1 &
  started+=($!)
done
for pid in "${started[@]}"; do
  wait "$pid" || { tail -n 3 "$tmp"/node*.log >&2; exit 1; }
done
exec "$@"
