"""How units are run, whatever they are: manifest, states, the run loop, ranks, shards, Slurm, status."""
