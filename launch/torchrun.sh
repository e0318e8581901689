#!/usr/bin/env bash
# One process per stage under torchrun; rank 0's process also hosts the head and writes the video.
#   launch/torchrun.sh --image me.png --audio speech.wav --out me.mp4
# CONFIG: its stages number NNODES x RANKS. RANKS: processes on each host. Run it in the repository.
# Several hosts: run it on each with NNODES, NODE_RANK, RANKS and MASTER_ADDR set.
set -euo pipefail
PYTHON="${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)}"
exec "$PYTHON" -m torch.distributed.run \
  --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" \
  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
  --nproc-per-node "${RANKS:-5}" --max-restarts 0 \
  -m liveavatar generate --launcher torchrun --config "${CONFIG:-configs/serve_5gpu.yaml}" "$@"
