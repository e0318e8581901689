#!/usr/bin/env bash
# All that a lent GPU should tell, in about ten minutes, the most wanted first: each part has its own limit and writes its own
# JSON, so that an early end loses little. Results go to $OUT (default bench/results).
#   bash bench/gpu_all.sh            PYTHON=python3 by default
set -uo pipefail
cd "$(dirname "$0")/.."
out="${OUT:-bench/results}"
python="${PYTHON:-python3}"
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
part() { # seconds, name, command
  local limit="$1" name="$2"; shift 2
  echo "== $name"
  timeout "$limit" "$@" 2>&1 | tee -a "$out/gpu_all.log" || echo "== $name: ended with ${PIPESTATUS[0]}" | tee -a "$out/gpu_all.log"
}
gpu="$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | sed 's/.* //; s/[^A-Za-z0-9-]/-/g' | tr 'A-Z' 'a-z')"
part 60  "does every kernel run and agree"  "$python" bench/kernel_times.py --out "$out/kernels-$gpu.json"
part 150 "step, the figures that count"     "$python" bench/step.py --sizes 704x384 --ways plain eager all "all fp8" --repeat 5 --out "$out/step-$gpu.json"
part 40  "accuracy"                         "$python" bench/accuracy.py --out "$out/accuracy-$gpu.json"
part 90  "decode"                           "$python" bench/decode.py --sizes 704x384 --repeat 5 --out "$out/decode-$gpu.json"
part 150 "step, each optimisation alone"    "$python" bench/step.py --sizes 704x384 --ways kernels packed attention graphs fp8 "eager fp8" --repeat 3 --out "$out/step-alone-$gpu.json"
part 60  "step, small picture"              "$python" bench/step.py --sizes 384x256 --ways plain all "all fp8" --repeat 5 --out "$out/step-384x256-$gpu.json"
part 120 "step, compiled"                   "$python" bench/step.py --sizes 704x384 --ways compile "all+compile" "all+compile fp8" --repeat 3 --out "$out/step-compiled-$gpu.json"
ls -l "$out"/*"$gpu"*
