#!/usr/bin/env bash
# Installs the test extra into .venv and runs the tests, one process more than cores.
#
#   launch/test.sh [PYTEST ARGUMENTS]     e.g. -m slow, or tests/unit -x
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=launch/environment.sh
source "$here/environment.sh"

environment test
cd "$root"
# One more than cores, because tests wait for other processes and for the disk.
processes=$("$venv/bin/python" -c 'import os; print(os.cpu_count() + 1)')
# All tests of a file in one process: they share what is slow to make.
exec "$venv/bin/python" -m pytest -n "$processes" --dist loadfile "$@"
