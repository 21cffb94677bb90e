"""Measurements of a model: perplexity and speed."""
