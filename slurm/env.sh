# shellcheck shell=bash
# Sourced by the job scripts through $SLURM_SUBMIT_DIR: environment, launch, and what to do when a job ends.
# Whatever is set before `sbatch` wins over what is set here.

source slurm/requeue.sh

# srun passes on what is set here, also where sbatch was told not to (`--export=NONE`, or a few names).
export SLURM_EXPORT_ENV=ALL

# --- logs ---

# The job's own log is sbatch's --output; here each rank has its file, and NCCL's flight recorder its dumps.
LOG_DIR="${LOG_DIR:-$PWD/slurm-logs/${SLURM_JOB_NAME:-login}-${SLURM_JOB_ID:-0}}"
export LOG_DIR TORCH_FR_DUMP_TEMP_FILE="$LOG_DIR/flight-" TORCH_NCCL_DEBUG_INFO_TEMP_FILE="$LOG_DIR/flight-"

# --- modules, container, Python ---

if [ -n "${DEHVF_MODULES:-}" ]; then
  # shellcheck disable=SC2086  # several names
  module load $DEHVF_MODULES
fi
if [ -z "${DEHVF_CONTAINER:-}" ]; then
  activate="${DEHVF_VENV:-$PWD/.venv}/bin/activate"
  if [ ! -f "$activate" ]; then
    echo "error: $activate: no such file; make .venv (README), or name an environment in DEHVF_VENV" >&2
    exit 2
  fi
  # shellcheck disable=SC1090
  source "$activate"
fi

# An image runs by pyxis (enroot) where srun has it, else by apptainer. It sees this directory and the logs in any case.
CONTAINER_OPTIONS=() INSIDE=()
if [ -n "${DEHVF_CONTAINER:-}" ]; then
  mkdir -p "$LOG_DIR"
  mounts="$PWD:$PWD,$LOG_DIR:$LOG_DIR${DEHVF_MOUNTS:+,$DEHVF_MOUNTS}"
  if [[ "$(srun --help 2>/dev/null)" == *--container-image* ]]; then
    CONTAINER_OPTIONS=(--container-image="$DEHVF_CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD")
  else
    INSIDE=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$DEHVF_CONTAINER")
  fi
fi

# alone COMMAND...: runs it once, where tasks would run, without a log of its own.
alone() {
  if [ "${#CONTAINER_OPTIONS[@]}" -gt 0 ]; then
    srun --nodes=1 --ntasks=1 "${CONTAINER_OPTIONS[@]}" "$@"
  else
    "${INSIDE[@]}" "$@"
  fi
}

# --- communication ---

# All ranks meet at the first node. The port follows from the job, below the ports that systems hand out themselves
# (32768 on Linux), so that jobs on the same node do not collide; a job that is started again takes another one.
export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" 2>/dev/null | head -n 1)}"
export MASTER_PORT="${MASTER_PORT:-$((10000 + (${SLURM_JOB_ID:-0} + 7919 * ${SLURM_RESTART_COUNT:-0}) % 20000))}"
# A rank waits so long for a silent other (a node that died without a word) before the job ends.
TIMEOUT_MINUTES="${TIMEOUT_MINUTES:-4}"
# The flight recorder: on a timeout every rank writes which collectives it entered, last ones first to differ.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
# Warnings of NCCL name the interface or the peer that failed; INFO would be pages a rank.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the network interface where a node has several and the first is
# not the one; NCCL_IB_HCA the InfiniBand adapters. No value of ours would be right on every cluster.

# Loader workers are processes of their own; a thread pool in each would oversubscribe the node.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export PYTHONUNBUFFERED=1

# --- launch ---

# launch COMMAND...: runs it in every task of the job and returns its code. srun does not inherit --cpus-per-task on every
# version of SLURM.
# A rank that fails breaks the others' connections, which end by themselves, and is not to end them at once: a mistake that
# every rank is about to name would look like a crash, since srun tells the largest code. LINGER_S seconds after the first
# failure whatever is left is given up, with the stacks of its threads in the ranks' logs (SIGUSR2): srun would wait for the
# tasks of a dead node as long as SLURM needs to notice its death, minutes.
LINGER_S="${LINGER_S:-30}"
launch() {
  mkdir -p "$LOG_DIR"
  local options=(--kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${CONTAINER_OPTIONS[@]}")
  options+=(--ntasks="$((SLURM_JOB_NUM_NODES * $(tasks_per_node)))")
  local failed="$LOG_DIR/failed.${SLURM_RESTART_COUNT:-0}" srun code=0 given_up='' seconds=0
  local end=$((SECONDS + ${DEADLINE_S:-315360000}))
  # There from the start, and read anew each time: on NFS a name that was missing stays missing for a while.
  : >"$failed"
  srun "${options[@]}" bash slurm/rank.sh "${INSIDE[@]}" "$@" &
  srun=$!
  while kill -0 "$srun" 2>/dev/null; do
    # For rank.sh, which has to know whether this shell lives; a full disk takes this as well.
    touch "$LOG_DIR/heartbeat" 2>/dev/null || true
    # SLURM ends a job whose node it lost, and this shell within KillWait, whatever the ranks still wait for.
    if [ -n "${terminated:-}" ] && is_requeued; then requeue && terminated=''; fi
    sleep 1
    if [ -n "$(<"$failed")" ] && [ $((seconds += 1)) -gt "$LINGER_S" ]; then
      echo "error: ranks that failed (rank, exit code): $(paste -sd ';' "$failed"); giving the others up," \
        "whose logs in $LOG_DIR tell where they are" >&2
      read -r _ given_up <"$failed"
    elif [ "$SECONDS" -gt "$end" ]; then
      echo "error: not done after $DEADLINE_S s; giving it up" >&2
      given_up=124
    else
      continue
    fi
    scancel --signal=USR2 "$SLURM_JOB_ID" || true
    sleep 2
    kill -KILL "$srun" 2>/dev/null || true
    break
  done
  { wait "$srun" || code=$?; } 2>/dev/null
  return "${given_up:-$code}"
}

# --- the nodes' health ---

# check_nodes FLAGS...: looks whether every node can run this, and all together (dehvf_ds/doctor/nodes.py). Ends the job
# with code 2 where every node shows the same mistake. A sick node ends it with 3; with EXCLUDE_SICK=1 the job goes back
# into the queue without that node instead.
check_nodes() {
  if [ "${HEALTH_CHECK:-1}" != 1 ]; then return; fi
  local reports="$LOG_DIR/nodes.${SLURM_RESTART_COUNT:-0}" tasks code=0 node names
  tasks="$(tasks_per_node)"
  mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  rm -rf "$reports" && mkdir -p "$reports"
  DEADLINE_S="${HEALTH_S:-420}" launch python -m dehvf_ds.doctor.nodes --into "$reports" \
    --nodes "$(IFS=,; echo "${names[*]}")" --tasks-per-node "$tasks" -- "$@" || code=$?
  case "$code" in
    0) return ;;
    2) exit 2 ;;
    85 | 138 | 143) finish 85 "" ;;
  esac
  if ! goes_on; then exit "$code"; fi
  if [ -z "$(find "$reports" -name '*.json')" ]; then
    echo "error: no task was able to begin (exit code $code); the ranks' logs in $LOG_DIR say why" >&2
    exit 2
  fi
  # The first task judges. Where it was not able to, its node is sick, unless others never began.
  if [ ! -f "$reports/sick" ]; then
    for node in "${names[@]}"; do
      if [ "$(find "$reports" -name "$node.*.json" | wc -l)" -lt "$tasks" ]; then echo "$node"; fi
    done >"$reports/sick"
    if [ ! -s "$reports/sick" ]; then echo "${names[0]}" >"$reports/sick"; fi
    echo "error: no word from node $(paste -sd ' ' "$reports/sick")" >&2
  fi
  if [ "${EXCLUDE_SICK:-0}" = 1 ] && [ -s "$reports/sick" ]; then
    cat "$reports/sick" >>"$LOG_DIR/sick"
    requeue || true
  fi
  exit 3
}

# --- data on the nodes' own disks ---

# stage DIR: copies a directory of shards below $DEHVF_STAGE on every node, once, and prints where; DIR itself where
# nothing is to be staged.
stage() {
  if [ -z "${DEHVF_STAGE:-}" ] || [ ! -d "$1" ]; then
    echo "$1"
    return
  fi
  local there
  there="$DEHVF_STAGE/$(realpath "$1" | sha256sum | cut -c1-12)-$(basename "$1")"
  # shellcheck disable=SC2016  # expanded on the nodes
  srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c '
    cmp -s "$1/manifest.json" "$2/manifest.json" && exit
    part="$2.$SLURM_JOB_ID.$SLURM_PROCID.part"
    rm -rf "$part" "$2" && mkdir -p "$part" && cp -r "$1/." "$part" || exit
    mv -T "$part" "$2" 2>/dev/null && exit
    # Another job on this node may have been quicker.
    rm -rf "$part"
    cmp "$1/manifest.json" "$2/manifest.json"
  ' stage "$1" "$there" >&2 || return 1
  echo "$there"
}

# --- the end of a job ---

# flag NAME DEFAULT ARGUMENTS...: the value of the last `NAME VALUE` or `NAME=VALUE` among the arguments.
flag() {
  local name="$1" value="$2"
  shift 2
  while [ $# -gt 0 ]; do
    case "$1" in
      "$name") value="${2:-}" ;;
      "$name"=*) value="${1#*=}" ;;
    esac
    shift
  done
  echo "$value"
}

# The last step of a run that was written down; `start` before the first.
last_step() {
  local step
  step="$(tail -n 1 "$1/metrics.jsonl" 2>/dev/null | grep -o '"step": *[0-9]*' | grep -o '[0-9]*$' || true)"
  echo "${step:-start}"
}

# goes_on: whether the job still runs, or SLURM has put it back into the queue; not where it ends the job for good (scancel).
# Where SLURM does not answer it is asked for five minutes.
goes_on() {
  local state='' asked=0
  while [ -z "$state" ] && [ $((asked += 1)) -le 60 ]; do
    state="$(squeue -h -j "$SLURM_JOB_ID" -t all -o %T 2>/dev/null)" || sleep 5
  done
  [ "$state" = RUNNING ] || is_requeued
}

# finish CODE DIR: ends the job, or puts it back into the queue.
#   0, 2  done, or the user's mistake: ends. 74: nothing can be saved, and nothing could be in another start.
#   85    stopped on request (time limit, preemption): goes on; 138 and 143 before Python was able to say so.
#   other a failure: goes on, unless this job failed at this very step before, as DIR tells.
finish() {
  local code="$1" dir="$2" restarts="${SLURM_RESTART_COUNT:-0}" step failures="$2/failures.txt"
  case "$code" in
    0 | 2 | 74) exit "$code" ;;
  esac
  if ! goes_on; then exit "$code"; fi
  case "$code" in
    85 | 138 | 143) echo "stopped on request; the job goes on later" ;;
    *)
      step="$(last_step "$dir")"
      if grep -qs "^job $SLURM_JOB_ID .* step $step\$" "$failures"; then
        echo "error: failed twice at step $step (exit code $code); not requeued. Logs of the ranks: $LOG_DIR" >&2
        exit "$code"
      fi
      mkdir -p "$dir" && echo "job $SLURM_JOB_ID restart $restarts code $code step $step" >>"$failures"
      echo "failed at step $step with exit code $code; the job goes on from what was last saved" >&2
      ;;
  esac
  requeue || true
  exit "$code"
}

# train RECIPE ARGUMENTS...: what the training scripts do. With --check first, a look at everything that can be known on
# a login node, without a job.
train() {
  local recipe="$1" run_dir data code=0
  shift
  if [ "${1:-}" = --check ]; then
    shift
    DS_ACCELERATOR=cpu alone python dehvf_ds/train.py --deepspeed "$DS_CONFIG" --config "$recipe" "$@" --dry-run
    exit
  fi
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
    echo "error: these scripts requeue whole jobs, so no job arrays; submit a job for each run" >&2
    exit 2
  fi
  run_dir="$(flag --run_dir "${RUN_DIR:-runs/$(basename "$recipe" .yaml)}" "$@")"
  set -- --deepspeed "$DS_CONFIG" --config "$recipe" --run_dir "$run_dir" --train.timeout_minutes "$TIMEOUT_MINUTES" "$@"
  # USR1 (--signal, scancel) reaches the ranks alone; SIGTERM may reach this shell too, which has to outlive them.
  trap 'terminated=1' TERM
  trap : USR1
  if [ -n "${DEHVF_STAGE:-}" ]; then
    data="$(alone python -m dehvf_ds.config data.train "$@")" || exit 2
    data="$(stage "$data")" || finish 1 "$run_dir"
    set -- "$@" --data.train "$data"
  fi
  check_nodes "$@"
  launch python dehvf_ds/train.py "$@" || code=$?
  finish "$code" "$run_dir"
}

# evaluate ARGUMENTS...: what eval.sh does. eval.py writes its answers down as it goes and takes them up again.
evaluate() {
  local code=0
  trap 'terminated=1' TERM
  trap : USR1
  launch python dehvf_ds/eval.py "$@" || code=$?
  finish "$code" "$LOG_DIR"
}
