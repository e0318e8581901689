#!/usr/bin/env bash
# The packages of a serving image, each with the SHA-256 of every file that may be it (pip and uv then install nothing else), and what is known against them.
#   launch/lock.sh out/serve.lock
# In the image, as a user without rights: uv pip install --require-hashes -r serve.lock && uv pip install --no-deps .
# EXTRAS: of setup.py. TORCH: the backend uv takes torch from, e.g. cpu or cu130; unset: the index's own build, for GPUs. AUDIT: options
# for pip-audit, which asks PyPI about each package and ends with status 1 where a hole is known; AUDIT=no asks nobody.
set -euo pipefail
cd "$(dirname "$0")/.."
lock="${1:?name the file to write, e.g. out/serve.lock}"
uv="$(command -v uv || echo .venv/bin/uv)"
mkdir -p "$(dirname "$lock")"
# triton in constraints.txt is that of our kernels on a machine without a GPU: torch for GPUs names its own
"$uv" pip compile setup.py $(printf -- '--extra %s ' ${EXTRAS:-serve talk}) --constraint <(grep -v '^triton==' constraints.txt) \
  ${TORCH:+--torch-backend "$TORCH"} --python-version 3.11 --python-platform linux --generate-hashes --no-annotate --no-header --quiet --output-file "$lock"
echo "$lock: $(grep -c '^[a-z].*==' "$lock") packages, $(grep -c 'sha256:' "$lock") hashes"
test "${AUDIT:-}" = no || "$uv" tool run pip-audit --disable-pip --require-hashes --requirement "$lock" ${AUDIT:-}
