"""A data set of labels into the vocabulary of a student: `alignment.py` row by row, file by file.

    relabelling = Relabelling.prepare("labels", teacher, student, output="for-the-student")
    relabelling.run()

Every file of the source becomes one file of the same name.  A file appears whole, so that a run that was
ended continues with the first one that is missing, to the same bytes.  A row keeps its document; `start`
counts the student's tokens of the document.  The layout is "lists": rows have different numbers of labels.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..progress import progress
from .alignment import Alignment, align, place_labels, place_mask
from .documents import Row, tokenizer_digest
from .labels import Labels
from .layout import DESCRIPTION
from .parquet import LabelledRow, Place, batch_of, read_description, read_part, schema_of, write_part
from .plan import Description, check_same
from .vocabulary import VocabularyMap


@dataclass
class Relabelling:
    """Nothing is computed or written before `run`."""

    source: Place
    description: Description
    place: Place
    vocabularies: VocabularyMap
    names: list[str]

    @classmethod
    def prepare(cls, source: Any, vocabularies: VocabularyMap, *, output: Any) -> Relabelling:
        """source, output: directories or URIs.

        Errors: InputError where the source is no complete data set, was made with another tokenizer than the
        map's teacher, or the output is another data set; FileFormatError.
        """
        came, place = Place.open(source), Place.open(output)
        found = read_description(came)
        if found is None:
            raise InputError(f"{source}: want a data set of labels, got no {DESCRIPTION}")
        names = list(came.parts())
        if not found.get("complete") or not names:
            raise InputError(f"{source}: want a complete data set, got one that `labels` has not finished")
        if "student" in found:
            raise InputError(
                f"{source}: want the labels of the teacher's vocabulary, got those of a student's"
            )
        _check_teacher(came, found, vocabularies)
        layout = {"name": "lists", "sampled": found["layout"].get("sampled", False)}
        description = found | {
            "complete": False,
            "layout": layout,
            "tokenizer": {"digest": tokenizer_digest(vocabularies.student)},
            "student": {
                "vocab_size": vocabularies.student_size,
                "places": hashlib.sha256(vocabularies.places.astype("<i4").tobytes()).hexdigest(),
                "ids": vocabularies.counts,
                "source": hashlib.sha256(came.read(DESCRIPTION)).hexdigest(),
            },
        }
        earlier = read_description(place)
        if earlier is not None:
            check_same(place.path(DESCRIPTION), description, earlier)
        elif place.names():
            raise InputError(f"{place.root}: want a new directory, got one with {place.names()[0]}")
        return cls(came, description, place, vocabularies, names)

    def run(self) -> Counter[str]:
        """-> counts of the student's rows in the files that were written now: "placed", `alignment.REASONS`,
        "lost" (all labels of the row were); and "left_out": special tokens that the student does not have."""
        self.place.create()
        there, counts = self.place.parts(), Counter[str]()
        if DESCRIPTION not in self.place.names():
            self._describe(self.description)
        schema = schema_of(self.description)
        starts: dict[str, int] = {}
        with progress(len(self.names), "relabel", " files") as bar:
            for index, name in enumerate(self.names):
                if name not in there:
                    write_part(self.place, index, self._batches(name, schema, starts, counts), schema)
                else:
                    self._skip(name, starts)
                bar.update(1)
        self._describe(self.description | {"complete": True})
        return counts

    def _describe(self, description: Description) -> None:
        self.place.write(DESCRIPTION, (json.dumps(description, indent=2) + "\n").encode())

    def _batches(self, name: str, schema: Any, starts: dict[str, int], counts: Counter[str]) -> Iterator[Any]:
        layout = read_description(self.source)["layout"]  # type: ignore[index]
        for row in read_part(self.source, name, layout):
            new, labels = self.relabel(row, starts, counts)
            yield batch_of(new, labels, schema, self.description["layout"])

    def relabel(self, row: LabelledRow, starts: dict[str, int], counts: Counter[str]) -> tuple[Row, Labels]:
        """starts: the student's tokens of each document so far, where a document has several rows."""
        alignment = align(row.input_ids, self.vocabularies)
        labels = place_labels(row.labels, alignment, self.vocabularies)
        lost = int(((alignment.rows >= 0) & (labels.ids[:, 0] < 0)).sum())
        counts.update(alignment.counts)
        counts.update(placed=-lost, lost=lost, left_out=alignment.left_out)
        mask = place_mask(row.assistant_masks, alignment)
        return Row(row.document, _start(row, alignment, starts), alignment.student_ids, mask, None), labels

    def _skip(self, name: str, starts: dict[str, int]) -> None:
        for row in read_part(self.place, name, self.description["layout"]):
            starts.clear()
            starts[row.document] = row.start + len(row.input_ids)


def _start(row: LabelledRow, alignment: Alignment, starts: dict[str, int]) -> int:
    """Rows of one document follow each other: only the last document is remembered."""
    start = starts.get(row.document, 0) if row.start else 0
    starts.clear()
    starts[row.document] = start + len(alignment.student_ids)
    return start


def _check_teacher(source: Place, found: Description, vocabularies: VocabularyMap) -> None:
    tokenizer, size = found["tokenizer"], found["model"]["vocab_size"]
    if size != vocabularies.teacher_size:
        raise InputError(
            f"{source.path(DESCRIPTION)}: model.vocab_size: want the teacher's "
            f"{vocabularies.teacher_size:,}, got {size:,}"
        )
    if tokenizer is not None and tokenizer["digest"] != tokenizer_digest(vocabularies.teacher):
        raise InputError(
            f"{source.path(DESCRIPTION)}: tokenizer: want the teacher's, got another one's: "
            f"{tokenizer['digest']}"
        )
