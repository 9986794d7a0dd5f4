#!/bin/sh
# Make the patched vLLM wheel: a thin front for `python -m stack wheel`. `./build.sh --help` lists
# the options. PYTHON chooses the interpreter that runs the tool (3.10 or newer).
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

fits() {
    "$1" -c 'import sys; raise SystemExit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ]; then
    tried=$PYTHON
else
    tried="python3 python3.14 python3.13 python3.12 python3.11 python3.10 python"
fi
for python in $tried; do
    if fits "$python"; then
        exec "$python" "$root/stack/bootstrap.py" wheel "$@"
    fi
done
echo "error: no Python 3.10 or newer: tried $tried" >&2
echo "  -> install one (Debian, Ubuntu: apt-get install python3 python3-venv), or name it: PYTHON=/path/to/python3 ./build.sh" >&2
exit 1
