"""One module per dataset: each lists its photos and knows nothing else."""
