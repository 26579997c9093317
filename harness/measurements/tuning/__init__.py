"""`harness tune`: fine-tune a model before or after a region of its spectrum is removed, from several seeds."""
