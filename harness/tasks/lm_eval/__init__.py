"""The adapter to lm-evaluation-harness, which takes its tasks, prompts, filters and metrics but not its models."""
