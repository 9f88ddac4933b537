#!/usr/bin/env bash
# Times steps of ViLaDiff, UniMatch V2 and supervised on this machine's GPU, eager and compiled, at scales paper and strong.
# At most 12 minutes; the table goes to stdout and, with OUT=FOLDER, to FOLDER/gpu_check.md. Options: benchmarks/gpu_check.py.
set -uo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
if [ -n "${OUT:-}" ]; then
    timeout -k 5 715 "$python" benchmarks/gpu_check.py "$@" | tee "$OUT/gpu_check.md"
else
    timeout -k 5 715 "$python" benchmarks/gpu_check.py "$@"
fi
