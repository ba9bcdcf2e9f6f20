#!/usr/bin/env bash
# SimpleRL-Zero on 4 nodes of 8 GPUs, on the cluster of examples/launch: run on its head, from the checkout.
#   simplerl_zero_4_nodes.sh [key=value...]      GPU=h100 takes the FP8 variant; SEED_EXACT=1 the seed's accidents
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
files=("$here/simplerl_zero.toml" "$here/4_nodes_${GPU:-a100}.toml")
[ -z "${SEED_EXACT:-}" ] || files+=("$here/seed_exact.toml")
exec examples/launch/submit.sh -- megatron-rl train "${files[@]}" "$@"
