"""The measurement of ablations. Its unit is the cell: one ablation measured on one task of one model."""
