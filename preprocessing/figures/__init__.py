"""Drawn persons: clothed, articulated figures with exact keypoints, in place of a dataset."""

from preprocessing.figures.figure import Figure, draw_figure, find_silhouette, pose_figure

__all__ = ["Figure", "draw_figure", "find_silhouette", "pose_figure"]
