#!/usr/bin/env bash
# A training stage with one process per GPU:  CONFIG=configs/train_s2v14b.yaml RANKS=8 launch/train_torchrun.sh dmd
# Further arguments are settings, e.g. dmd.loop.strategy=deepspeed. Run it in the repository; on several hosts run it on
# each with NNODES, NODE_RANK and MASTER_ADDR set, over a file system they share. It resumes where it was stopped.
set -euo pipefail
PYTHON="${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)}"
exec "$PYTHON" -m torch.distributed.run \
  --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" \
  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
  --nproc-per-node "${RANKS:-8}" --max-restarts "${RESTARTS:-3}" \
  -m liveavatar train "${1:-all}" --config "${CONFIG:-configs/train_s2v14b.yaml}" "${@:2}"
