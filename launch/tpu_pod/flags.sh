# shellcheck shell=bash
# shellcheck disable=SC2034  # the files that are sourced beside this one read them
# Sourced by launch/tpu_pod.sh: its options, checked before anything is asked of gcloud.

command="" name="" zone="" project="" accelerator="" runtime="" worker_accelerator=""
setup_command="" spot=no follow=no watch=yes dry_run=no packed=no
workers=0 poll=60 max_failures=10 grace=300 lines=100 host=0 log_job=train
variables=() create_flags=() connect_flags=() train_flags=()

# parse ARGUMENTS: fills the variables above, and `slices`, `place` and `archive`.
parse() {
  case ${1-} in
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[1]}"
      exit 0
      ;;
    create | setup | run | status | logs | stop | delete) command=$1 ;;
    "") die "no command; use create, setup, run, status, logs, stop or delete (--help)" ;;
    *) die "$1: no command; use create, setup, run, status, logs, stop or delete (--help)" ;;
  esac
  shift
  while [[ $# -gt 0 ]]; do
    case $1 in
      --)
        shift
        train_flags=("$@")
        break
        ;;
      --*) option "$1" ;;
      *)
        [[ -z $name ]] ||
          die "$1: a second name, after $name; the training's flags come after a --"
        name=$1
        ;;
    esac
    shift
  done
  check_place
  check_slices
  check_flags
}

option() {
  local flag=${1%%=*} value=${1#*=}
  case $1 in
    --spot) spot=yes ;;
    --follow) follow=yes ;;
    --no-watch) watch=no ;;
    --dry-run) dry_run=yes ;;
    --zone=*) zone=$value ;;
    --project=*) project=$value ;;
    --accelerator=*) accelerator=$value ;;
    --runtime=*) runtime=$value ;;
    --worker-accelerator=*) worker_accelerator=$value ;;
    --setup-command=*) setup_command=$value ;;
    --workers=*) workers=$(whole "$1" 0 1000) ;;
    --poll=*) poll=$(whole "$1" 0 86400) ;;
    --max-failures=*) max_failures=$(whole "$1" 1 100000) ;;
    --grace=*) grace=$(whole "$1" 0 86400) ;;
    --lines=*) lines=$(whole "$1" 1 1000000) ;;
    --host=*)
      host=$value
      [[ $value == all ]] || host=$(whole "$1" 0 100000)
      ;;
    --job=*)
      [[ $value =~ ^(train|worker-(0|[1-9][0-9]*))$ ]] ||
        die "$1: give train, worker-0, worker-1, ..."
      log_job=$value
      ;;
    --env=*)
      [[ $value =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] ||
        die "$1: give --env=NAME=VALUE, NAME of letters, digits and underscores"
      variables+=("$value")
      ;;
    --create-flag=* | --connect-flag=*)
      [[ $value == --?* ]] || die "$1: give a flag of gcloud, as in $flag=--network=mine"
      if [[ $flag == --create-flag ]]; then
        create_flags+=("$value")
      else
        connect_flags+=("$value")
      fi
      ;;
    --zone | --project | --accelerator | --runtime | --worker-accelerator | \
      --setup-command | --workers | --poll | --max-failures | --grace | --lines | \
      --host | --job | --env | --create-flag | --connect-flag)
      die "$1: has no value; write $1=VALUE"
      ;;
    --config | --config=* | --config.* | --workdir | --workdir=*)
      die "$1: a flag of the training; those come after a --"
      ;;
    *) die "$1: no such option; launch/tpu_pod.sh --help lists them" ;;
  esac
}

# whole --FLAG=VALUE LEAST MOST: the value; in a subshell, hence no arithmetic on it.
whole() {
  local value=${1#*=}
  [[ $value =~ ^(0|[1-9][0-9]{0,6})$ && $value -ge $2 && $value -le $3 ]] ||
    die "$1: give a whole number from $2 to $3"
  echo "$value"
}

check_place() {
  [[ -n $name ]] || die "$command: no name; write $command NAME --zone=ZONE"
  # Names of workers are longer, by -worker- and a number.
  [[ $name =~ ^[a-z][-a-z0-9]{0,49}$ && $name != *- ]] ||
    die "$name: not a name for a slice; use up to 50 small letters, digits and hyphens," \
      "beginning with a letter"
  [[ -n $zone ]] ||
    die "$command: no --zone; give one that has your TPU type, as in --zone=us-west4-a"
  [[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] ||
    die "--zone=$zone: not a zone; give one as in --zone=us-west4-a (all:" \
      "gcloud compute tpus locations list)"
  place=("--zone=$zone")
  if [[ -n $project ]]; then
    [[ $project =~ ^[a-z][-a-z0-9.:]+$ ]] ||
      die "--project=$project: not a project's ID; see gcloud projects list"
    place+=("--project=$project")
  fi
  archive=${XDG_CACHE_HOME:-$HOME/.cache}/realm_retro/$name.tar.gz
}

check_slices() {
  local i
  slices=("$name")
  for ((i = 0; i < workers; i++)); do
    slices+=("$name-worker-$i")
  done
  if [[ $command != create && $command != run ]]; then
    created=" ${slices[*]} "
    return
  fi
  [[ -n $accelerator ]] ||
    die "$command: no --accelerator; give a type, as in --accelerator=v5litepod-64"
  check_type --accelerator "$accelerator"
  worker_accelerator=${worker_accelerator:-${accelerator%-*}-8}
  check_type --worker-accelerator "$worker_accelerator"
  # Hosts of one slice find each other; a worker would wait for the others' TPUs.
  [[ ${worker_accelerator##*-} -le 8 ]] ||
    die "--worker-accelerator=$worker_accelerator: a slice of several hosts; a worker" \
      "takes one, as in --worker-accelerator=${worker_accelerator%-*}-8"
}

check_type() {
  [[ $2 =~ ^v[0-9]+[a-z]*-[1-9][0-9]{0,5}$ ]] ||
    die "$1=$2: not a TPU type; give one as in $1=v5litepod-64 (all:" \
      "gcloud compute tpus accelerator-types list)"
  [[ -n $runtime ]] || runtime_of "$2" >/dev/null
}

# The image with nothing but the system, for each generation of TPU.
runtime_of() {
  case $1 in
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die "$1: no known image for it; name one with --runtime=VERSION" ;;
  esac
}

check_flags() {
  local flag config=no workdir=no
  if [[ $command != run ]]; then
    [[ ${#train_flags[@]} -eq 0 ]] ||
      die "${train_flags[0]}: $command takes no flags of the training; only run does"
    return
  fi
  for flag in ${train_flags[@]+"${train_flags[@]}"}; do
    case $flag in
      --config=*) config=yes ;;
      --workdir=/*) workdir=yes ;;
      --workdir=*)
        die "$flag: not a folder that all hosts have; mount a shared file system (see" \
          "--setup-command) and give an absolute path on it"
        ;;
      --distributed*) die "$flag: run adds it where it belongs; leave it out" ;;
    esac
  done
  [[ $config$workdir == yesyes ]] ||
    die "run: no --config=FILE and --workdir=/FOLDER for the training; give them after" \
      "a --, as in run $name ... -- --config=configs/realm/base.py --workdir=/data/realm"
}
