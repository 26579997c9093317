"""Schema, atomic parquet store, provenance, report and plots. Imports no torch."""
