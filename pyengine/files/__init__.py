"""Readers and writers of the file formats: they know bytes and names, and no model."""
