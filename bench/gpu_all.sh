#!/usr/bin/env bash
# All that a lent GPU should tell, within 560 seconds, the most wanted first. Each part has its own limit and writes its JSON row by
# row: a cut leaves what was done, a way that fails is a row that says why, and where it took the GPU with it (an illegal access, a crash)
# the part goes on in another process. What is in a JSON already is not measured again. All but the last chain fit a GPU of 80 GB.
# Results go to $OUT (default bench/results): JSONs and a log, eight files at most, as no more come back.
#   LIVEAVATAR_COMMIT=$(git rev-parse --short HEAD) bash bench/gpu_all.sh    the JSONs' commit, where the machine has neither git nor history
#                                    PYTHON=python3 by default; BUDGET=560: less where an installation came before it
#   bash bench/gpu_all.sh --list     seconds and names of the parts, and their sum
#   SCALE=1 bash bench/gpu_all.sh    small models on a CPU, to show that it runs; SCALE=4: with four times the seconds, on a busy one
# The lent machine has all that the parts import but diffusers, which decode wants: carry its wheel.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${OUT:-bench/results}" python="${PYTHON:-python3}" list="${1:-}" scale="${SCALE:-}" sum=0
end=$((SECONDS + ${BUDGET:-560} * ${scale:-1}))
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
gpu="$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | sed 's/^NVIDIA //; s/[^A-Za-z0-9-]/-/g' | tr 'A-Z' 'a-z')"
gpu="${gpu:-cpu}"
part() { # seconds, name of its JSON (of tests there is none), command
  local limit=$(($1 * ${scale:-1})) name="$2" stop left status
  shift 2
  sum=$((sum + limit))
  if [ "$list" = --list ]; then echo "$limit $name"; return; fi
  [ "$1" = -m ] || set -- "$@" --resume --out "$out/$name-$gpu.json"
  stop=$((SECONDS + limit < end ? SECONDS + limit : end))
  for _ in 1 2 3 4; do
    left=$((stop - SECONDS))
    if [ "$left" -lt 10 ]; then echo "== $name: no time left" | tee -a "$out/gpu_all.log"; return; fi
    echo "== $name" | tee -a "$out/gpu_all.log"
    timeout -k 5 "$left" "$python" "$@" 2>&1 | tee -a "$out/gpu_all.log"
    status="${PIPESTATUS[0]}"
    case "$status" in 0) return ;; esac
    echo "== $name: ended with $status" | tee -a "$out/gpu_all.log"
    case "$status" in 75 | 134 | 136 | 139) ;; *) return ;; esac # the GPU was lost, or the process crashed: another one goes on
  done
}
[ "$list" = --list ] || mkdir -p "$out"
wide=(--sizes 704x384) small=(--sizes 384x256) toy=() layer=()
if [ -n "$scale" ]; then wide=(--scale) small=(--scale) toy=(--scale) layer=(--width 256); fi
[ -n "$scale" ] ||
part  40 kernels  bench/kernel_times.py
part 100 step     bench/step.py   "${wide[@]}" --ways all "all fp8" eager plain --repeat 5
part 115 chain    bench/chain.py  ${toy[@]+"${toy[@]}"} --ways fp8 --blocks 8
part  60 decode   bench/decode.py "${wide[@]}" --ways "channels last + bytes" "channels last + bytes, unsearched" plain "compiled + bytes" --repeat 5
part  35 tests    -m pytest -q -m gpu tests/test_gpu.py tests/test_beside.py
part  40 accuracy bench/accuracy.py ${layer[@]+"${layer[@]}"}
part  40 chain    bench/chain.py  ${toy[@]+"${toy[@]}"} --ways bf16 --steps 4 --decode after --blocks 8
part  60 step     bench/step.py   "${wide[@]}" --ways "all fp8 attention" "all fp8 cache" attention kernels fp8 packed graphs --repeat 3
part  30 step     bench/step.py   "${small[@]}" --ways all "all fp8" plain --repeat 5
part  40 step     bench/step.py   "${wide[@]}" --ways "all+compile fp8" "all+compile" compile --repeat 3
if [ "$list" = --list ]; then echo "$sum sum"; else ls -l "$out"/*"-$gpu.json"; fi
