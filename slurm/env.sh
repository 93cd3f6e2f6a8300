# Sourced by the job scripts: what every rank's environment needs. Everything can be set before `sbatch`.

# The Python environment; `make test` or `make demo` makes .venv.
source "${DEHVF_VENV:-$SLURM_SUBMIT_DIR/.venv}/bin/activate"

# All ranks meet at the first node; the port follows from the job, so that two jobs do not collide.
export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"

# An error in one rank ends the others instead of leaving them waiting.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# Loader workers are processes of their own; a thread pool in each would oversubscribe the node.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export PYTHONUNBUFFERED=1
