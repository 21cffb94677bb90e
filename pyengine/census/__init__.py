"""What models do on given texts: which experts they use, and where two models part.

texts.py    the texts, with their digests and their tokens
counts.py   the counts and sums, each with its order
census.py   the experts of a model, or of two, as figures
probe.py    the distance of two models, module by module
plots.py    both as plots
"""
