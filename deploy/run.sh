#!/usr/bin/env bash
# Runs a training command again after a crash, at most MAX_RESTARTS times, and only while every attempt saves a new step.
#
#     MAX_RESTARTS=10 deploy/run.sh torchrun --nproc_per_node 8 ppo_train.py --actor_save_dir OUT --save_every 5 ...
#
# The command goes on by itself from OUT-state (--resume auto; another --resume is for the first attempt alone). Ends with 0 when it
# finished, else with the code of its last attempt.
# A signal is handed on, and ends the supervision: the run saves a step first.
set -u
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or workers started again may dial addresses of the last attempt

save_dir=""
words=("$@")
for i in "${!words[@]}"; do
  case "${words[$i]}" in
    --save_dir | --actor_save_dir) save_dir="${words[$((i + 1))]:-}" ;;
    --save_dir=* | --actor_save_dir=*) save_dir="${words[$i]#*=}" ;;
    --resume=*) words[i]="--resume=auto" ;;
    --resume) words[i + 1]="auto" ;;
  esac
done
if [ -z "$save_dir" ]; then
  echo "error: deploy/run.sh: the command has no --save_dir or --actor_save_dir, so that no progress could be seen" >&2
  exit 2
fi

newest() { # the name of the newest whole step, empty when there is none
  local manifest
  for manifest in "${save_dir%/}"-state/step-[0-9]*/manifest.json; do
    [ -e "$manifest" ] && basename "$(dirname "$manifest")"
  done | tail -n 1
}

child="" stopped=""
hand_on() {
  stopped=yes
  [ -n "$child" ] && kill -TERM "$child" 2>/dev/null
}
trap hand_on TERM INT

for ((attempt = 0; ; attempt++)); do
  before=$(newest)
  "$@" &
  child=$!
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ends `wait`, not the child
    wait "$child"
    code=$?
  done
  after=$(newest)
  if [ "$code" -eq 0 ] || [ -n "$stopped" ]; then exit "$code"; fi
  if [ "$attempt" -ge "${MAX_RESTARTS:-10}" ]; then
    echo "error: deploy/run.sh: ended with $code after $attempt restarts, the most that MAX_RESTARTS allows" >&2
    exit "$code"
  fi
  if [ "$after" = "$before" ]; then
    echo "error: deploy/run.sh: ended with $code and saved no new step (newest: ${after:-none}): not started again" >&2
    exit "$code"
  fi
  echo "deploy/run.sh: ended with $code after ${after}; restart $((attempt + 1))" >&2
  set -- "${words[@]}"
done
