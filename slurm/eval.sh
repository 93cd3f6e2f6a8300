#!/usr/bin/env bash
#SBATCH --job-name=dehvf-eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@60
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
##SBATCH --account=
##SBATCH --partition=

# Evaluates a run, an adapter or a merged model, one task a GPU. From the repository's root:
#
#     sbatch slurm/eval.sh --model runs/coco_llama13b --data data/coco/test
#
# Arguments go to eval.py. Before its time limit, and when it is preempted, the job goes back into the queue; it goes on
# where it was, as it does when it is submitted again. More settings: slurm/README.md.

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$PWD}"
[ -f slurm/env.sh ] || { echo "error: no $PWD/slurm/env.sh; submit from the repository's root" >&2; exit 2; }
source slurm/env.sh
supervise eval "$@"
