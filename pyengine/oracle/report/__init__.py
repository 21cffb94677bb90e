"""A verdict as text, Markdown, JUnit XML or a picture."""
