#!/bin/bash
# Trains on the nodes of a Slurm job: Ray on each of them, and `sppo train` on the first.
#
#     RECIPE=recipes/mine.toml RUN=/shared/runs/mine sbatch --nodes=4 deploy/slurm.sh --cluster.learners 8 --cluster.rollouts 24
#
# Whatever follows the script's name goes to `sppo train`: keys of [cluster] but its lag, since a run that goes on may change no others. RUN is a folder
# that every node sees. Where it holds a run already, the run goes on from there, on as many learners and workers as are asked for now. A job whose
# time is nearly over saves its step and queues again.
#
# Needed on every node: the same environment (VENV, default .venv beside the recipe's folder), with `pip install 'sppo[cluster]'`.
#
#SBATCH --job-name=sppo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Two minutes before the end of its time Slurm tells this script alone (B:), since Ray must live until the step is saved. A signal of its own (USR1)
# tells the end of the time from `scancel` (TERM). With PreemptParameters=send_user_signal it also comes before a pre-emption. cluster.grace (60 s)
# must be less than these 120.
#SBATCH --signal=B:USR1@120

set -euo pipefail

: "${RECIPE:?set RECIPE to a recipe}" "${RUN:?set RUN to a folder that every node sees}"
VENV=${VENV:-.venv}
export PATH="$VENV/bin:$PATH"

# -- Ray ---------------------------------------------------------------------------------------------------------------
names=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
nodes=$(wc -l <<< "$names")
head=${names%%$'\n'*}                                         # this script runs there
ip=${HEAD_IP:-$(hostname -I | cut -d ' ' -f 1)}               # of the network that the nodes share
port=$((20000 + SLURM_JOB_ID % 10000))                        # so that two jobs can share a node
export RAY_ADDRESS="$ip:$port"                                # what --cluster.address auto finds
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n') # Ray 2.52 and newer: strangers on the network get nothing
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
per_node=(--num-cpus "${SLURM_CPUS_PER_TASK:-1}" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats --block)
steps=()

ray_on() { # ray_on NODES [OPTIONS OF srun] -- [OPTIONS OF ray start]
    local count=$1 where=()
    shift
    while [ "$1" != -- ]; do where+=("$1") && shift; done
    shift
    # --overlap: the steps share the nodes with this script; --cpus-per-task is not the job's unless it is said again (Slurm 22.05 and newer)
    srun --overlap --nodes="$count" --ntasks="$count" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${where[@]}" \
        ray start "$@" "${per_node[@]}" &
    steps+=($!)
}

# shellcheck disable=SC2329 # by a trap
finish() {
    for step in "${steps[@]}"; do kill -TERM "$step" 2> /dev/null || true; done
    wait
}
trap finish EXIT

ray_on 1 --nodelist="$head" -- --head --node-ip-address="$ip" --port="$port" --include-dashboard=false \
    --temp-dir="/tmp/ray-$SLURM_JOB_ID"
if [ "$nodes" -gt 1 ]; then
    ray_on $((nodes - 1)) --exclude="$head" -- --address="$RAY_ADDRESS"
fi

python - "$nodes" << 'END'
import sys, time
import ray

wanted, until, there = int(sys.argv[1]), time.monotonic() + 300, 0
while time.monotonic() < until:
    try:
        ray.init(address="auto", ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
        there = sum(node["Alive"] for node in ray.nodes())
    except Exception as error:
        print(f"waiting for Ray: {str(error).splitlines()[0]}", file=sys.stderr)
    if there == wanted:
        sys.exit(0)
    time.sleep(2)
sys.exit(f"after 300 s {there} of {wanted} nodes are in the Ray cluster")
END

# -- training ----------------------------------------------------------------------------------------------------------
driver="" again=false heard=true
# shellcheck disable=SC2329 # by traps
tell() {
    heard=true
    [ -z "$driver" ] || kill -TERM "$driver" 2> /dev/null || true # it finishes the step, saves, and exits with 130
}
trap 'again=true; tell' USR1
trap tell TERM

if [ -f "$RUN/recipe.toml" ]; then
    sppo train --resume "$RUN" --cluster.address auto "$@" &
else
    sppo train "$RECIPE" --run.out "$RUN" --cluster.address auto "$@" &
fi
driver=$!

status=0
while $heard; do # `wait` also returns when a signal was heard
    heard=false
    wait "$driver" && status=0 || status=$?
done

# 143: it was told before it had begun to listen
if $again && { [ "$status" -eq 130 ] || [ "$status" -eq 143 ]; }; then
    echo "saved; job $SLURM_JOB_ID queues again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
