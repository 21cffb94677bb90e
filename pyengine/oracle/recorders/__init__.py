"""Traces of other engines."""
