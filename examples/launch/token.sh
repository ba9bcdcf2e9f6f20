# shellcheck shell=bash
# Sourced by the others: one secret for head, workers, driver and submission, in a file that its owner alone may read.
# Never on a command line, where every user of the machine sees it. A cluster without it runs anybody's code.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/megatron_rl_token}"

# make_token: where there is none yet. Another node needs the same file: a shared home has it, else copy it there.
make_token() {
  if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
    (
      umask 077
      mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
      od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH"
    )
    echo "made the cluster's token: $RAY_AUTH_TOKEN_PATH"
  fi
}

# need_token: what a node that joins must have.
need_token() {
  if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
    echo >&2 "$0: no token in $RAY_AUTH_TOKEN_PATH: ray_head.sh makes it on the head; copy it here (scp -p), or set" \
      "RAY_AUTH_TOKEN_PATH to where it is"
    exit 2
  fi
  local mode
  mode=$(stat -L -c %a "$RAY_AUTH_TOKEN_PATH")
  if [ "$mode" != 600 ] && [ "$mode" != 400 ]; then
    echo >&2 "$0: $RAY_AUTH_TOKEN_PATH must be readable by its owner alone, its mode is $mode: chmod 600 it, and make a new" \
      "one if others may have read it"
    exit 2
  fi
}
