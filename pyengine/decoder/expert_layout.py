"""Where the bytes of routed experts are in their files, and in the slots of an `ExpertCache`."""

from __future__ import annotations

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.tensor import Tensor
from ..core.expert_cache import PAGE, ExpertLayer
from ..core.matrices import Matrix, as_matrix
from ..errors import InputError
from ..files.ggml_blocks import BY_NAME

FLOAT16_EXPONENT = 0x7C00


def stacks_of(checkpoint: Checkpoint, index: int) -> list[Tensor]:
    """gate, up, down of a layer's routed experts."""
    parts = ("gate_proj", "up_proj", "down_proj")
    return [checkpoint.tensors[f"model.layers.{index}.mlp.experts.{part}"] for part in parts]


def expert_layers(checkpoint: Checkpoint, check: bool) -> dict[int, ExpertLayer]:
    layers = {}
    for index in range(checkpoint.config.num_hidden_layers):
        if checkpoint.config.has_experts(index):
            routed = [as_matrix(tensor) for tensor in stacks_of(checkpoint, index)]
            layers[index] = _layer_of(routed, checkpoint.file.maps, check)
    return layers


def _layer_of(routed: list[Matrix], maps, check: bool) -> ExpertLayer:
    """The reads of each expert: its bytes in the file and no others, neighbours in one read.

    check: whether scales are checked when they are read.  InputError: weights that are not in the files as
    the C core reads them.
    """
    # Columns: gate, up, down, and their scales where there are some.
    spans = [spans_of(matrix.data) for matrix in routed]
    spans += [spans_of(matrix.scales) for matrix in routed if matrix.scales is not None]
    begin, nbytes = (np.stack([span[i] for span in spans], axis=1) for i in range(2))
    file, offset = places_in_files(begin, nbytes, maps)
    order = np.argsort(offset[0], kind="stable")
    reads, at_of = [], np.empty_like(offset)
    at = 0
    for group in _neighbours(file, offset, nbytes, order):
        start = offset[:, group].min(axis=1)
        length = (offset[:, group] + nbytes[:, group]).max(axis=1) - start
        reads.append(np.stack([file[:, group[0]], start, length, np.full_like(start, at)], axis=1))
        at_of[:, group] = at + (start % PAGE + -start)[:, None] + offset[:, group]
        at += int((-(-(start % PAGE + length) // PAGE)).max()) * PAGE
    places = np.full((len(begin), 6), -1, np.int64)
    places[:, : at_of.shape[1]] = at_of
    if at_of.shape[1] not in (3, 6):  # one of the three has no scales
        raise InputError("experts: want gate, up and down of one kind to read them one by one")
    return ExpertLayer(np.stack(reads, axis=1), places, _words(routed, nbytes, check))


def spans_of(array) -> tuple[np.ndarray, np.ndarray]:
    """Address of each expert's first byte, and bytes to its last one."""
    one = array[0]
    length = sum((n - 1) * stride for n, stride in zip(one.shape, one.strides)) + one.itemsize
    if isinstance(array, tuple):
        first = np.array([part.__array_interface__["data"][0] for part in array], np.int64)
    else:
        first = (
            array.__array_interface__["data"][0] + np.arange(len(array), dtype=np.int64) * array.strides[0]
        )
    return first, np.full(len(array), length, np.int64)


def places_in_files(begin, nbytes, maps) -> tuple[np.ndarray, np.ndarray]:
    """Index of the file and offset in it of each span."""
    order = sorted(range(len(maps)), key=lambda i: maps[i].address)
    address = np.array([maps[i].address for i in order], np.int64)
    size = np.array([len(maps[i]) for i in order], np.int64)
    place = np.maximum(np.searchsorted(address, begin, side="right") - 1, 0)
    offset = begin - address[place]
    if (offset < 0).any() or (offset + nbytes > size[place]).any():
        raise InputError("experts: want weights that the engine reads as they are in the file")
    return np.array(order, np.int64)[place], offset


def _neighbours(file, offset, nbytes, order) -> list[list[int]]:
    """Columns by offset; those that touch in every expert together."""
    groups = [[int(order[0])]]
    for column in map(int, order[1:]):
        end = (offset[:, groups[-1]] + nbytes[:, groups[-1]]).max(axis=1)
        start = offset[:, groups[-1]].min(axis=1)
        touches = (offset[:, column] <= end) & (offset[:, column] >= start)
        if (touches & (file[:, column] == file[:, groups[-1][0]])).all():
            groups[-1].append(column)
        else:
            groups.append([column])
    return groups


def _words(routed: list[Matrix], nbytes, check: bool) -> np.ndarray:
    rows = []
    for part, matrix in enumerate(routed if check else []):
        block = BY_NAME.get(matrix.kind)
        if block is None:  # INT8, INT4: a span of float16 scales
            rows.append((3 + part, 0, nbytes[0, 3 + part] // 2, 2, 2, FLOAT16_EXPONENT))
            continue
        blocks = matrix.rows * matrix.cols // block.elements
        rows += [
            (part, at, blocks, block.nbytes, np.dtype(dtype).itemsize, bits)
            for at, dtype, bits in block.words
        ]
    return np.array(rows, np.int64).reshape(-1, 6)
