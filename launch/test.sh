#!/usr/bin/env bash
# Installs the test extra into .venv and runs the tests.
#
#   launch/test.sh [PYTEST ARGUMENTS]     e.g. -m slow, or tests/unit -x
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=launch/environment.sh
source "$here/environment.sh"

environment test
cd "$root"
exec "$venv/bin/python" -m pytest "$@"
