"""Programs against the published clients. A package, so that each finds its neighbour and nothing else."""
