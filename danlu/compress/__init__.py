"""Smaller models: weights in fewer bits, fewer weights, thinner matrices.  Each changes a model in place."""
