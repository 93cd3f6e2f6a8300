# shellcheck shell=bash
# Sourced by the job scripts: what ranks are given unless it was set before `sbatch`, and the start of the supervisor
# (dehvf_ds/cluster/supervise.py), which does the rest.

# srun passes on what is set here, also where sbatch was told not to (`--export=NONE`, or a few names).
export SLURM_EXPORT_ENV=ALL

# The job's own log is sbatch's --output; here each rank has its file, and NCCL's flight recorder its dumps.
export LOG_DIR="${LOG_DIR:-$PWD/slurm-logs/${SLURM_JOB_NAME:-login}-${SLURM_JOB_ID:-0}}"
export TORCH_FR_DUMP_TEMP_FILE="$LOG_DIR/flight-" TORCH_NCCL_DEBUG_INFO_TEMP_FILE="$LOG_DIR/flight-"
# On a timeout every rank writes which collectives it entered, last ones first to differ.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
# Warnings name the interface or the peer that failed; INFO would be pages a rank. NCCL_SOCKET_IFNAME and
# GLOO_SOCKET_IFNAME choose the interface where a node has several, NCCL_IB_HCA the InfiniBand adapters.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Loader workers are processes of their own; a thread pool in each would oversubscribe the node.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}" PYTHONUNBUFFERED=1

if [ -n "${DEHVF_MODULES:-}" ]; then
  # shellcheck disable=SC2086  # several names
  module load $DEHVF_MODULES
fi
# An image has its own Python for the ranks; the supervisor then takes the node's.
activate="${DEHVF_VENV:-$PWD/.venv}/bin/activate"
if [ -z "${DEHVF_CONTAINER:-}" ] && [ ! -f "$activate" ]; then
  echo "error: $activate: no such file; make .venv (README), or name an environment in DEHVF_VENV" >&2
  exit 2
fi
# shellcheck disable=SC1090
if [ -z "${DEHVF_CONTAINER:-}" ]; then source "$activate"; fi

supervise() {
  exec python3 -S dehvf_ds/cluster/supervise.py "$@"
}
