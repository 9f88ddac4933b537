#!/usr/bin/env bash
# Makes .venv in the checkout and installs the project into it; does nothing when that is done, and mends what was interrupted.
# Versions are those of constraints.txt where Python and platform are those that it was made with, else the newest that fit.
# CONSTRAINTS=FILE takes another file, anywhere; CONSTRAINTS=none takes the newest. TORCH_INDEX=URL is searched for wheels too.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
stamp=.venv/.installed
want=$(cat pyproject.toml constraints.txt | cksum | tr ' ' -) # POSIX: not every system has sha256sum
if [ -x .venv/bin/python ]; then
    there=$(cat "$stamp" 2>/dev/null || true)
    [ "${there%% *}" != "$want" ] || [ "${CONSTRAINTS:-${there#* }}" != "${there#* }" ] || exit 0
fi

fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# What the packages took when this was last measured (Linux, x86-64, torch with its CUDA libraries), rounded up.
download_gb=3.4
disk_gb=7
need_gb=${VILADIFF_SETUP_GB:-14}
echo "setup: installs into .venv: about $download_gb GB to download (less what pip has cached), about $disk_gb GB on disk. This takes some minutes."

command -v "$PYTHON" >/dev/null || fail "no '$PYTHON' on the path; name an interpreter: make setup PYTHON=/path/to/python3.11"
version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "'$PYTHON' does not run"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "'$PYTHON' is Python $version; 3.11 or newer is needed: make setup PYTHON=/path/to/python3.11"

constraints=${CONSTRAINTS:-constraints.txt}
[ "$constraints" = none ] || [ -f "$constraints" ] || fail "CONSTRAINTS=$constraints: no such file; name one, or write none"

free_gb() { df -Pk "$1" | awk 'NR == 2 { print int($4 / 1048576) }'; }
have_gb=$(du -sk .venv 2>/dev/null | awk '{ print int($1 / 1048576) }' || true)
need_gb=$((need_gb - ${have_gb:-0}))
[ "$need_gb" -ge 1 ] || need_gb=1
[ "$(free_gb .)" -ge "$need_gb" ] ||
    fail "$(free_gb .) GB free in $PWD, $need_gb GB needed (packages, their downloads and pip's cache)." \
        "Free some, or, if PIP_NO_CACHE_DIR or TMPDIR put the downloads elsewhere, set VILADIFF_SETUP_GB=$((disk_gb + 1))."
[ "$(free_gb "${TMPDIR:-/tmp}")" -ge 4 ] || [ "${have_gb:-0}" -ge 6 ] ||
    fail "$(free_gb "${TMPDIR:-/tmp}") GB free in ${TMPDIR:-/tmp}, where pip unpacks 4 GB; point TMPDIR elsewhere."

rm -f "$stamp"
if .venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "setup: .venv is there but not complete or not up to date; mending it"
else
    "$PYTHON" -m venv --clear .venv || fail "could not make .venv (on Debian: apt-get install python3-venv)"
fi
here=$(.venv/bin/python -c 'import platform as p, sys; print("%d.%d" % sys.version_info[:2], p.system(), p.machine())')
made=$(sed -n 's/^# made with: //p' constraints.txt)
if [ -z "${CONSTRAINTS:-}" ] && [ "$here" != "$made" ]; then
    echo "setup: constraints.txt is of Python $made, here is $here: the newest versions that fit are installed, with which a" \
        "published run may not repeat bit for bit. CONSTRAINTS=constraints.txt installs those of the file all the same."
    constraints=none
fi
pinned=()
[ "$constraints" = none ] || pinned=(-c "$constraints")
[ -z "${TORCH_INDEX:-}" ] || pinned+=(--extra-index-url "$TORCH_INDEX")
.venv/bin/python -m pip install --disable-pip-version-check --progress-bar off ${pinned[@]+"${pinned[@]}"} -e '.[dev]' |
    while IFS= read -r line; do
        case $line in
        "Collecting "*) line=${line#Collecting } && echo "  fetching ${line%%[!A-Za-z0-9_.-]*}" ;;
        "Installing collected packages:"*) echo "  unpacking, the longest part" ;;
        esac
    done ||
    fail "pip failed, see above. Without a connection the same command goes on later; where a version is not to be had," \
        "CONSTRAINTS=none takes the newest that fit."
.venv/bin/python -c 'import pydantic, timm, torch, torchvision' || fail "the installed packages do not import; remove .venv and try again"
echo "$want $constraints" >"$stamp"
echo "setup: done"
