#!/usr/bin/env bash
# Join the cluster from another node:  ray_worker.sh --head ADDRESS:PORT [--ip ADDRESS] [--gpus N] [--cpus N]
# With DRY_RUN=1 the command is printed and nothing starts; with BLOCK=1 it stays in the foreground, and
# ending it ends Ray there. RAY_OBJECT_STORE_BYTES: as for ray_head.sh, of whose node the temporary folder counts here too.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=examples/launch/token.sh
source "$here/token.sh"

head='' options=()
while [ $# -gt 0 ]; do
  case "$1" in
    --head) head=${2:?"--head needs ADDRESS:PORT"} && shift 2 ;;
    --ip) options+=("--node-ip-address=${2:?"--ip needs an address"}") && shift 2 ;;
    --gpus) options+=("--num-gpus=${2:?"--gpus needs a number"}") && shift 2 ;;
    --cpus) options+=("--num-cpus=${2:?"--cpus needs a number"}") && shift 2 ;;
    *) echo >&2 "ray_worker.sh: unknown option $1; it takes --head, --ip, --gpus, --cpus" && exit 2 ;;
  esac
done
if [ -z "$head" ]; then
  echo >&2 "ray_worker.sh: --head ADDRESS:PORT is needed: ray_head.sh printed it"
  exit 2
fi
[ -z "${BLOCK:-}" ] || options+=(--block)

command=(ray start --address="$head" --disable-usage-stats --object-store-memory="${RAY_OBJECT_STORE_BYTES:-4294967296}" "${options[@]}")
if [ -n "${DRY_RUN:-}" ]; then
  echo "${command[@]}"
  exit 0
fi
need_token
exec "${command[@]}"
