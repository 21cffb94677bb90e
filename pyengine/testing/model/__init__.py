"""Checks of a model: a pytest fixture and an assertion over traces."""
