#!/usr/bin/env bash
# Runs a training command again after a crash, at most MAX_RESTARTS times, and only while every attempt saves a new step.
#
#     MAX_RESTARTS=10 deploy/run.sh torchrun --nproc_per_node 8 ppo_train.py --actor_save_dir OUT --save_every 5 ...
#
# The command goes on by itself from OUT-state (--resume auto; another --resume is for the first attempt alone). Ends with 0 when it
# finished, else with the code of its last attempt.
# A signal is handed on, and ends the supervision: the run saves a step first. So does exit code 75 (stopped, and saved: by a signal to
# the run itself, or --max_minutes), which torchrun turns into 1, and deploy/launch.py does not. EXIT_STOPPED is what is said instead of
# 75, for a scheduler that starts again by other codes.
set -u
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or workers started again may dial addresses of the last attempt

save_dir="" resume=""
words=("$@")
for i in "${!words[@]}"; do
  word="${words[$i]}"
  flag="${word%%=*}"
  case "${flag//-/_}" in # --save-dir is --save_dir
    __save_dir | __actor_save_dir)
      if [ "$word" = "$flag" ]; then save_dir="${words[$((i + 1))]:-}"; else save_dir="${word#*=}"; fi
      ;;
    __resume)
      resume=yes
      if [ "$word" = "$flag" ]; then words[i + 1]="auto"; else words[i]="--resume=auto"; fi
      ;;
  esac
done
[ -n "$resume" ] || words+=(--resume=auto) # a --config may hold another
while [ "${save_dir%/}" != "$save_dir" ] || [ "${save_dir%/.}" != "$save_dir" ]; do
  save_dir="${save_dir%/.}"
  save_dir="${save_dir%/}"
done
if [ -z "$save_dir" ]; then
  echo "error: deploy/run.sh: the command has no --save_dir or --actor_save_dir (of its own, not in a --config), so that no progress could be seen" >&2
  exit 2
fi
case "${MAX_RESTARTS:=10}" in
  *[!0-9]*)
    echo "error: deploy/run.sh: MAX_RESTARTS is $MAX_RESTARTS, a number is needed" >&2
    exit 2
    ;;
esac

newest() { # the newest whole step and which folder that is, empty when there is none
  local manifest
  for manifest in "$save_dir"-state/step-[0-9]*/manifest.json; do
    [ -e "$manifest" ] && ls -di "$(dirname "$manifest")"
  done | tail -n 1
}

child="" stopped="" signalled=""
hand_on() {
  stopped=yes signalled=yes
  [ -n "$child" ] && kill -TERM "$child" 2>/dev/null
}
trap hand_on TERM INT

finish() {
  if [ "$1" -eq 75 ]; then exit "${EXIT_STOPPED:-75}"; fi
  exit "$1"
}

for ((attempt = 0; ; attempt++)); do
  before=$(newest)
  "$@" &
  child=$!
  if [ -n "$stopped" ]; then hand_on; fi # it came while there was no child
  wait "$child"
  code=$?
  while [ -n "$signalled" ]; do # a signal ends `wait`, not the child
    signalled=""
    wait "$child" 2>/dev/null
    again=$?
    [ "$again" -eq 127 ] || code=$again # 127: the child had been waited for
  done
  after=$(newest)
  if [ "$code" -eq 0 ] || [ "$code" -eq 2 ] || [ "$code" -eq 75 ] || [ -n "$stopped" ]; then finish "$code"; fi # 2: wrong input, which has been said
  if [ "$attempt" -ge "$MAX_RESTARTS" ]; then
    echo "error: deploy/run.sh: ended with $code after $attempt restarts, the most that MAX_RESTARTS allows" >&2
    exit "$code"
  fi
  if [ -z "$after" ] || [ "$after" = "$before" ]; then
    echo "error: deploy/run.sh: ended with $code and saved no new step (newest: ${after:-none}): not started again" >&2
    exit "$code"
  fi
  echo "deploy/run.sh: ended with $code after ${after}; restart $((attempt + 1))" >&2
  set -- "${words[@]}"
done
