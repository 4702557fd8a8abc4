# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154  # variables of the files sourced beside this one
# Sourced by launch/tpu_pod.sh: what is asked of gcloud, for one slice at a time. NAME is
# the slice that trains, NAME-worker-N a refresh worker's; a queued resource and its only
# node are named alike.

# What there would be in a dry run, which asks nobody.
created=" " started=" "

last_line() {
  echo "${1##*$'\n'}"
}

# Words as bash reads them again.
quoted() {
  local text
  printf -v text ' %q' "$@"
  echo "${text:1}"
}

# Runs a command; in a dry run it is only printed.
call() {
  if [[ $dry_run == yes ]]; then quoted "$@"; else "$@"; fi
}

# ask ASSUMED COMMAND...: what the command says, in `answer`; ASSUMED in a dry run.
ask() {
  local assumed=$1
  shift
  if [[ $dry_run == yes ]]; then
    quoted "$@"
    answer=$assumed
  else
    answer=$("$@" 2>&1)
  fi
}

# ssh_command SLICE HOST COMMAND: the words, in `ssh`; HOST is a number or all.
ssh_command() {
  ssh=(gcloud compute tpus tpu-vm ssh "$1" "${place[@]}"
    ${connect_flags[@]+"${connect_flags[@]}"} "--worker=$2" --quiet "--command=$3")
}

# The job of a slice.
job_of() {
  if [[ $1 == "$name" ]]; then echo train; else echo refresh; fi
}

# The state of a queued resource, in `queue`: Google's word for it, ABSENT, or UNKNOWN
# where gcloud cannot tell.
ask_queue() {
  local assumed=ABSENT
  [[ $created != *" $1 "* ]] || assumed=ACTIVE
  if ask $assumed gcloud compute tpus queued-resources describe "$1" "${place[@]}" \
    "--format=value(state.state)" --quiet; then
    queue=$(grep -Ex '[A-Z_]+' <<<"$answer" | tail -n 1) || queue=UNKNOWN
  elif [[ $answer == *NOT_FOUND* ]]; then
    queue=ABSENT
  else
    queue=UNKNOWN
  fi
}

# What the hosts of a slice say of its job, a line each, in `states`; or `unknown`.
ask_job() {
  local job assumed=absent command
  job=$(job_of "$1")
  [[ $started != *" $1 "* ]] || assumed=running
  [[ $assumed$job != runningtrain ]] || assumed="exited 0"
  command="if test -e realm_retro/.ready; then realm_retro/launch/job.sh state $job;"
  command+=" else echo job $job: absent; fi"
  ssh_command "$1" all "$command"
  states=
  if ask "job $job: $assumed" "${ssh[@]}"; then
    states=$(sed -n "s/.*job $job: //p" <<<"$answer")
  fi
  states=${states:-unknown}
}

# The slices of NAME that exist, in `slices`: none may be forgotten, whatever the options
# say. In a dry run those that the options name.
find_slices() {
  local line found=()
  created=" ${slices[*]} "
  ask "$(printf '%s\n' "${slices[@]}")" gcloud compute tpus queued-resources list \
    "${place[@]}" "--format=value(name)" --quiet ||
    die "gcloud could not list queued resources: $(last_line "$answer")"
  while IFS= read -r line; do
    line=${line##*/}
    if [[ $line == "$name" || $line =~ ^"$name"-worker-[0-9]+$ ]]; then
      found+=("$line")
    fi
  done <<<"$answer"
  [[ ${#found[@]} -gt 0 ]] ||
    die "$name: no queued resource of that name in --zone=$zone; give the zone that it" \
      "was created in"
  slices=("${found[@]}")
}

create_slice() {
  local type=$accelerator version tier=()
  [[ $1 == "$name" ]] || type=$worker_accelerator
  version=${runtime:-$(runtime_of "$type")}
  [[ $spot == no ]] || tier=(--spot)
  say "$1: asking for a $type"
  created+="$1 "
  call gcloud compute tpus queued-resources create "$1" "--node-id=$1" \
    "--accelerator-type=$type" "--runtime-version=$version" "${place[@]}" \
    ${tier[@]+"${tier[@]}"} ${create_flags[@]+"${create_flags[@]}"} --quiet
}

delete_slice() {
  call gcloud compute tpus queued-resources delete "$1" "${place[@]}" --force --quiet
}

# Copies what a run needs of this repository, and makes the environment there.
setup_slice() {
  local job=realm_retro/launch/job.sh command
  say "$1: setting up"
  if [[ $packed == no ]]; then
    # Once: a slice that comes back gets the same code, whatever was edited meanwhile.
    call mkdir -p "${archive%/*}"
    call tar -C "$root" --exclude=__pycache__ -czf "$archive" setup.cfg pyproject.toml \
      README.md LICENSE configs launch realm_retro || return
    packed=yes
  fi
  # Old modules must not stay behind; the environment and the logs do.
  command="if test -e $job; then $job idle; fi"
  command+=" && rm -rf realm_retro/.ready realm_retro/launch realm_retro/configs"
  command+=" realm_retro/realm_retro && mkdir -p realm_retro"
  command+=" && tar -xzf realm_retro.tar.gz -C realm_retro"
  command+=" && $(quoted "$job" install tpu "$setup_command")"
  call gcloud compute tpus tpu-vm scp "$archive" "$1:realm_retro.tar.gz" \
    "${place[@]}" ${connect_flags[@]+"${connect_flags[@]}"} --worker=all --quiet ||
    return
  ssh_command "$1" all "$command"
  call "${ssh[@]}"
}

# Training is one program over all hosts; a refresh worker is a program of its own.
start_slice() {
  local job words
  job=$(job_of "$1")
  words=(realm_retro/launch/job.sh start "$job" env PYTHONUNBUFFERED=1
    ${variables[@]+"${variables[@]}"} .venv/bin/python -m)
  if [[ $job == train ]]; then
    words+=(realm_retro.cli.train --distributed)
  else
    words+=(realm_retro.cli.refresh_index)
  fi
  say "$1: starting the job $job"
  started+="$1 "
  ssh_command "$1" all "$(quoted "${words[@]}" "${train_flags[@]}")"
  call "${ssh[@]}"
}

stop_slice() {
  ssh_command "$1" all "realm_retro/launch/job.sh stop $(job_of "$1") $grace"
  call "${ssh[@]}"
}
