#!/usr/bin/env bash
# A training run on one node or many, under SLURM: one launcher on each node, one rank on each GPU.
#
#     sbatch --nodes 4 deploy/slurm.sh ppo_train.py --actor_ckpt_dir sft --actor_save_dir OUT ...
#
# To be submitted from the repository's folder, which all nodes see (or the same path in an image: SRUN_FLAGS). Any script of the
# repository goes with it. Ten minutes before its time is up (--signal) the run saves a step, and the job goes back into the queue, from
# where the same command goes on; the same after --max_minutes. docs/clusters.md has the rest.
#
# What #SBATCH says is for whole nodes of 8 GPUs; flags of `sbatch` win over it. From the environment:
#     NPROC_PER_NODE  ranks on each node; the node's GPUs, when not given
#     MAX_RESTARTS    starts again after a crash, without leaving the nodes (deploy/run.sh); 0, when not given
#     RDZV_PORT       where the launchers meet on the first node; by the job's number, when not given
#     SRUN_FLAGS      more flags for srun, such as "--container-image=IMAGE --container-mounts=/data"
#
#SBATCH --job-name=rlhf
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u

if [ -z "${SLURM_JOB_ID:-}" ] || [ $# -eq 0 ]; then
  echo "error: deploy/slurm.sh: is a job's script: sbatch --nodes N deploy/slurm.sh SCRIPT.py FLAGS" >&2
  exit 2
fi
cd "$SLURM_SUBMIT_DIR" || exit 2
# shellcheck source=/dev/null
if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi

export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# A node's own folder for temporary files may go with the job.
export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-$PWD/flight-recorder-$SLURM_JOB_ID-rank-}"

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=${RDZV_PORT:-$((20000 + SLURM_JOB_ID % 10000))}

# One launcher on each node, with all of its cores. When one ends, in whatever way, the others have two minutes to end, too.
# shellcheck disable=SC2206  # more flags are parted by spaces
launch=(
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --cpu-bind=none
  --kill-on-bad-exit=0 --wait=120 ${SRUN_FLAGS:-}
  python deploy/launch.py
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-gpu}}"
  --rdzv_backend c10d --rdzv_endpoint "$first_node:$port" --rdzv_id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
  --rdzv_conf read_timeout=600
  "$@"
)
if [ "${MAX_RESTARTS:-0}" -gt 0 ]; then launch=(deploy/run.sh "${launch[@]}"); fi

# A signal is for the ranks. Not by way of srun, which answers it by killing them.
signalled=""
# shellcheck disable=SC2329  # called by the trap
hand_on() {
  signalled=yes
  scancel --signal=TERM "$SLURM_JOB_ID"
}
trap hand_on TERM

"${launch[@]}" &
child=$!
wait "$child"
code=$?
while [ -n "$signalled" ]; do # a signal ends `wait`, not the child
  signalled=""
  wait "$child" 2>/dev/null
  again=$?
  [ "$again" -eq 127 ] || code=$again # 127: the child had been waited for
done

# 75: a step is saved. A job that somebody cancels is no longer running, and stays cancelled.
if [ "$code" -eq 75 ] && scontrol show job --oneliner "$SLURM_JOB_ID" | grep -q "JobState=RUNNING"; then
  echo "deploy/slurm.sh: stopped, and saved; the job goes back into the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
