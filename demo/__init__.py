"""The whole way on drawn persons: photos, shards, training, pictures, scores, in one command."""
