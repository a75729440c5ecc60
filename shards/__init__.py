"""The shard format: one definition for writers, readers and documentation."""
