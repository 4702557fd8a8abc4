#!/usr/bin/env bash
# Installs everything into .venv and runs RETRO, from text to samples, and then REALM,
# from text to questions that are answered with evidence.
#
#   launch/quickstart.sh [WORKDIR] [--config.section.name=value ...]
#
# WORKDIR (default: quickstart/ in the repository) takes all that the run writes; REALM's
# half is in WORKDIR/realm. Run the same command again to resume what was cut off, or to
# see the results again. Other text is one command away:
#
#   launch/quickstart.sh my_run --config.corpus.source=text_files \
#     --config.corpus.path=my_documents
#
# Flags of the section corpus go to both halves, those of passages, spans, init,
# pretrain, ict, qa, retrieval and refresh to REALM's, all others to RETRO's. Your own
# text comes with no questions: REALM's half then ends after pre-training, unless
# --config.qa.questions=FILE.jsonl (fields question and answers) brings some.
#
# With --config=FILE that config alone is run, in WORKDIR, with all flags:
#
#   launch/quickstart.sh my_run/realm --config=configs/realm/quickstart.py \
#     --config.train.batch_size=8
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

# Which half a word goes to; one that is no flag is the value of the flag before it.
one_config=no
to=both
retro=()
realm=()
for word in "$@"; do
  case $word in
    --config | --config=* | -config | -config=*) one_config=yes ;;
    -*config.corpus.*) to=both ;;
    -*config.passages.* | -*config.spans.* | -*config.init.* | -*config.pretrain.* | \
      -*config.ict.* | -*config.qa.* | -*config.retrieval.* | -*config.refresh.*)
      to=realm
      ;;
    -*config.*) to=retro ;;
    -*) to=both ;;
  esac
  [[ $to == realm ]] || retro+=("$word")
  [[ $to == retro ]] || realm+=("$word")
done

environment quickstart
# The caller's folder may hold a jax/ or a flax.py: keep it off the import path.
export PYTHONSAFEPATH=1
stages=("$venv/bin/python" -m realm_retro.cli.quickstart)

if [[ $one_config == yes ]]; then
  exec "${stages[@]}" --workdir="$workdir" "$@"
fi

# In the background, so that a signal to this script is passed on at once.
"${stages[@]}" --config="$root/configs/retro/quickstart.py" --workdir="$workdir" \
  ${retro[@]+"${retro[@]}"} &
half=$!
trap 'kill "$half" 2>/dev/null || true' INT TERM
status=0
wait "$half" || status=$?
# A signal ends `wait` before it ends the process.
while kill -0 "$half" 2>/dev/null; do
  status=0
  wait "$half" || status=$?
done
trap - INT TERM
[[ $status -eq 0 ]] || exit "$status"

exec "${stages[@]}" --config="$root/configs/realm/quickstart.py" \
  --workdir="$workdir/realm" ${realm[@]+"${realm[@]}"}
