"""Studies, the runner, shards."""
