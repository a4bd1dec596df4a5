# shellcheck shell=bash
# Sourced by the sbatch files of this folder; start those from the project's root. Settings, as
# environment variables of sbatch:
#   VENV=.venv-gpu         an environment on a file system that all nodes see, or
#   CONTAINER=IMAGE        an image for enroot and pyxis: a .sqsh file, or a registry's name
#   MOUNTS=/models,/data   folders that the container sees, under the same names
#   LOGS=runs/logs         where output and the ranks' logs go
#   GRACE=900              seconds that a step and its checkpoint may take after a signal
#   DRY_RUN=1              prints the command of each node instead of running it

VENV=${VENV:-.venv-gpu} CONTAINER=${CONTAINER:-} MOUNTS=${MOUNTS:-} GRACE=${GRACE:-900}
LOGS=${LOGS:-runs/logs}/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
mkdir -p "$LOGS"

# Megatron orders computation before communication by this.
export CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1

# Runs its arguments once on each of the first $1 nodes.
on_nodes() {
    local nodes=$1
    shift
    local where=()
    if [ -n "$CONTAINER" ]; then
        where=(--container-image="$CONTAINER" --container-workdir="$PWD" --no-container-mount-home
            --container-mounts="$PWD:$PWD${MOUNTS:+,$MOUNTS}")
    else
        if [ ! -x "$VENV/bin/python" ]; then
            echo "error: VENV=$VENV has no bin/python; name an environment, or an image by CONTAINER" >&2
            return 2
        fi
        PATH=$(realpath "$VENV")/bin:$PATH
    fi
    # When a node ends, the others have a minute to end, too; then Slurm ends them.
    local command=(srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=0
        --wait=60 --label "${where[@]}" "$@")
    if [ -n "${DRY_RUN:-}" ]; then
        printf '%q ' "${command[@]}"
        echo
    else
        "${command[@]}"
    fi
}

# Runs a module under torchrun on all nodes of the job, or on the first $ONLY_NODES.
torchrun_on_nodes() {
    local nodes=${ONLY_NODES:-$SLURM_JOB_NUM_NODES}
    local gpus=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:?the job has no GPUs; sbatch needs --gpus-per-node}}
    local first port
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # Jobs that share a node do not meet on a port.
    port=$((20000 + SLURM_JOB_ID % 20000))
    # torchrun passes a signal on, and waits GRACE seconds for the ranks to save.
    # shellcheck disable=SC2016 # SLURM_NODEID is each node's own
    on_nodes "$nodes" bash -c 'exec torchrun --node-rank "$SLURM_NODEID" --log-dir "$0/node$SLURM_NODEID" "$@"' \
        "$LOGS" --nnodes "$nodes" --nproc-per-node "$gpus" --master-addr "$first" --master-port "$port" \
        --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout "$GRACE" \
        --tee 3 --local-ranks-filter 0 -m "$@"
}

# Puts the job back into the queue if its run was stopped and saved, or if another job preempted it and
# it ended before its GraceTime: only what lasts until then is requeued by Slurm itself.
requeue_if_stopped() {
    if grep -rqs "stopped after step .*newest checkpoint" "$LOGS"; then
        echo "the run was stopped and saved; requeued: it goes on from its newest checkpoint"
    elif scontrol show job "$SLURM_JOB_ID" | grep "PreemptTime=[0-9]" >/dev/null; then
        echo "another job preempted this one; requeued: it goes on from what was saved"
    elif grep -rqs "stopped after step" "$LOGS"; then
        # It would start anew, and be stopped at the same step again and again.
        echo "error: the run was stopped without a checkpoint (checkpoint.save_interval is null): not requeued; set an interval" >&2
        return 0
    else
        return 0
    fi
    scontrol requeue "$SLURM_JOB_ID"
}
