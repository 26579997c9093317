"""A region rule, a kind of task, a model family and a measurement, added to the harness from outside."""
