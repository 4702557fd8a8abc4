#!/usr/bin/env bash
# Installs everything into .venv and runs RETRO end to end, from text to samples.
#
#   launch/quickstart.sh [WORKDIR] [--config.section.name=value ...]
#
# WORKDIR (default: quickstart/ in the repository) takes all that the run writes. Run
# the same command again to resume what was cut off, or to see the results again.
# Flags go to every stage, so that other text is one command away:
#
#   launch/quickstart.sh my_run --config.corpus.source=text_files \
#     --config.corpus.path=my_documents
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=launch/environment.sh
source "$here/environment.sh"

case ${1-} in
  -h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac

workdir=$root/quickstart
if [[ $# -gt 0 && $1 != -* ]]; then
  workdir=$1
  shift
fi
config=(--config="$root/configs/retro/quickstart.py")
for flag in "$@"; do
  case $flag in --config | --config=*) config=() ;; esac
done

environment quickstart
# The caller's folder may hold a jax/ or a flax.py: keep it off the import path.
export PYTHONSAFEPATH=1
exec "$venv/bin/python" -m realm_retro.cli.quickstart \
  ${config[@]+"${config[@]}"} --workdir="$workdir" "$@"
