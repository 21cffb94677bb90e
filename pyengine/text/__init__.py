"""The text engine: prompts and messages in, text out."""
