#!/bin/bash
# A job for `sbatch`. The folder that it is submitted from, with its Python, must be one that all nodes see.
#SBATCH --job-name=pod-run
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=4
#SBATCH --time=1-00:00:00
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=pod-run-%j.log
set -u

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export JAX_COORDINATOR_ADDRESS=$first:$((61440 + SLURM_JOB_ID % 4096)) JAX_NUM_PROCESSES=2 JAX_LOCAL_DEVICE_IDS=0,1,2,3
echo "lm launch: $(date) on $SLURM_JOB_NODELIST, requeued so far: ${SLURM_RESTART_COUNT:-0}"

# Shortly before the time is up Slurm signals this script: all tasks save and end, and the job is queued again.
time_is_up=
trap 'time_is_up=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# shellcheck disable=SC2016  # it is for each task to expand
srun --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 \
    bash -c 'JAX_PROCESS_ID=$SLURM_PROCID exec "$@"' bash \
    /venv/bin/python -m lm.cli.main run pod.py --run-dir '/shared/my runs/pod' --pretrain.steps 16 &
step=$!
code=0
wait "$step" || code=$?
if [[ -n "$time_is_up" ]]; then
    wait "$step"
    echo "lm launch: the time is up; queued again"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
case $code in
    0) exit 0 ;;
    2) echo "lm launch: a restart would end in the same error"; exit 2 ;;
    130) echo "lm launch: stopped; submit it again to go on"; exit 130 ;;
esac

# Restarts in a row that have added no checkpoint are counted beside the log.
counted=pod-run-$SLURM_JOB_ID.restarts
checkpoints=$(find '/shared/my runs/pod'/stages -path '*/checkpoints/*/manifest.json' 2>/dev/null | sort | cksum | cut -d ' ' -f 1)
restarts=0 before=
if [[ -f "$counted" ]]; then read -r restarts before <"$counted"; fi
if [[ "$before" != "$checkpoints" ]]; then restarts=0; fi
if ((restarts >= 3)); then
    echo "lm launch: a process ended with code $code; no new checkpoint in $restarts restarts: given up"
    exit "$code"
fi
echo "$((restarts + 1)) $checkpoints" >"$counted"
echo "lm launch: a process ended with code $code; restart $((restarts + 1)) of 3 without a new checkpoint"
exec scontrol requeue "$SLURM_JOB_ID"
