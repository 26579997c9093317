"""The scoring pass: from the requests of a task to scores, and from scores to metrics and paired statistics."""
