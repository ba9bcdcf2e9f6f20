#!/usr/bin/env bash
# One machine, no cluster to start: Ray comes and goes with the run.  single_node.sh FILE.toml... [key=value...]
# COMMAND=sft for a supervised stage. With DRY_RUN=1 the settings are printed and nothing starts.
set -euo pipefail
if [ $# -eq 0 ]; then
  echo >&2 "single_node.sh: no configuration; usage: single_node.sh FILE.toml... [key=value...]"
  exit 2
fi
[ -z "${DRY_RUN:-}" ] || exec megatron-rl show-config "$@"
exec megatron-rl "${COMMAND:-train}" "$@"
