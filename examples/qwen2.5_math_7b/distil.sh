#!/usr/bin/env bash
# The data of SimpleRL's first stage: a teacher answers the 8K problems through the engine and grader of every evaluation,
# and distil.py keeps the long, right ones.
#   distil.sh TEACHER [option of eval/run.py...]        with DRY_RUN=1 the commands are printed and nothing starts
# A large teacher takes hours for one part of long responses, which the deadline allows for. A 32B in BF16 has 65 GB of
# weights: two GPUs of 80 GB hold them beside 19 sequences of full length. Options behind the teacher override these.
# A teacher ends by its own end of sequence: the seed protocol's stop strings, which are Qwen2.5's, are left out.
set -euo pipefail
if [ $# -eq 0 ]; then
  echo >&2 "distil.sh: no teacher; usage: distil.sh TEACHER [option of eval/run.py...]"
  exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
run=()
[ -z "${DRY_RUN:-}" ] || run=(echo)
"${run[@]}" python eval/run.py --model "$1" --tasks data/math_lv3to5.jsonl --template chat --samples 4 --temperature 0.7 \
  --max-tokens 16000 --call-deadline-s 21600 --tensor 2 --kv-cache-mib 40960 --stop '' --output runs/teacher "${@:2}"
"${run[@]}" python "$here/distil.py" runs/teacher/samples_math_lv3to5.jsonl --output data/long_cot.jsonl
