"""The C core as Python sees it: threads, matrices, one checked wrapper per operation."""
