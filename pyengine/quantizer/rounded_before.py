"""Matrices that an earlier run rounded, of which the files are complete: a run that continues reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..checkpoint.layout import unpack_int4
from ..checkpoint.writer import Sink
from .plan import PlannedParameter
from .weighted import Rounded


class RoundedBefore:
    """before(name, expert) -> a matrix of the source, or one expert's, as it was written; None: it was not.

    codes int8 [rows, cols], scales float16 [rows, n_groups], copied from the file.
    """

    def __init__(self, parameters: Sequence[PlannedParameter], sink: Sink):
        self.sink = sink
        self._where: dict[str, tuple[PlannedParameter, slice]] = {}  # the rows of each source
        for parameter in parameters:
            first = 0
            for tensor in parameter.sources if parameter.bits else ():
                rows = tensor.shape[-2]
                self._where[tensor.name] = parameter, slice(first, first + rows)
                first += rows

    def __call__(self, name: str, expert: int | None) -> Rounded | None:
        parameter, rows = self._where[name]
        codes, scales = (self.sink.read(entry.name) for entry in parameter.entries)
        if codes is None or scales is None:
            return None
        if expert is not None:
            codes, scales = codes[expert], scales[expert]
        codes = unpack_int4(codes[rows]) if parameter.bits == 4 else np.array(codes[rows])
        return codes, np.array(scales[:, rows].T, order="C")
