"""What travels with a quantized checkpoint so that transformers can load it.

`modeling_pyengine.py` is copied into every directory that `pyengine quantize` writes.  It imports
nothing of pyengine: who loads the checkpoint needs torch and transformers, and not this package.
"""
