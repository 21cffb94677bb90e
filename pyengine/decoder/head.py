"""The head for who needs the largest logits alone: fewer bytes are read, and the logits keep their bits.

The proof is in csrc/pyengine.h.  A smaller form of the head (Q5_0) gives each logit up to a proved bound;
the rows that can be among the largest are computed again from the head itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter

import numpy as np

from ..checkpoint.summary import stored_bytes
from ..checkpoint.tensor import Tensor
from ..core import ops
from ..core.matrices import GROUP, Matrix, as_matrix
from ..core.memory import available_memory
from ..core.threads import Pool
from ..errors import NonFiniteError
from ..files.ggml_blocks import BY_NAME

FORM = BY_NAME["Q5_0"]
TYPES = ("F32", "F16", "BF16", "Q8_0")  # of a head that the bound is proved for
MOST_BYTES = 0.75  # of the head's: what the smaller form may have
LEAST_BYTES = 32 << 20  # of the head: below it, to screen takes longer than to read
MOST_COLUMNS = 1 << 18  # of the proof
MOST_INPUT = 2.0**60  # the same, of the input's norm
STEP = 8192  # rows that are made at a time: a fraction of a second for all would be a pause in an answer
MOST_ROWS = 0.25  # of all: beyond, the whole head is computed
PAUSE = 256  # tokens, where the form takes longer than the head, or the rows that are left are too many
ENOUGH = 16  # tokens whose times are compared
UP = 1 + 2.0**-20


def form_bytes(head: Tensor) -> int:
    """Memory that the smaller form takes; 0: this head has none, because it would not pay."""
    if head.type not in TYPES or head.shape[-1] % FORM.elements or head.shape[-1] > MOST_COLUMNS:
        return 0
    rows, cols = head.shape
    nbytes = rows * (cols // FORM.elements * FORM.nbytes + 8)
    full = stored_bytes(head)
    return nbytes if full >= LEAST_BYTES and nbytes <= MOST_BYTES * full else 0


def screen_of(pool: Pool, head: Tensor, file_bytes: int) -> Screen | None:
    """None where it would not pay, or where memory is short: the file and the form must fit together."""
    nbytes = form_bytes(head)
    if not nbytes or available_memory() < file_bytes + 2 * nbytes:
        return None
    return Screen(pool, head)


class Screen:
    """The head in a smaller form, made while the first tokens are decoded.

    tokens, rows   so far: tokens that were asked for, rows of the head that they read
    form_tokens    those of the tokens that read the form
    nbytes         the form's memory
    """

    def __init__(self, pool: Pool, head: Tensor):
        self.pool, self.head, self.matrix = pool, head, as_matrix(head)
        rows, cols = head.shape
        self._data = np.empty((rows, cols // FORM.elements * FORM.nbytes), np.uint8)
        self._error, self._norm = np.empty(rows, np.float32), np.empty(rows, np.float32)
        self._form = Matrix(FORM.name, cols, self._data)
        self._made = 0  # rows
        self._pause = 0  # tokens
        self._shares = _Mean()  # of the rows that are left
        self._seconds, self._whole_seconds = _Mean(), _Mean()
        self.usable = True
        self.tokens = self.rows = self.form_tokens = 0

    @property
    def nbytes(self) -> int:
        return self._data.nbytes + self._error.nbytes + self._norm.nbytes

    @property
    def ready(self) -> bool:
        return self._made == len(self._data)

    def make(self) -> None:
        """The next STEP rows of the form.  A head that has none is not tried again."""
        stop = min(self._made + STEP, len(self._data))
        try:
            ops.screen_rows(self.pool, self.matrix, self._made, stop, self._data, self._error, self._norm)
            self._made = stop
        except NonFiniteError:
            self.usable = False

    def largest(self, x: np.ndarray, k: int) -> np.ndarray | None:
        """x float32 [1, cols], k >= 1 -> logits float32 [1, rows]: the k largest have their bits, and so
        has each that equals the least of them; the others too, or they are -inf.

        None: the caller must compute the whole head, by `whole`.
        """
        self.tokens += 1
        start = perf_counter()
        logits = self._screened(x, k) if self._may_screen(k) else None
        if logits is not None:
            self._seconds.add(perf_counter() - start)
            self._rest_if_slower()
        return logits

    def whole(self, compute: Callable[[], None]) -> None:
        """Compute the whole head, and note what it takes."""
        start = perf_counter()
        compute()
        self._whole_seconds.add(perf_counter() - start)
        self.rows += len(self._data)

    def _may_screen(self, k: int) -> bool:
        if not self.usable or k >= MOST_ROWS * len(self._data):
            return False
        if not self.ready:
            self.make()
            return False
        self._pause = max(0, self._pause - 1)
        return not self._pause

    def _screened(self, x: np.ndarray, k: int) -> np.ndarray | None:
        try:
            inputs = ops.Activations(self.pool, x, "lm_head input")
            inputs.quantize()
            factors = bound(x[0], inputs)
            if factors is None:
                return None
            self.form_tokens += 1
            nearly = ops.matmul(self.pool, self._form, inputs)
            first = ops.top_k(self.pool, nearly, k)[0] if k > 1 else nearly[0].argmax(keepdims=True)
        except NonFiniteError:  # the whole head says what is wrong
            return None
        low = self._exact(inputs, first).min()
        if not np.isfinite(low):
            return None
        keep = ops.screen(self.pool, nearly[0], self._error, self._norm, *factors, float(low))
        rows = np.flatnonzero(keep)
        self._shares.add(len(rows) / len(keep))
        if self._shares.mean > MOST_ROWS / 2:
            self._rest()
        if len(rows) > MOST_ROWS * len(keep):
            return None
        logits = np.full_like(nearly, -np.inf)
        logits[0, rows] = self._exact(inputs, rows)
        self.rows += len(first) + len(rows)
        return logits

    def _rest_if_slower(self) -> None:
        """Which is faster depends on the machine, and on what else it does; the ids do not."""
        enough = min(self._seconds.count, self._whole_seconds.count) >= ENOUGH
        if enough and self._seconds.mean > self._whole_seconds.mean:
            self._rest()

    def _rest(self) -> None:
        self._pause, self._shares, self._seconds = PAUSE, _Mean(), _Mean()

    def _exact(self, inputs: ops.Activations, rows: np.ndarray) -> np.ndarray:
        """Logits [n] of these rows: a row's bits do not depend on the rows beside it."""
        data = self.head.data[rows]
        return ops.matmul(self.pool, Matrix(self.head.type, self.head.shape[-1], data), inputs)[0]


class _Mean:
    """Of the last values: a value's weight halves with every eleven that come after it."""

    def __init__(self) -> None:
        self.mean, self.count = 0.0, 0

    def add(self, value: float) -> None:
        self.count += 1
        self.mean += (value - self.mean) / min(self.count, ENOUGH)


def bound(x: np.ndarray, inputs: ops.Activations) -> tuple[float, float, float] | None:
    """x float32 [cols], and `inputs` of it alone, quantized -> a, b, c of csrc/pyengine.h, as float32s.

    None: the proof leaves such an x out.
    """
    groups = inputs.scales.shape[1]
    exact = x.astype(np.float64)
    codes = inputs.q[0].reshape(groups, GROUP) * inputs.scales[0].astype(np.float64)[:, None]
    stored = codes.reshape(-1)[: len(x)]  # exact: 16 bits times 24
    length, stored_length, distance = (math.sqrt(v @ v) for v in (exact, stored, exact - stored))
    longest = max(length, stored_length)
    if not longest * UP < MOST_INPUT:
        return None
    rho = (groups + 8) * 2.0**-23
    exactly = stored_length * (1 + rho), 2 * rho * longest + distance, (groups + 2) * 2.0**-147
    a, b, c = (float(np.nextafter(np.float32(value * UP), np.float32(np.inf))) for value in exactly)
    return a, b, c
