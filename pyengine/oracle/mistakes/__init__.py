"""Known mistakes of engines for this model family, each a small change of one step of the reference."""
