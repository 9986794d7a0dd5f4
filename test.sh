#!/bin/sh
# Run every test that needs no GPU (ring 0), and say where rings 1 and 2 stand. It makes its own
# environments. `./test.sh --help` lists the options; tests/README.md explains the rings. PYTHON
# chooses the interpreter that the tests run on (3.10 to 3.14).
set -eu
cd -- "$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)"
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; raise SystemExit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: $python is no Python 3.10 or newer" >&2
    echo "  -> install one (Debian, Ubuntu: apt-get install python3 python3-venv), or name it: PYTHON=/path/to/python3 ./test.sh" >&2
    exit 1
fi
exec "$python" -m tests.rings "$@"
