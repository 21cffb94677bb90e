"""The same data set by many machines: Ray Data maps parts over actors that hold the model (extra `ray`).

    run_on_ray(job, model_path, address="local", workers=2)

A batch is one part (plan.py), so a file's bytes do not depend on who computes it: any number of workers, and
none, give the same files.  Each actor writes its part's file itself, through pyarrow's filesystem, so the
output must be a place that every machine sees: an object store, or a shared folder.  An actor that is lost
is restarted, and Ray gives its part to an actor again; parts that are written are not computed again, also
not by a later run.

The driver reads and tokenizes the documents.  Token ids (about 5 bytes per token) wait in Ray's object
store, which spills to disk; labels never pass through the driver.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..load import load
from ..optional import require
from ..progress import already_done, progress
from .documents import Row
from .extract import Job, alone, label_rows
from .labels import Labeller, LabelOptions
from .parquet import Place, schema_of, write_part
from .plan import Description, Part, model_digest, rows_of_parts

LOCAL = "local"
CONNECT_SECONDS = 10


class LabelParts:
    """A callable for `Dataset.map_batches`: the rows of one part -> its figures; writes the part's file."""

    def __init__(
        self,
        model: str,
        arithmetic: str,
        threads: int,
        options: LabelOptions,
        description: Description,
        place: Place,
    ):
        self.model = load(model, arithmetic, threads)
        self.description, self.place, self.schema = description, place, schema_of(description)
        self.labeller = Labeller(self.model, options)
        self.digest = model_digest(self.model.checkpoint)

    def __call__(self, table: Any) -> Any:
        pa: Any = require("pyarrow", extra="ray", what="Ray")
        self._check_model()
        [part] = set(table.column("part").to_pylist())
        [rows] = set(table.column("rows").to_pylist())
        if rows != table.num_rows:
            raise InputError(f"part {part}: want its {rows} rows in one batch, got {table.num_rows}")
        layout = self.description["layout"]
        labelled = label_rows(self.labeller, list(_rows_of(table)), self.schema, layout)
        batches = (batch for _, batch in labelled)
        write_part(self.place, part, batches, self.schema)
        tokens = sum(len(ids) for ids in table.column("input_ids"))
        return pa.table({"part": [part], "tokens": [tokens]})

    def _check_model(self) -> None:
        wanted = self.description["model"]["digest"]
        if self.digest != wanted:
            raise InputError(
                f"{self.model.checkpoint.path}: want the model with the digest {wanted}, "
                f"got {self.digest} on {os.uname().nodename}"
            )


def run_on_ray(
    job: Job, model: str | os.PathLike[str], *, address: str = LOCAL, workers: int = 1, threads: int = 1
) -> int:
    """Compute the parts that are missing -> tokens computed.

    model    its path, the same on every machine
    address  of a cluster: "auto", "HOST:PORT", "ray://HOST:PORT"; "local" starts one here, and stops it
    workers  actors; threads: of each, and the processors that it asks Ray for
    Errors: InputError: no cluster there, or a fault of a worker, in one line.
    """
    ray: Any = require("ray", extra="ray", what="Ray")
    data: Any = require("ray.data", extra="ray", what="Ray")
    started = _connect(ray, address, workers * threads)
    try:
        job.begin()
        path = Path(model)  # or a name that `load` knows
        with alone(job.place):
            return _run(ray, data, job, str(path.absolute() if path.exists() else path), workers, threads)
    except ray.exceptions.RayError as error:
        raise InputError(f"Ray: {_cause(error)}") from None
    finally:
        if started:
            ray.shutdown()


def _connect(ray: Any, address: str, processors: int) -> bool:
    """-> whether this call has connected, and so must disconnect."""
    if ray.is_initialized():
        return False
    _check_reachable(address)
    # More workers than processors take turns; a cluster without enough of them would wait for ever.
    where = {"num_cpus": max(processors, os.cpu_count() or 1)} if address == LOCAL else {}
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="error",
            include_dashboard=False if address == LOCAL else None,
            **where,
        )
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"--ray: want the address of a cluster, got {address}: {error}") from None
    return True


def _check_reachable(address: str) -> None:
    """InputError at once for a HOST:PORT where nobody listens; Ray would try for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return  # local, auto, or a name that Ray knows
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"--ray: want the address of a cluster, got {address}: {error}") from None


def _run(ray: Any, data: Any, job: Job, model: str, workers: int, threads: int) -> int:
    missing = {part.index for part in job.missing()}
    computed = 0
    if missing:
        data.DataContext.get_current().enable_progress_bars = False  # ours has tokens
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        tables = (
            _table(part, rows)
            for part, rows in rows_of_parts(job.documents, job.plan)
            if part.index in missing
        )
        parts = data.from_arrow_refs([ray.put(table) for table in tables])
        done = parts.map_batches(
            LabelParts,
            fn_constructor_args=(
                model,
                job.description["arithmetic"],
                threads,
                job.options,
                job.description,
                job.place,
            ),
            batch_size=None,
            batch_format="pyarrow",
            compute=data.ActorPoolStrategy(size=min(workers, len(missing))),
            num_cpus=threads,
        )
        with progress(job.plan.tokens, "labels", " tokens") as bar:
            already_done(bar, sum(part.tokens for part in job.plan.parts if part.index not in missing))
            for figures in done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                tokens = sum(figures.column("tokens").to_pylist())
                bar.update(tokens)
                computed += tokens
    job.end()
    return computed


def _table(part: Part, rows: list[Row]) -> Any:
    pa: Any = require("pyarrow", extra="ray", what="Ray")
    return pa.table(
        {
            "part": pa.array([part.index] * len(rows), pa.int32()),
            "rows": pa.array([part.rows] * len(rows), pa.int32()),
            "document": [row.document for row in rows],
            "start": pa.array([row.start for row in rows], pa.int32()),
            "input_ids": pa.array([row.ids for row in rows], pa.list_(pa.int32())),
            "assistant_masks": pa.array([row.mask for row in rows], pa.list_(pa.int8())),
            "following": pa.array([row.following for row in rows], pa.int32()),
        }
    )


def _rows_of(table: Any) -> Any:
    for i in range(table.num_rows):
        document, start, ids, mask, following = (
            table.column(name)[i]
            for name in ("document", "start", "input_ids", "assistant_masks", "following")
        )
        yield Row(
            document.as_py(), start.as_py(), ids.values.to_numpy(), mask.values.to_numpy(), following.as_py()
        )


def _cause(error: BaseException) -> str:
    """The message of our own error in the traceback that Ray has put into its message; else its last line."""
    ours = re.findall(r"^pyengine\.errors\.\w+: (.+)$", str(error), re.MULTILINE)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return str([*lines, *ours][-1]) if lines else type(error).__name__
