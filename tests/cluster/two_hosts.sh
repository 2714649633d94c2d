#!/bin/bash
# A second host: a network namespace `b` with its own host name, behind a cable from 10.44.0.1 (here) to 10.44.0.2. Then a command.
# usage: unshare --net --mount --uts --pid --fork --mount-proc --kill-child bash two_hosts.sh COMMAND...
set -eu
mount -t tmpfs none /run
ip link set lo up
hostname hosta
ip netns add b
ip link add cable type veth peer name cable netns b
ip addr add 10.44.0.1/24 dev cable
ip link set cable up
ip -n b addr add 10.44.0.2/24 dev cable
ip -n b link set cable up
ip -n b link set lo up
exec "$@"
