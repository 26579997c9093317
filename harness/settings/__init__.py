"""From the words of a command line to checked settings: composition, overrides, validation, one-line errors."""
