"""Tables of any measurement: schema, atomic parquet store, provenance, and what reports share. It imports no torch."""
