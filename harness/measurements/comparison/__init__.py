"""Comparisons of studies that were measured before, with each other or with published numbers, from parquet alone."""
