#!/usr/bin/env bash
# Training on a lent GPU, in calls of at most 560 seconds. Results go to $OUT (default bench/results): JSON row by row, a log, weights.
#   bash bench/gpu_train.sh 14b        20 steps of the 14B recipe, random weights, 384x256: does memory hold, does the loss move
#   bash bench/gpu_train.sh tiny192    teacher, forcing, consistency, dmd of configs/train_tiny192.yaml; again until it says all done
#   bash bench/gpu_train.sh --list     seconds and names of the parts of 14b, and their sum
#   SCALE=1 bash bench/gpu_train.sh 14b | tiny192     toys on a CPU, to show that it runs
# PYTHON=python3, BUDGET=560 by default. The lent machine lacks wheels of av and diffusers: carry them.
# tiny192, before: the stages data, vae, decoder, text, visemes and latents at home (codec and clips are made there: pictures do not travel);
# `touch runs/tiny192/text.done`, bench/carried.py shards and out, see there. A few calls of `true` take four shards each along, then
#   carry runs/tiny192-gpu/carried and visemes, bash bench/gpu_train.sh tiny192       call after call: a machine kept warm keeps what it made
# After: bench/carried.py in FILES runs/tiny192 at home, and there choose, lids, painter, lips and export. BUDGET=0 brings what is still to come.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${OUT:-bench/results}" python="${PYTHON:-python3}" scale="${SCALE:-}" run="${RUN:-runs/tiny192-gpu}" sum=0
end=$((SECONDS + ${BUDGET:-560}))
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
gpu="$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | sed 's/^NVIDIA //; s/[^A-Za-z0-9-]/-/g' | tr 'A-Z' 'a-z')"
gpu="${gpu:-cpu}" list="${1:-}"
say() { echo "== $*" | tee -a "$out/gpu_train.log"; }
limited() { # seconds, command: within what is left, its output in the log too
  local limit="$1" left=$((end - SECONDS))
  shift
  [ "$left" -ge 10 ] || return 124
  timeout -k 5 "$((limit < left ? limit : left))" "$python" "$@" 2>&1 | tee -a "$out/gpu_train.log"
  return "${PIPESTATUS[0]}"
}
part() { # seconds, name, command
  local limit="$1" json="$out/$2-$gpu.json" name="$2"
  shift 2
  sum=$((sum + limit))
  if [ "$list" = --list ]; then echo "$limit $name"; return; fi
  if grep -q '"complete": true' "$json" 2>/dev/null; then say "$name: done before"; return; fi
  say "$name"
  limited "$limit" "$@" --out "$json" || say "$name: ended with $?"
}
billions() {
  local tiny=()
  [ -z "$scale" ] || tiny=(--tiny)
  part 200 train-14b-forcing bench/train_step.py --stage forcing --steps 20 ${tiny[@]+"${tiny[@]}"}
  part 340 train-14b-dmd     bench/train_step.py --stage dmd     --steps 20 ${tiny[@]+"${tiny[@]}"}
}
tiny192() {
  local config=configs/train_tiny192.yaml more=(choose=null lids=null lips=null export.stage=dmd "run=$run") stage all=done
  if [ -n "$scale" ]; then # the micro recipe on clips of noise
    config=configs/train_micro.yaml more+=(text=null visemes=null forcing.model.audio_dim=400)
    "$python" - "$run" <<'CLIPS'
import sys, pathlib
sys.path.insert(0, "bench")
from train_step import TINY, dataclasses, random_clips
random_clips(pathlib.Path(sys.argv[1]), dataclasses.replace(TINY, audio_dim=400, audio_layers=1), 32, 32, 9, 3)
CLIPS
  fi
  [ ! -d "$run/carried" ] || "$python" bench/carried.py in "$run/carried" "$run"
  for stage in teacher forcing consistency dmd; do
    if [ -e "$run/$stage.done" ]; then say "$stage: done before"; continue; fi
    say "$stage"
    if limited 9999 -m liveavatar train "$stage" --config "$config" "$stage.loop.checkpoint_seconds=60" "${more[@]}"; then
      touch "$run/$stage.done"
    else
      say "$stage: ended with $?, the next call goes on with it"
      all=rest
      break
    fi
  done
  "$python" bench/carried.py out "$run" "$out/weights" | tee -a "$out/gpu_train.log"
  say "$all"
}
case "$list" in
  --list) billions; echo "$sum sum" ;;
  14b) mkdir -p "$out"; billions ;;
  tiny192) mkdir -p "$out"; tiny192 ;;
  *) sed -n '2,8p' "$0"; exit 2 ;;
esac
