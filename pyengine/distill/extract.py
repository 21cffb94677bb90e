"""Labels of documents into a data set, on one machine; a run that was killed is continued to the same bytes.

    job = Job.prepare(model, documents, LabelOptions(top_k=50), "packed", output="labels")
    job.run(model)

Each row is computed from an empty state.  The rows of a part share the passes of the model, which is faster
for short ones, and have the bits that each has alone.

Rows that are computed but whose part is not complete are in `DIR/.train-NNNNN.rows` (an Arrow stream), where
the output is on this machine's own file system: a kill costs the pass that was being computed.  In an
object store a kill costs the part.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files.whole import partial_name
from ..optional import require
from ..progress import already_done, progress
from . import parquet
from .codec import Layout, new_layout
from .documents import Documents, Row
from .labels import Labeller, LabelOptions
from .layout import DEFAULT_FRACTION_BITS, DESCRIPTION
from .parquet import Batch, Place, Schema, batch_of, part_name, schema_of, write_part
from .plan import (
    DEFAULT_PART_TOKENS,
    Description,
    Part,
    Plan,
    check_same,
    describe,
    make_plan,
    model_bytes,
    model_digest,
    rows_of_parts,
)


@dataclass
class Job:
    """A data set to write: what it will hold, and what of it is there.

    Nothing is computed or written before `run`.
    """

    documents: Documents
    options: LabelOptions
    plan: Plan
    description: Description
    place: Place

    @classmethod
    def prepare(
        cls,
        model: Any,
        documents: Documents,
        options: LabelOptions,
        layout: str = "packed",
        *,
        output: Any,
        fraction_bits: int = DEFAULT_FRACTION_BITS,
        part_tokens: int = DEFAULT_PART_TOKENS,
        filesystem: Any = None,
    ) -> Job:
        """Check everything that can be checked before the work: all documents, the options, the output.

        model: what `load` returns, or for Ray, a model that is only looked at.  Errors: InputError,
        FileFormatError.
        """
        checkpoint = model.checkpoint
        options.check(checkpoint.config.vocab_size)
        chosen = new_layout(layout, options, checkpoint.config.vocab_size, fraction_bits)
        place = Place.open(output, filesystem)
        earlier = _check_output(place)
        bar = progress(0, "read", " tokens")
        with bar:
            plan = make_plan(documents.check(), part_tokens, bar.update)
        with progress(model_bytes(checkpoint), "hash") as bar:
            digest = model_digest(checkpoint, bar.update)
        description = describe(checkpoint, model.arithmetic, options, chosen, documents, plan, digest)
        if earlier is not None:
            check_same(place.path(DESCRIPTION), description, earlier)
        return cls(documents, options, plan, description, place)

    @property
    def schema(self) -> Schema:
        return schema_of(self.description)

    def missing(self) -> list[Part]:
        """The parts whose files are not there."""
        there = self.place.parts()
        return [part for part in self.plan.parts if part_name(part.index) not in there]

    def begin(self) -> None:
        """Write the description, so that a continued run can be told from another one."""
        self.place.create()
        if DESCRIPTION not in self.place.names():
            self._write_description(self.description)
            if self.description["layout"]["name"] == "distillkit":
                from . import distillkit

                config = json.dumps(self.description["layout"]["config"], indent=2) + "\n"  # JSON is YAML
                self.place.write(distillkit.CONFIG_NAME, config.encode())

    def end(self) -> None:
        self._write_description(self.description | {"complete": True})

    def _write_description(self, description: Description) -> None:
        self.place.write(DESCRIPTION, (json.dumps(description, indent=2) + "\n").encode())

    def run(self, model: Any) -> int:
        """Compute the parts that are missing -> tokens computed.  InputError: another run writes there."""
        self.begin()
        with alone(self.place):
            return self._run(model)

    def _run(self, model: Any) -> int:
        missing, labeller = {part.index for part in self.missing()}, Labeller(model, self.options)
        schema, layout = self.schema, self.description["layout"]
        computed = 0
        done = sum(part.tokens for part in self.plan.parts if part.index not in missing)
        with progress(self.plan.tokens, "labels", " tokens") as bar:
            already_done(bar, done)
            for part, rows in rows_of_parts(self.documents, self.plan) if missing else ():
                if part.index not in missing:
                    continue
                with Journal(self.place, part.index, schema) as journal:
                    already_done(bar, sum(len(row.ids) for row in rows[: journal.rows]))
                    for row, batch in label_rows(labeller, rows[journal.rows :], schema, layout):
                        journal.append(batch)
                        bar.update(len(row.ids))
                        computed += len(row.ids)
                    write_part(self.place, part.index, journal.batches(), schema)
                    journal.remove()
        self.end()
        return computed


@contextmanager
def alone(place: Place) -> Iterator[None]:
    """InputError while another process of this machine is inside, in the same local directory."""
    if place.local is None:
        yield
        return
    descriptor = os.open(place.local, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{place.root}: want one run at a time, got another that writes there") from None
        yield
    finally:
        os.close(descriptor)


def label_rows(
    labeller: Labeller, rows: Sequence[Row], schema: Schema, layout: Layout
) -> Iterator[tuple[Row, Batch]]:
    """Each row with its record batch, in order, as they are computed."""
    labelled = labeller.label_many([(row.ids, row.document, row.start, row.following) for row in rows])
    for row, labels in zip(rows, labelled):
        yield row, batch_of(row, labels, schema, layout)


def _check_output(place: Place) -> Description | None:
    """What an earlier run wanted to write there; None: nothing is there.  InputError: something else is."""
    earlier = parquet.read_description(place)
    names = [name for name in place.names() if not name.endswith(".partial")]
    if earlier is None and names:
        raise InputError(
            f"{place.root}: want a new directory, or one with a {DESCRIPTION} of an earlier run, "
            f"got one with {names[0]}"
        )
    return earlier


class Journal:
    """The rows of a part that is not complete, kept on disk as they come, or in memory for an object store.

    rows: those that an earlier run has left, whole; half a row, which a kill leaves, does not count.
    """

    def __init__(self, place: Place, index: int, schema: Schema):
        self._schema = schema
        self._memory: list[Batch] = []
        self._path = place.local / f".{Path(part_name(index)).stem}.rows" if place.local else None
        self.rows = 0
        if self._path is not None:
            self._continue(self._path)

    def _continue(self, path: Path) -> None:
        """The whole rows of an earlier run go into a new file, which takes its place."""
        ipc = require("pyarrow.ipc", extra="distill", what="labels", package="pyarrow")
        fresh = partial_name(path)
        self._file = open(fresh, "wb")  # noqa: SIM115 (__exit__ closes it)
        self._writer = ipc.new_stream(self._file, self._schema)
        for batch in _stored(path, self._schema):
            self._writer.write_batch(batch)
            self.rows += 1
        self._file.flush()
        os.replace(fresh, path)

    def append(self, batch: Batch) -> None:
        if self._path is None:
            self._memory.append(batch)
            return
        self._writer.write_batch(batch)
        self._file.flush()

    def batches(self) -> Iterator[Batch]:
        """All rows, in order."""
        return iter(self._memory) if self._path is None else _stored(self._path, self._schema)

    def remove(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._path is not None:
            self._writer.close()
            self._file.close()


def _stored(path: Path, schema: Schema) -> Iterator[Batch]:
    """The whole record batches of a stream that may end anywhere."""
    ipc = require("pyarrow.ipc", extra="distill", what="labels", package="pyarrow")
    if not path.exists():
        return
    with open(path, "rb") as file:
        try:
            stream = ipc.open_stream(file)
            if not stream.schema.equals(schema, check_metadata=True):
                return
            while True:
                yield stream.read_next_batch()
        except (StopIteration, OSError, ValueError):  # the end, or half a batch
            return
