"""Coarse-to-fine latent diffusion: model, diffusion maths, pipeline, pose rendering."""
