"""Scores by the paper's protocol (CFLD Sec. 4): of a model's images or of any method's."""
