#!/usr/bin/env bash
# Trains on a Cloud TPU slice, with refresh workers on slices of their own.
#
#   launch/tpu_pod.sh COMMAND NAME --zone=ZONE [OPTION ...] [-- FLAG ...]
#
#   create   asks for the slices as queued resources, and returns
#   setup    waits for them; copies this repository there and makes its environment
#   run      trains with the FLAGs of realm_retro.cli.train until the training has ended;
#            creates, sets up and restarts whatever is missing, preempted or has failed
#   status   what the queue and each host's job say
#   logs     prints a job's log
#   stop     lets the training save a checkpoint and end; then ends the workers
#   delete   gives all slices of NAME back, and with them everything on their disks
#
# From nothing to a trained model (NFS is what all hosts mount, --workdir lies on it):
#
#   pod=(my-pod --zone=us-west4-a --accelerator=v5litepod-64 --spot --workers=2
#        --setup-command='sudo mkdir -p /data && sudo mount -t nfs NFS:/data /data')
#   launch/tpu_pod.sh run "${pod[@]}" -- \
#     --config=configs/realm/base.py --workdir=/data/realm
#   launch/tpu_pod.sh delete my-pod --zone=us-west4-a
#
# `run` may be ended with Ctrl-C at any time; what runs on the slices goes on. The same
# command again watches it further. Keep it going (in tmux, or on a small machine): it is
# what restarts a preempted slice.
#
# Options, for any command; what a command has no use for is ignored:
#
#   --zone=ZONE                    where; needed by all
#   --project=PROJECT              default: gcloud's own
#   --accelerator=TYPE             such as v5litepod-64, v4-32, v5p-128, v6e-16
#   --runtime=VERSION              default: the image for that type
#   --spot                         cheaper capacity, which may be taken back at any time
#   --workers=N                    refresh workers (REALM with pretrain.refresh=workers)
#   --worker-accelerator=TYPE      a slice of one host; default: that type with -8
#   --env=NAME=VALUE               for the processes; may be repeated. No secrets: others
#                                  on the hosts can read it
#   --setup-command=COMMAND        for each host's shell at setup, before the installation
#   --create-flag=FLAG             one more flag for gcloud's create, such as
#                                  --create-flag=--network=mine; may be repeated
#   --connect-flag=FLAG            one more flag for gcloud's ssh and scp, such as
#                                  --connect-flag=--internal-ip; may be repeated
#   --poll=SECONDS                 between two looks of `run`; default 60
#   --max-failures=N               `run` gives up after so many; default 10. Preemption is
#                                  none
#   --no-watch                     `run` returns once the training is started
#   --grace=SECONDS                before `stop` kills what has not ended; default 300
#   --job=train|worker-0|...       whose log; default train
#   --host=N                       of which of its hosts; default 0
#   --lines=N, --follow            how much of it
#   --dry-run                      prints the commands and runs none of them
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=launch/environment.sh
source "$here/environment.sh"
# shellcheck source=launch/tpu_pod/flags.sh
source "$here/tpu_pod/flags.sh"
# shellcheck source=launch/tpu_pod/slices.sh
source "$here/tpu_pod/slices.sh"
# shellcheck source=launch/tpu_pod/watch.sh
source "$here/tpu_pod/watch.sh"

# In a dry run a comment, so that the output is a script.
say() {
  if [[ $dry_run == yes ]]; then echo "# $*"; else echo "$*"; fi
}

create() {
  local slice
  for slice in "${slices[@]}"; do
    ask_queue "$slice"
    case $queue in
      ABSENT)
        create_slice "$slice" ||
          die "$slice: not created, see above; what was created stays until you" \
            "delete $name"
        ;;
      UNKNOWN) die "$slice: gcloud could not describe it: $(last_line "$answer")" ;;
      *) say "$slice: exists and is $queue" ;;
    esac
  done
}

setup() {
  local slice
  for slice in "${slices[@]}"; do
    ask_queue "$slice"
    while [[ $queue != ACTIVE ]]; do
      case $queue in
        ABSENT | FAILED | SUSPENDED | SUSPENDING | DELETING)
          die "$slice: is $queue; delete $name and create it again, or let run do both"
          ;;
        UNKNOWN) die "$slice: gcloud could not describe it: $(last_line "$answer")" ;;
      esac
      say "$slice: $queue"
      sleep "$poll"
      ask_queue "$slice"
    done
    setup_slice "$slice" || die "$slice: setup failed for the reason above"
  done
}

status() {
  local slice line
  find_slices
  for slice in "${slices[@]}"; do
    ask_queue "$slice"
    say "$slice: $queue"
    [[ $queue == ACTIVE ]] || continue
    ask_job "$slice"
    while IFS= read -r line; do
      say "  $(job_of "$slice"): $line"
    done <<<"$states"
  done
}

logs() {
  local slice=$name words
  [[ $log_job == train ]] || slice=$name-$log_job
  words=(realm_retro/launch/job.sh logs "$(job_of "$slice")" "$lines")
  [[ $follow == no ]] || words+=(--follow)
  ssh_command "$slice" "$host" "${words[*]}"
  call "${ssh[@]}"
}

stop() {
  local slice unanswered=()
  find_slices
  for slice in "${slices[@]}"; do
    ask_queue "$slice"
    if [[ $queue != ACTIVE ]]; then
      say "$slice: $queue"
    else
      stop_slice "$slice" || unanswered+=("$slice")
    fi
  done
  [[ ${#unanswered[@]} -eq 0 ]] ||
    die "${unanswered[*]}: not all hosts answered, see above; stop $name again"
}

delete() {
  local slice left=()
  find_slices
  for slice in "${slices[@]}"; do
    delete_slice "$slice" || left+=("$slice")
  done
  [[ ${#left[@]} -eq 0 ]] ||
    die "${left[*]}: not deleted, see above, and may still cost; delete $name again"
}

parse "$@"
[[ $dry_run == yes ]] || command -v gcloud >/dev/null ||
  die "no gcloud here; install it (https://cloud.google.com/sdk/docs/install) and run" \
    "gcloud auth login, or only see the commands with --dry-run"
"$command"
