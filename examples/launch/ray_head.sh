#!/usr/bin/env bash
# Start Ray on the first node:  ray_head.sh --ip ADDRESS [--port 6379] [--dashboard-port 8265] [--gpus N] [--cpus N]
# ADDRESS is one that the other nodes reach. With DRY_RUN=1 the command is printed and nothing starts; with
# BLOCK=1 it stays in the foreground, and ending it ends Ray there.
# RAY_OBJECT_STORE_BYTES: of memory for the batches that go to workers, here and of ray_worker.sh, 4 GiB unless it is set;
# megatron-rl doctor says where a recipe needs more. RAY_TMPDIR: where Ray's files go on every node, else TMPDIR, else /tmp.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=examples/launch/token.sh
source "$here/token.sh"

ip='' port=6379 dashboard=8265 resources=()
while [ $# -gt 0 ]; do
  case "$1" in
    --ip) ip=${2:?"--ip needs an address"} && shift 2 ;;
    --port) port=${2:?"--port needs a number"} && shift 2 ;;
    --dashboard-port) dashboard=${2:?"--dashboard-port needs a number"} && shift 2 ;;
    --gpus) resources+=("--num-gpus=${2:?"--gpus needs a number"}") && shift 2 ;;
    --cpus) resources+=("--num-cpus=${2:?"--cpus needs a number"}") && shift 2 ;;
    *) echo >&2 "ray_head.sh: unknown option $1; it takes --ip, --port, --dashboard-port, --gpus, --cpus" && exit 2 ;;
  esac
done
if [ -z "$ip" ]; then
  echo >&2 "ray_head.sh: --ip is needed: an address of this node that the others reach (one of: $(hostname -I 2>/dev/null))"
  exit 2
fi

# the kernel's 107 bytes for a socket, less /ray/session_2026-01-31_23-59-59_999999_4194304/sockets/dash_TaskEventsHead
room=32
temporary=${RAY_TMPDIR-${TMPDIR-/tmp}}
if [ "$(printf %s "$temporary" | wc -c)" -gt "$room" ]; then
  echo >&2 "ray_head.sh: Ray's sockets lie below RAY_TMPDIR, or else TMPDIR, which must have at most $room bytes, found" \
    "$temporary: export RAY_TMPDIR=/tmp, or another short folder with room for Ray's files"
  exit 2
fi

# the dashboard takes jobs: it listens on this node alone, and submit.sh runs here
command=(ray start --head --node-ip-address="$ip" --port="$port" --dashboard-host=127.0.0.1
  --dashboard-port="$dashboard" --disable-usage-stats --object-store-memory="${RAY_OBJECT_STORE_BYTES:-4294967296}" "${resources[@]}")
if [ -n "${DRY_RUN:-}" ]; then
  echo "${command[@]}"
  exit 0
fi
make_token
need_token
[ -z "${BLOCK:-}" ] || exec "${command[@]}" --block
"${command[@]}"
echo "on every other node: examples/launch/ray_worker.sh --head $ip:$port   (with the same $RAY_AUTH_TOKEN_PATH)"
echo "then here:           examples/launch/submit.sh -- megatron-rl train FILE.toml..."
echo "for ray and doctor:  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH"
