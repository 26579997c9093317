"""The engine runs units of any kind: manifest, states, the run loop, ranks, shards, Slurm, status."""
