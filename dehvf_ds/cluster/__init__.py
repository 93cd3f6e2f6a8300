"""What a run needs of machines: a SLURM job's life, the health of its nodes, the environment of each."""
