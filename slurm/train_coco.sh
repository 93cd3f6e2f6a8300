#!/usr/bin/env bash
#SBATCH --job-name=dehvf-coco
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append

# Trains on COCO Captions, one task a GPU. From the repository's root:
#
#     sbatch slurm/train_coco.sh
#     sbatch --nodes 4 slurm/train_coco.sh --train.micro_batch_size 8
#
# Arguments go to train.py. RECIPE and DS_CONFIG in the environment choose others than these, which plan.py
# recommends for 80 GB GPUs. While weights load, zero2.json takes some 213 GB of host memory a node; zero3.json and
# zero3_hpz.json, for smaller GPUs or hosts, 27 GB. --mem=0 asks for all that a node has.
RECIPE="${RECIPE:-coco_llama13b}"
DS_CONFIG="${DS_CONFIG:-ds_configs/zero2.json}"

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch from the repository root}"
if [ ! -f slurm/env.sh ]; then
  echo "error: $SLURM_SUBMIT_DIR/slurm/env.sh: no such file; run sbatch from the repository root" >&2
  exit 2
fi
source slurm/env.sh

# srun does not inherit --cpus-per-task on every version of SLURM.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  python dehvf_ds/train.py --deepspeed "$DS_CONFIG" --config "$RECIPE" "$@"
