#!/bin/bash
#SBATCH --job-name=trunkline
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

# One run that Slurm stops and starts until it is done. Call it in the root of the clone, with its environment active:
#
#     sbatch docs/examples/slurm.sh --config fluid/large --output-dir runs/fluid/large
#
# One task is one rank and has one GPU. Five minutes before the time limit each task hears USR1. The run saves and ends
# with status 75. Then the job asks for its next turn. Every other status ends the job.

# Where a site kills a step at its first task that ends, other tasks could not finish, and the status would be lost.
srun --kill-on-bad-exit=0 python launchers/train.py --resume auto "$@"
status=$?
if [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
