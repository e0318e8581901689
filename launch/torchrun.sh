#!/usr/bin/env bash
# One process per stage under torchrun; rank 0's process also hosts the head and writes the video.
#   launch/torchrun.sh --image me.png --audio speech.wav --out me.mp4
# Several hosts: run it on each with NNODES, NODE_RANK and MASTER_ADDR set.
set -euo pipefail
exec python -m torch.distributed.run \
  --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" \
  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
  --nproc-per-node "${RANKS:-5}" --max-restarts 0 \
  -m liveavatar generate --launcher torchrun --config "${CONFIG:-configs/serve_5gpu.yaml}" "$@"
