#!/usr/bin/env bash
# Installs the test extra into .venv and runs the tests, one process for each core.
#
#   launch/test.sh [PYTEST ARGUMENTS]     e.g. -m slow, or tests/unit -x
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=launch/environment.sh
source "$here/environment.sh"

environment test
cd "$root"
# All tests of a file in one process: they share what is slow to make.
exec "$venv/bin/python" -m pytest -n auto --dist loadfile "$@"
