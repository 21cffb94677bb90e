"""A GGUF with every matrix in F32: the twin of a quantized file."""

from gguf.constants import GGMLQuantizationType as T
from rewrite import rewrite

from pyengine.files.gguf import GGUF, dequantize


def widened(source, path):
    """The same file in float32, with the scales beside NVFP4's tensors multiplied into them -> path."""
    file = GGUF.open(source)
    beside = [name for name in file.tensors if name.endswith((".scale", ".input_scale"))]
    tensors = {}
    for name, tensor in file.tensors.items():
        scale = file.tensors.get(name.removesuffix("weight") + "scale")
        if name not in beside:
            values = dequantize(tensor)
            tensors[name] = (values if scale is None else values * dequantize(scale)), T.F32
    return rewrite(source, path, tensors=tensors, drop=beside)
