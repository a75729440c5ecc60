"""Person photos to training shards: dataset adapters, keypoints, pairs, Ray Data jobs."""
