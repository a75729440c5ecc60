"""Streaming loader and DeepSpeed trainer."""
