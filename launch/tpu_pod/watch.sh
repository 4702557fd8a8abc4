# shellcheck shell=bash
# shellcheck disable=SC2154  # variables of the files sourced beside this one
# Sourced by launch/tpu_pod.sh: `run`. It looks at each slice, does what that one lacks,
# waits and looks again: so it does not matter where an earlier run was cut off, nor
# whether a slice was preempted, rebooted or never there.

failures=0 # of everything, preemption not counted
silent=0   # times in a row that nobody could be asked
mixed=0    # times in a row that some hosts' job had ended and others' had not
known=" "  # the slices whose job this `run` has started or seen running

run() {
  local slice training
  trap 'say "not watched any more; what runs on the slices goes on"; exit 130' INT
  while :; do
    for slice in "${slices[@]}"; do
      look_after "$slice"
      [[ $slice == "$name" ]] || continue
      training=$phase
      case $training in
        finished)
          say "$name: the training has finished; delete $name gives the slices back"
          return
          ;;
        refused)
          ssh_command "$name" all "realm_retro/launch/job.sh logs train 3"
          call "${ssh[@]}" || true
          die "$name: the training refused its input for the reason above; mend it" \
            "and run again"
          ;;
        stopped)
          say "$name: stopped; run goes on from the checkpoint"
          exit 143
          ;;
      esac
    done
    [[ $watch == yes || $training != running ]] || return 0
    [[ $dry_run == yes ]] || sleep "$poll"
  done
}

# One look, and what follows from it. What came of it, in `phase`: waiting, running,
# finished, refused (by its own checks) or stopped (by `stop`).
look_after() {
  phase=waiting
  ask_queue "$1"
  case $queue in
    ACTIVE) look_at_job "$1" ;;
    ABSENT) create_slice "$1" || failed "$1: gcloud did not create it" ;;
    SUSPENDED)
      # It stays in the queue as it is; only a new request gets new machines.
      say "$1: preempted"
      renew "$1"
      ;;
    FAILED)
      failed "$1: its queued resource is FAILED"
      renew "$1"
      ;;
    UNKNOWN) unheard "$1" ;;
    *) say "$1: $queue" ;;
  esac
}

renew() {
  delete_slice "$1" || {
    failed "$1: gcloud did not delete it"
    return
  }
  create_slice "$1" || failed "$1: gcloud did not create it"
}

look_at_job() {
  local kinds job
  job=$(job_of "$1")
  ask_job "$1"
  # Each answer once, without its host.
  kinds=$(printf '%s\n' "$states" | sed 's/ (on .*//' | sort -u | tr '\n' ',')
  kinds=${kinds%,}
  [[ $kinds == unknown ]] || silent=0
  phase=running
  case $kinds in
    unknown)
      phase=waiting
      unheard "$1"
      ;;
    running)
      mixed=0
      if [[ $known != *" $1 "* ]]; then
        say "$1: $job is running already, with the flags that it was started with"
        known+="$1 "
      fi
      ;;
    *absent*)
      setup_slice "$1" || {
        phase=waiting
        failed "$1: setup failed"
        return
      }
      start "$1"
      ;;
    *running*) look_at_mixed "$1" "$kinds" ;;
    none) start "$1" ;;
    *)
      if [[ $known == *" $1 "* ]]; then
        look_at_ended "$1" "$job" "$kinds"
      else
        start "$1" # how an earlier run's job has ended does not matter to this one
      fi
      ;;
  esac
}

look_at_ended() {
  case $3 in
    *stopped*) phase=stopped ;;
    *"exited 2"*)
      phase=refused
      [[ $2 == train ]] || restart "$1" "$3"
      ;;
    "exited 0")
      phase=finished
      # A worker that is done while the training is not had nothing to do for long.
      [[ $2 == train ]] || start "$1"
      ;;
    "exited 143") # SIGTERM: a maintenance event; what it had done is saved
      say "$1: $2 was asked to end and did"
      start "$1"
      ;;
    *) restart "$1" "$3" ;;
  esac
}

# Hosts end one after the other; and when one process dies, JAX ends the others within
# minutes. Only those that hang are ended here.
look_at_mixed() {
  mixed=$((mixed + 1))
  say "$1: its hosts differ: $2"
  if [[ $mixed -ge 5 ]]; then
    mixed=0
    stop_slice "$1" || true
    restart "$1" "$2"
  fi
}

restart() {
  failed "$1: its job ended: $2"
  start "$1"
}

start() {
  known+="$1 "
  start_slice "$1" || {
    phase=waiting
    failed "$1: its job did not start"
  }
}

failed() {
  failures=$((failures + 1))
  [[ $failures -lt $max_failures ]] ||
    die "$1; that was failure $failures, and --max-failures=$max_failures: look at" \
      "logs $name --zone=$zone, then run again"
  say "$1 (failure $failures, --max-failures=$max_failures)"
}

unheard() {
  silent=$((silent + 1))
  [[ $silent -lt 10 ]] ||
    die "$1: gcloud could not tell its state 10 times in a row, last:" \
      "$(last_line "$answer"); what runs there goes on, run again to watch it"
  say "$1: gcloud could not tell its state: $(last_line "$answer")"
}
