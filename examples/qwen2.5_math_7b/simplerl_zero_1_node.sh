#!/usr/bin/env bash
# SimpleRL-Zero on 6 GPUs of one node, optimizer states in host memory; nothing has to be started before.
#   simplerl_zero_1_node.sh [key=value...]      GPU=h100 takes the FP8 variant; SEED_EXACT=1 the seed's accidents
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
files=("$here/simplerl_zero.toml" "$here/1_node_${GPU:-a100}.toml")
[ -z "${SEED_EXACT:-}" ] || files+=("$here/seed_exact.toml")
exec examples/launch/single_node.sh "${files[@]}" "$@"
