#!/usr/bin/env bash
#SBATCH --job-name=dehvf-coco
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
##SBATCH --account=
##SBATCH --partition=

# Trains on COCO Captions, one task a GPU. From the repository's root:
#
#     sbatch slurm/train_coco.sh
#     sbatch --nodes 4 slurm/train_coco.sh --train.micro_batch_size 8
#     bash slurm/train_coco.sh --check            # on the login node, before
#
# Arguments go to train.py; the environment sets the rest (slurm/README.md). --mem=0 asks for all that a node has.
# plan.py recommends this DeepSpeed JSON for GPUs of 80 GB; smaller ones want zero3.json, or zero3_hpz.json over several
# nodes.
RECIPE="${RECIPE:-coco_llama13b}"
DS_CONFIG="${DS_CONFIG:-ds_configs/zero2.json}"
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$PWD}"
[ -f slurm/env.sh ] || { echo "error: no $PWD/slurm/env.sh; submit from the repository's root" >&2; exit 2; }
source slurm/env.sh
supervise train --deepspeed "$DS_CONFIG" --config "$RECIPE" "$@"
