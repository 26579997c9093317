"""The kinds of tasks. Each has one file with its settings, their validation and its preparation for a model."""
