"""A GGUF written again with changes: what a converter with a fault, or another option, would give."""

from pathlib import Path

import numpy as np
from gguf import GGUFWriter, LlamaFileType
from gguf.constants import GGMLQuantizationType, GGUFValueType
from gguf.quants import quantize as quantize_blocks

from pyengine.files.gguf import GGUF, dequantize

Q8_0, BLOCK = GGMLQuantizationType.Q8_0, 32


def rewrite(source, destination, metadata=None, tensors=None, drop=()):
    """Copy a GGUF.  metadata: {key: (value, GGUFValueType[, of an array's elements]) or None to leave out};
    tensors: {name: (stored array, GGMLQuantizationType)} changed or added; drop: names left out."""
    file = GGUF.open(source)
    metadata = dict(metadata or {})
    architecture, *_ = metadata.pop("general.architecture", (file.metadata["general.architecture"], None))
    writer = GGUFWriter(destination, architecture)
    _write_metadata(writer, file, metadata)
    stored = {name: (t.data, t.type) for name, t in file.tensors.items() if name not in drop}
    for name, (data, kind) in (stored | (tensors or {})).items():
        if kind == GGMLQuantizationType.BF16:
            data = data.view(np.uint8)
        raw = kind not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind if raw else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return destination


def _write_metadata(writer, file, changes):
    for key in file.metadata:
        if key in changes or key in ("general.architecture",):
            continue
        kind = file.metadata.type_of(key)
        value = file.metadata[key]
        if kind.kind == GGUFValueType.ARRAY:
            writer.add_key_value(
                key,
                list(np.asarray(value).tolist()) if kind.element != GGUFValueType.STRING else value,
                GGUFValueType.ARRAY,
                sub_type=kind.element,
            )
        else:
            writer.add_key_value(key, value, kind.kind)
    for key, change in changes.items():
        if change is not None:
            value, kind, *element = change
            writer.add_key_value(
                key, value, kind, *((element or [GGUFValueType.BOOL]) if kind == GGUFValueType.ARRAY else [])
            )


def split_gguf(source, stem, parts):
    """The tensors of a GGUF in several files, as llama.cpp splits them: all metadata in the first."""
    names = list(GGUF.open(source).tensors)
    for i, part in enumerate(parts):
        numbers = {
            "split.no": (i, GGUFValueType.UINT16),
            "split.count": (len(parts), GGUFValueType.UINT16),
            "split.tensors.count": (len(names), GGUFValueType.INT32),
        }
        path = Path(f"{stem}-{i + 1:05}-of-{len(parts):05}.gguf")
        rewrite(source, path, metadata=numbers, drop=[n for n in names if n not in part])


def write_q8_0(source, destination) -> Path:
    """A GGUF with its BF16 and F16 matrices as Q8_0; a row that blocks do not fill stays."""
    tensors = {}
    for name, tensor in GGUF.open(source).tensors.items():
        if tensor.type.name in ("BF16", "F16") and tensor.shape[-1] % BLOCK == 0:
            tensors[name] = quantize_blocks(dequantize(tensor), Q8_0), Q8_0
    kind = int(LlamaFileType.MOSTLY_Q8_0), GGUFValueType.UINT32
    return rewrite(source, destination, metadata={"general.file_type": kind}, tensors=tensors)
