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
# Arguments go to train.py. The settings below are also taken from the environment (slurm/README.md). plan.py recommends
# this DeepSpeed JSON for GPUs of 80 GB, onto which it loads the weights of 13B; zero3.json and zero3_hpz.json, for
# smaller ones, load through 27 GB of host memory a node. --mem=0 asks for all that a node has.
RECIPE="${RECIPE:-coco_llama13b}"
DS_CONFIG="${DS_CONFIG:-ds_configs/zero2.json}"
# RUN_DIR=runs/coco_llama13b        results and checkpoints, on a file system that all nodes share
# DEHVF_VENV=$PWD/.venv             Python environment, or DEHVF_CONTAINER=image and DEHVF_MOUNTS=/data:/data
# DEHVF_STAGE=/tmp/shards           a folder on the nodes' own disks, to which the training shards are copied first

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$PWD}"
if [ ! -f slurm/env.sh ]; then
  echo "error: $PWD/slurm/env.sh: no such file; submit from the repository's root" >&2
  exit 2
fi
source slurm/env.sh

train "$RECIPE" "$@"
