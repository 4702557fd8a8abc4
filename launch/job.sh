#!/usr/bin/env bash
# One background job of this machine: start it, ask for it, end it.
#
#   launch/job.sh install EXTRA [COMMAND]   runs the shell command COMMAND, then makes
#                                           .venv with that extra of the package
#   launch/job.sh start NAME PROGRAM [ARGUMENT ...]
#   launch/job.sh state NAME                none, running, exited STATUS (by itself),
#                                           stopped STATUS (by `stop`) or lost
#   launch/job.sh stop NAME [SECONDS]       SIGTERM; SIGKILL after SECONDS (300)
#   launch/job.sh logs NAME [LINES] [--follow]
#   launch/job.sh idle                      fails while any job is running
#
# A job outlives the terminal that started it. jobs/NAME in the repository holds its log,
# to which every start appends. Linux only; launch/tpu_pod.sh calls this on each host.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=launch/environment.sh
source "$here/environment.sh"
jobs=$root/jobs

# Whoever holds the lock lives: no process number that the system may have given anew.
running() {
  [[ -e $jobs/$1/lock ]] && ! flock --nonblock "$jobs/$1/lock" true
}

state() {
  local folder=$jobs/$1 word=exited what=none
  [[ ! -e $folder/stopping ]] || word=stopped
  if running "$1"; then
    what=running
  elif [[ -s $folder/status ]]; then
    what="$word $(<"$folder/status")"
  elif [[ -s $folder/pid ]]; then
    what=lost # with the machine, or its supervisor was killed too
  fi
  echo "job $1: $what (on $(uname -n))"
}

start() {
  local name=$1 tries
  shift
  [[ $# -gt 0 ]] || die "start $name: no program to start; see launch/job.sh --help"
  mkdir -p "$jobs/$name"
  exec 9>>"$jobs/$name/lock"
  # Not at once: `state` of somebody else may hold it for a moment.
  flock --timeout 5 9 ||
    die "start $name: it is running already; launch/job.sh stop $name ends it"
  rm -f "$jobs/$name"/{pid,status,stopping}
  cd "$root"
  # A session of its own, and none of our streams: nothing ties it to this terminal.
  setsid "$here/job.sh" supervise "$name" "$@" \
    >>"$jobs/$name/log" 2>&1 </dev/null &
  exec 9>&-
  for ((tries = 0; tries < 100; tries++)); do
    [[ ! -s $jobs/$name/pid ]] || break
    sleep 0.1
  done
  state "$name"
}

# Its process and the job inherit the lock, so that it is held while one of them lives.
supervise() {
  local folder=$jobs/$1 code=0
  shift
  echo "== $(date -u '+%Y-%m-%d %H:%M:%S') UTC: $(printf ' %q' "$@")"
  setsid "$@" & # the leader of a process group, which `stop` can end as a whole
  echo $! >"$folder/pid"
  wait $! || code=$?
  echo "== $(date -u '+%Y-%m-%d %H:%M:%S') UTC: exit status $code"
  echo "$code" >"$folder/status.new"
  mv "$folder/status.new" "$folder/status"
}

stop() {
  local name=$1 seconds=${2:-300} pid waited
  [[ $seconds =~ ^[0-9]+$ ]] ||
    die "stop $name $seconds: give whole seconds to wait before SIGKILL"
  if running "$name"; then
    touch "$jobs/$name/stopping"
    pid=$(<"$jobs/$name/pid")
    kill -TERM "$pid" 2>/dev/null || true
    for ((waited = 0; waited < 5 * seconds; waited++)); do
      running "$name" || break
      sleep 0.2
    done
    if running "$name"; then
      echo "job $name: killed, it had not ended within $seconds s (on $(uname -n))"
      kill -KILL -- "-$pid" 2>/dev/null || true
      for ((waited = 0; waited < 50; waited++)); do
        running "$name" || break
        sleep 0.2
      done
    fi
  elif [[ -d $jobs/$name ]]; then
    touch "$jobs/$name/stopping" # whoever watches must not start it again
  fi
  state "$name"
}

logs() {
  local name=$1 lines=${2:-100} follow=${3-}
  [[ -e $jobs/$name/log ]] || die "logs $name: no such job was started here"
  if [[ $follow == --follow ]]; then
    exec tail -n "$lines" -F "$jobs/$name/log"
  fi
  tail -n "$lines" "$jobs/$name/log"
}

idle() {
  local folder
  for folder in "$jobs"/*/; do
    [[ -d $folder ]] || continue
    folder=${folder%/}
    ! running "${folder##*/}" ||
      die "${folder##*/} is running on $(uname -n); stop it first"
  done
}

install_environment() {
  local extra=$1 command=${2-} python
  cd "$root"
  rm -f .ready
  [[ -z $command ]] || bash -euo pipefail -c "$command"
  if [[ -z ${PYTHON-} ]]; then
    # The system's own python3 is too old on many machine images.
    for python in python3 python3.13 python3.12 python3.11; do
      if "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' \
        2>/dev/null; then
        export PYTHON=$python
        break
      fi
    done
  fi
  if [[ -z ${PYTHON-} ]] && command -v apt-get >/dev/null; then
    echo "Installing python3.11 with apt-get: python3 here is older"
    sudo apt-get update -qq
    sudo DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
      python3.11 python3.11-venv >/dev/null
    export PYTHON=python3.11
  fi
  environment "$extra"
  touch .ready
}

case ${1-} in
  -h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
    exit 0
    ;;
  idle) [[ $# -eq 1 ]] || die "idle takes no argument" ;;
  start | state | stop | logs | supervise)
    [[ ${2-} =~ ^[a-z][a-z0-9-]*$ ]] ||
      die "$1 ${2-}: give the job a name of small letters, digits and hyphens"
    ;;
  install) [[ -n ${2-} ]] || die "install: name an extra of the package, such as tpu" ;;
  *) die "${1:-no command}: use install, start, state, stop, logs or idle (--help)" ;;
esac
[[ $1 != install ]] || { shift && set -- install_environment "$@"; }
"$@"
