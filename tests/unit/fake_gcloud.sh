#!/usr/bin/env bash
# Stands in for gcloud: records its words, keeps queued resources as files in $FAKE, and
# runs what is sent by ssh on "hosts", which are folders. Its folder has
#   calls/NUMBER    the words of each call, NUL between them
#   queue/NAME      states that describe answers one after the other; the last stays
#   born            the states that a created resource goes through; default ACTIVE
#   fail            lines like "create my-pod": that call fails, once for each line
#   host/NAME/      the home of a slice's host
#   exits           what the next started programs do: exit with that status, or `stay`
#   started/NUMBER  words of each started program; NUMBER.env its environment
set -euo pipefail

cd "$FAKE"
mkdir -p calls queue host started
printf '%s\0' "$@" >"calls/$(printf '%04d' "$(find calls -type f | wc -l)")"

[[ "$1 $2" == "compute tpus" ]]
kind=$3 verb=$4 name=${5-}
if [[ -s fail && $(head -n 1 fail) == "$verb ${name%%:*}" ]]; then
  sed -i 1d fail
  echo "ERROR: (gcloud.$verb) it is broken" >&2
  exit 1
fi

new_host() {
  local bin=$FAKE/host/$1/realm_retro/.venv/bin
  rm -rf "${FAKE:?}/host/$1"
  mkdir -p "$bin"
  echo stamp >"$bin/../installed-tpu"
  cat >"$bin/python" <<'PYTHON'
#!/usr/bin/env bash
[[ $1 != - ]] || { echo stamp && exit; }
number=$(find "$FAKE/started" -name '*.env' | wc -l)
printf '%s\0' "$@" >"$FAKE/started/$number"
env -0 >"$FAKE/started/$number.new"
mv "$FAKE/started/$number.new" "$FAKE/started/$number.env"
action=0
if [[ -s $FAKE/exits ]]; then
  action=$(head -n 1 "$FAKE/exits")
  sed -i 1d "$FAKE/exits"
fi
echo "program $number: $action"
[[ $action == stay ]] || exit "$action"
trap 'exit 143' TERM
for ((i = 0; i < 1200; i++)); do sleep 0.05; done # a minute at most, whatever happens
exit 99
PYTHON
  chmod +x "$bin/python"
}

case "$kind $verb" in
  "queued-resources describe")
    if [[ ! -s queue/$name ]]; then
      echo "ERROR: (gcloud.describe) NOT_FOUND: Resource '$name' was not found" >&2
      exit 1
    fi
    echo "a warning of gcloud's" >&2
    head -n 1 "queue/$name"
    [[ $(wc -l <"queue/$name") -le 1 ]] || sed -i 1d "queue/$name"
    ;;
  "queued-resources create")
    if [[ -e queue/$name ]]; then
      echo "ERROR: (gcloud.create) ALREADY_EXISTS: $name" >&2
      exit 1
    fi
    if [[ -s born ]]; then cp born "queue/$name"; else echo ACTIVE >"queue/$name"; fi
    new_host "$name"
    ;;
  "queued-resources delete")
    for pid in "host/$name"/realm_retro/jobs/*/pid; do
      [[ ! -s $pid ]] || kill -KILL -- "-$(<"$pid")" 2>/dev/null || true
    done
    rm "queue/$name"
    rm -rf "host/$name"
    ;;
  "queued-resources list")
    for file in queue/*; do
      echo "projects/p/locations/z/queuedResources/${file##*/}"
    done
    ;;
  "tpu-vm scp") cp "$5" "host/${6%%:*}/${6#*:}" ;;
  "tpu-vm ssh")
    echo "SSH: Attempting to connect to worker 0..." >&2
    command=""
    for word in "$@"; do
      [[ $word != --command=* ]] || command=${word#--command=}
    done
    cd "host/$name"
    HOME=$PWD exec bash -c "$command"
    ;;
  *)
    echo "ERROR: (gcloud) Invalid choice: '$kind $verb'" >&2
    exit 2
    ;;
esac
