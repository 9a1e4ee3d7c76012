#!/bin/bash
# A training over several nodes of a SLURM cluster, one task a node, torch's launcher in each:
#   sbatch --nodes 4 training/configs/slurm.sh --train_data_dir /data/images --output_dir /shared/runs/mine
# All nodes see the checkout, the data and the runs folder. SLURM's signal ten minutes before the end saves and leaves; submit it again with
# --resume_from_checkpoint latest to go on, with any number of nodes whose processes and accumulation make the same number of images a step.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
set -eu
master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=570  # else torch kills after 30 s what is still saving
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$master:29500" \
    training/train_diffusion.py "$@"
