#!/usr/bin/env bash
# All that a lent GPU should tell, within 560 seconds, the most wanted first. Each part has its own limit and writes its JSON row by
# row, so that a cut leaves what was done; a part whose JSON is complete is not run again. Nothing here needs more than 64 GB of GPU
# memory. Results go to $OUT (default bench/results): seven JSONs and a log.
#   LIVEAVATAR_COMMIT=$(git rev-parse --short HEAD) bash bench/gpu_all.sh    the JSONs' commit, where the machine has neither git nor history
#                                    PYTHON=python3 by default; BUDGET=560: less where an installation came before it
#   bash bench/gpu_all.sh --list     seconds and names of the parts, and their sum
#   SCALE=1 bash bench/gpu_all.sh    small models on a CPU, to show that it runs
# The lent machine has all that the parts import but diffusers, which decode wants: carry its wheel.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${OUT:-bench/results}" python="${PYTHON:-python3}" list="${1:-}" scale="${SCALE:-}" sum=0
end=$((SECONDS + ${BUDGET:-560}))
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
gpu="$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | sed 's/^NVIDIA //; s/[^A-Za-z0-9-]/-/g' | tr 'A-Z' 'a-z')"
gpu="${gpu:-cpu}"
part() { # seconds, name, command
  local limit="$1" name="$2" left=$((end - SECONDS)) status
  local json="$out/$name-$gpu.json"
  shift 2
  sum=$((sum + limit))
  if [ "$list" = --list ]; then echo "$limit $name"; return; fi
  if grep -q '"complete": true' "$json" 2>/dev/null; then echo "== $name: done before"; return; fi
  if [ "$left" -lt 10 ]; then echo "== $name: no time left" | tee -a "$out/gpu_all.log"; return; fi
  echo "== $name" | tee -a "$out/gpu_all.log"
  timeout -k 5 "$((limit < left ? limit : left))" "$python" "$@" --out "$json" 2>&1 | tee -a "$out/gpu_all.log"
  status="${PIPESTATUS[0]}"
  [ "$status" = 0 ] || echo "== $name: ended with $status" | tee -a "$out/gpu_all.log"
}
[ "$list" = --list ] || mkdir -p "$out"
wide=(--sizes 704x384) small=(--sizes 384x256) layer=()
if [ -n "$scale" ]; then wide=(--scale) small=(--scale) layer=(--width 256); fi
[ -n "$scale" ] ||
part  50 kernels       bench/kernel_times.py
part 140 step          bench/step.py   "${wide[@]}" --ways "all fp8" all eager plain "all fp8 attention" --repeat 5
part  70 decode        bench/decode.py "${wide[@]}" --ways "channels last + bytes" "compiled + bytes" plain --repeat 5
part  40 accuracy      bench/accuracy.py ${layer[@]+"${layer[@]}"}
part 100 step-alone    bench/step.py   "${wide[@]}" --ways "all fp8 cache" attention kernels fp8 "eager fp8" packed graphs --repeat 3
part  40 step-384x256  bench/step.py   "${small[@]}" --ways "all fp8" all plain --repeat 5
part 120 step-compiled bench/step.py   "${wide[@]}" --ways "all+compile fp8" "all+compile" compile --repeat 3
if [ "$list" = --list ]; then echo "$sum sum"; else ls -l "$out"/*"-$gpu.json"; fi
