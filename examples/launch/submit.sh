#!/usr/bin/env bash
# Run a command on the cluster as a Ray job, from this folder:  submit.sh [--dashboard URL] -- megatron-rl train FILE.toml...
# The package and this folder must be there on every node: the same checkout at the same place will do. But run_dir must be
# on a file system that all nodes share: ranks write checkpoints there, and a run that finds it is not ends at its start.
# With DRY_RUN=1 the command is printed and nothing starts. Ctrl-C ends what is shown of the job, not the job: SIGTERM to
# the process of megatron-rl on the head lets it save and end; ray job stop ends it at once, with nothing saved.
# Of the environment here the job gets PATH and the variables of W&B named below; it has the rest from where ray_head.sh
# was started, ranks and engines from where their node was: export WANDB_API_KEY, NCCL_* and GLOO_* there.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=examples/launch/token.sh
source "$here/token.sh"

dashboard=http://127.0.0.1:8265
while [ $# -gt 0 ]; do
  case "$1" in
    --dashboard) dashboard=${2:?"--dashboard needs a URL"} && shift 2 ;;
    --) shift && break ;;
    *) echo >&2 "submit.sh: unknown option $1; usage: submit.sh [--dashboard URL] -- COMMAND..." && exit 2 ;;
  esac
done
if [ $# -eq 0 ]; then
  echo >&2 "submit.sh: no command; usage: submit.sh [--dashboard URL] -- megatron-rl train FILE.toml..."
  exit 2
fi

# these start Ray themselves, unless they are told where it is
starts_ray='(megatron-rl|-m megatron_rl) (train|sft|check-parity|doctor|scale run) '
if [[ "$*" =~ ^([^ ]*/)?(python[0-9.]*( -[^ ]+)* )?$starts_ray ]]; then
  set -- "$@" cluster.address=auto
elif [[ "$*" =~ $starts_ray && "$*" != *cluster.address=* ]]; then
  echo >&2 "submit.sh: the command that starts Ray must stand first, or be told where Ray is, found it in: $*; give it" \
    "the setting cluster.address=auto"
  exit 2
fi

# by name: whatever stands on a command line, every user of the machine sees
settings=("PATH=$PATH")
for name in WANDB_BASE_URL WANDB_ENTITY WANDB_JOB_TYPE WANDB_MODE WANDB_NOTES WANDB_RUN_GROUP WANDB_TAGS; do
  [ -z "${!name:-}" ] || settings+=("$name=${!name}")
done

# the job's shell gets the command word by word, and its own folder
# shellcheck disable=SC2016 # it is that shell which expands them
job=(ray job submit --address="$dashboard" -- env "${settings[@]}" bash -c 'cd "$1" && shift && exec "$@"' job "$PWD" "$@")
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${job[@]}"
  echo
  exit 0
fi
need_token
# the secret goes to that dashboard: to no proxy, and to no other cluster, which these would choose before --address
export no_proxy='*' NO_PROXY='*'
unset RAY_ADDRESS RAY_API_SERVER_ADDRESS
exec "${job[@]}"
