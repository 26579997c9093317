"""From a task to requests, from requests to scores, from scores to metrics and paired statistics."""
