"""Scores of a trained model, each with its interval."""
