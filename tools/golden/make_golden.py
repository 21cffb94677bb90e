"""Make `tests/golden/`, or check it: what pyengine must compute, said by programs that know it not.

    python tools/golden/make_golden.py            # writes tests/golden/
    python tools/golden/make_golden.py --check    # makes it again elsewhere, exit 1 at a difference

Every golden model (`golden_models.py`) is run over the same prompts in three ways:

    float64       Hugging Face in float64 (`hf_float64.py`), rounded to float32
    locked        the PyTorch restatement (`locked_torch.py`) of the GGUF
    locked-int8   the same of the INT8 checkpoint that pyengine.quantizer makes of the GGUF

A run is named by the lengths of its pieces: "300" is one shot; "64+1+235" is the same prompt in
three pieces, the state kept between them.  Only the short run's traces and the longest one's logits
are stored; LOCK.json has the sha256 of every tensor of every run (float32 or int64, little-endian,
C order), and of every file.

Two correct float64 programs may round a value to different float32 neighbours if it lies on the
boundary between them.  Where pyengine's float64 does so, LOCK.json names it under `boundary`; a
difference anywhere else is an error.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import itertools
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

# Whatever needs torch is imported where it is used: the tests read this module without it.
from pyengine.oracle.trace import Recorder, Trace

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"

SEED = 1729
ARITHMETIC = "locked-1"  # the version of the locked arithmetic's rules
SHORT, LONGEST = "6", "300"
RUNS = ("1", "2", SHORT, "63", "64", "65", LONGEST, "64+1+235")  # the delta rule's chunk is 64
PACKAGES = ("gguf", "numpy", "torch", "transformers")

BOUNDARY = 1e-12  # of its row's largest magnitude: how near a value must be to be an exception
MOST_EXCEPTIONS = 5
NOT_COMPARED = ("versions", "boundary")  # of the lock, by --check: these belong to the machine


class GoldenError(Exception):
    """What was computed is not what it has to be; one line."""


# ---- bits ----------------------------------------------------------------------------------------


def rounded(array: np.ndarray) -> np.ndarray:
    """float64 -> float32; int64 stays."""
    return array if array.dtype == np.int64 else array.astype(np.float32)


def digest(array: np.ndarray) -> str:
    """sha256 of a float32 or int64 array's bytes, little-endian, C order."""
    little = {"float32": "<f4", "int64": "<i8"}[str(array.dtype)]
    return hashlib.sha256(np.ascontiguousarray(array, little)).hexdigest()


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ulps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many float32 steps lie between a and b; -0 and +0 are one step apart."""

    def place(x):  # int64, in the order of the values
        bits = np.asarray(x, np.float32).view(np.int32).astype(np.int64)
        return np.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits)

    return np.abs(place(a) - place(b))


# ---- rounding boundaries -------------------------------------------------------------------------


def boundary_distance(exact, a, b, row_max):
    """How far exact is from the middle of its float32 neighbours a and b, relative to row_max."""
    return np.abs(exact - (np.float64(a) + np.float64(b)) / 2) / row_max


def exceptions(exact: np.ndarray, wanted: np.ndarray, got: np.ndarray) -> list[dict]:
    """Where float32 `wanted` and `got`, both roundings of `exact` [T, n], differ: index, distance
    to the boundary between them, wanted value.  GoldenError: they differ off a boundary."""
    if exact.dtype == np.int64:
        different = np.argwhere(wanted != got)
        limit = -1.0
    else:
        different = np.argwhere(ulps(wanted, got) > 0)
        limit = BOUNDARY
    found = []
    for index in map(tuple, different.tolist()):
        a, b = wanted[index], got[index]
        distance = boundary_distance(exact[index], a, b, np.abs(exact[index[0]]).max())
        if limit < 0 or ulps(a, b) > 1 or not distance <= limit:
            raise GoldenError(
                f"{list(index)}: want {a}, got {b} (exact: {exact[index]}; {len(different)} values differ)"
            )
        found.append({"index": list(index), "distance": float(distance), "value": float(a).hex()})
    return found


def across_boundaries(exact: np.ndarray, wanted: str) -> np.ndarray | None:
    """`exact` [T, n] float64 rounded to float32 so that its digest is `wanted`, or None.

    At most two values may be rounded the wrong way, and only such as lie on a boundary; that they
    and no others are is proved by the digest.  Another processor's float64 sums may need it.
    """
    value = rounded(exact)
    if digest(value) == wanted or exact.dtype == np.int64:
        return value if digest(value) == wanted else None
    other = np.nextafter(value, np.where(exact > value, np.float32(np.inf), np.float32(-np.inf)))
    row_max = np.abs(exact).max(axis=1, keepdims=True)
    row_max[row_max == 0] = 1.0
    distance = boundary_distance(exact, value, other, row_max)
    distance[exact == value] = np.inf
    near = np.argsort(distance, axis=None)[:64]
    near = near[distance.flat[near] <= BOUNDARY].tolist()
    for flips in (*itertools.combinations(near, 1), *itertools.combinations(near, 2)):
        tried = value.copy()
        tried.flat[list(flips)] = other.flat[list(flips)]
        if digest(tried) == wanted:
            return tried
    return None


def distinct(boundary: list[dict]) -> set:
    """The lock's exceptions, those of one value counted once: a module passes its last one's output
    on, and a prompt is run whole and in pieces."""
    return {
        (entry["model"], sum(pieces(entry["run"])), *entry["index"], entry["value"]) for entry in boundary
    }


# ---- runs ----------------------------------------------------------------------------------------


def pieces(run: str) -> list[int]:
    return [int(length) for length in run.split("+")]


def write_prompts(folder: Path, models: dict[str, dict]) -> None:
    """prompts.json of the first models; of each that came later a file of its own, drawn by itself, so
    that no file of the others changes."""
    import golden_models

    sizes = {model: config["vocab_size"] for model, config in models.items()}
    first = {model: size for model, size in sizes.items() if model not in golden_models.LATER}
    for names, name in [(first, "prompts.json"), *(([m], f"{m}.prompts.json") for m in golden_models.LATER)]:
        prompts = draw_prompts({model: sizes[model] for model in names})
        (folder / name).write_text(json.dumps(prompts, indent=1) + "\n")


def read_prompts(folder: Path = GOLDEN) -> dict[str, dict[str, str]]:
    files = [folder / "prompts.json", *sorted(folder.glob("*.prompts.json"))]
    return {model: of for path in files for model, of in json.loads(path.read_text()).items()}


def draw_prompts(vocab_sizes: dict[str, int]) -> dict[str, dict[str, str]]:
    """{model: {length: ids between blanks}}.  From one generator: model by model in the order
    given, length by length in the order of RUNS, uniform over the vocabulary."""
    generator = np.random.default_rng(SEED)
    lengths = [run for run in RUNS if "+" not in run]
    return {
        model: {length: " ".join(map(str, generator.integers(0, vocab, int(length)))) for length in lengths}
        for model, vocab in vocab_sizes.items()
    }


def prompt(prompts: dict, model: str, run: str) -> np.ndarray:
    """int64 [T]"""
    return np.array(prompts[model][str(sum(pieces(run)))].split(), np.int64)


def run_model(model, ids: np.ndarray, run: str) -> dict[str, np.ndarray]:
    """What a pyengine model records, as it is: float64 or float32."""
    recorder, state = Recorder(), model.new_state()
    for piece in np.split(ids, np.cumsum(pieces(run))[:-1]):
        model.forward(piece, state, record=recorder)
    return recorder.tensors()


def run_hugging_face(model, ids: np.ndarray, run: str) -> dict[str, np.ndarray]:
    import hf_float64

    return hf_float64.trace(model, ids, pieces(run) if "+" in run else None)


def run_restatement(weights, ids: np.ndarray, run: str) -> dict[str, np.ndarray]:
    import locked_torch

    traces, state = [], None
    for piece in np.split(ids, np.cumsum(pieces(run))[:-1]):
        trace, state = locked_torch.forward(weights, piece, state)
        traces.append(trace)
    return {name: np.concatenate([trace[name] for trace in traces]) for name in traces[0]}


# ---- making --------------------------------------------------------------------------------------


def make(folder: Path, committed: dict | None = None) -> dict:
    """Write all golden files but the lock to `folder` and return the lock.

    committed: a lock; where this machine's Hugging Face falls on the other side of a rounding
    boundary than the one that made it, its side is taken, and said on stderr.
    """
    import golden_models
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    models = golden_models.CONFIGS
    write_prompts(folder, models)
    prompts = read_prompts(folder)
    lock = {
        "arithmetic": ARITHMETIC,
        "boundary": [],
        "command": "python tools/golden/make_golden.py",
        "int8": {},
        "seed": SEED,
        "traces": {model: {} for model in models},
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }
    with (
        tempfile.TemporaryDirectory() as scratch,
        tqdm(total=3 * len(models) * len(RUNS), unit="run", disable=None) as bar,
    ):
        for model in models:
            gguf, int8 = folder / f"{model}.gguf", Path(scratch) / model
            golden_models.make(model, gguf)
            make_float64(folder, lock, committed, model, prompts, bar)
            make_locked(folder, lock, model, "locked", gguf, prompts, bar)
            if make_int8(gguf, int8):
                lock["int8"][model] = file_digest(int8 / "model.safetensors")
                make_locked(folder, lock, model, "locked-int8", int8, prompts, bar)
    if len(distinct(lock["boundary"])) > MOST_EXCEPTIONS:
        raise GoldenError(
            f"{len(distinct(lock['boundary']))} values on a rounding boundary, want "
            f"at most {MOST_EXCEPTIONS}: {lock['boundary']}"
        )
    lock["files"] = {path.name: file_digest(path) for path in folder.iterdir()}
    return lock


def make_float64(folder, lock, committed, model, prompts, bar) -> None:
    """Hugging Face's traces, and where pyengine's float64 is across a boundary from them."""
    import hf_float64

    import pyengine

    gguf = folder / f"{model}.gguf"
    oracle, specification = hf_float64.load_float64(gguf), pyengine.load(gguf, "float64")
    for run in RUNS:
        ids = prompt(prompts, model, run)
        exact = run_hugging_face(oracle, ids, run)
        golden = {name: rounded(array) for name, array in exact.items()}
        if committed:
            take_side(golden, exact, trace_of(committed, model, "float64", run), f"{model} {run}")
        got = run_model(specification, ids, run)
        if list(got) != list(exact):
            raise GoldenError(f"{model} {run}: want tensors {list(exact)}, got {list(got)}")
        for name in exact:
            try:
                found = exceptions(exact[name], golden[name], rounded(got[name]))
            except GoldenError as error:
                raise GoldenError(f"{model} {run} {name} {error}") from None
            lock["boundary"] += [{"model": model, "run": run, "tensor": name, **entry} for entry in found]
        keep(folder, lock, model, "float64", run, Trace(ids, golden, "float64"))
        bar.update()


def take_side(golden, exact, wanted, where) -> None:
    for name in golden.keys() & wanted.keys():
        if digest(golden[name]) != wanted[name]:
            other = across_boundaries(exact[name], wanted[name])
            if other is not None:
                count = np.count_nonzero(other != golden[name])
                print(
                    f"warning: {where} {name}: {count} values on a rounding boundary are rounded "
                    "the other way on this machine",
                    file=sys.stderr,
                )
                golden[name] = other


def make_locked(folder, lock, model, arithmetic, checkpoint, prompts, bar) -> None:
    import locked_torch

    weights = locked_torch.Weights.load(checkpoint)
    for run in RUNS:
        ids = prompt(prompts, model, run)
        tensors = run_restatement(weights, ids, run)
        keep(folder, lock, model, arithmetic, run, Trace(ids, tensors, "locked"))
        bar.update()


def make_int8(gguf: Path, directory: Path) -> bool:
    """The INT8 checkpoint of a GGUF, as pyengine makes it; False where pyengine cannot yet."""
    try:
        from pyengine.quantizer.quantize import quantize
    except ImportError as error:
        print(f"warning: no INT8 goldens for {gguf.name}: {error}", file=sys.stderr)
        return False
    quantize(gguf, int8=directory)
    return True


def keep(folder: Path, lock: dict, model: str, arithmetic: str, run: str, trace: Trace) -> None:
    """A trace's digests into the lock; the short run's trace, the longest one's logits to files."""
    for name, array in trace.tensors.items():
        if not np.isfinite(array).all():
            raise GoldenError(f"{model} {arithmetic} {run} {name}: NaN or infinity")
    digests = {name: digest(array) for name, array in trace.tensors.items()}
    lock["traces"][model].setdefault(arithmetic, {})[run] = digests
    if run == SHORT:
        trace.save(folder / trace_file(model, arithmetic, run))
    if run == LONGEST:
        logits = Trace(trace.ids, {"lm_head": trace.tensors["lm_head"]}, trace.arithmetic)
        logits.save(folder / trace_file(model, arithmetic, run))


def trace_file(model: str, arithmetic: str, run: str) -> str:
    return f"{model}.{arithmetic}.{run}.safetensors"


def trace_of(lock: dict, model: str, arithmetic: str, run: str) -> dict[str, str]:
    """{tensor: digest}; empty if the lock has no such run."""
    return lock["traces"].get(model, {}).get(arithmetic, {}).get(run, {})


# ---- writing and checking ------------------------------------------------------------------------


def read_lock(folder: Path = GOLDEN) -> dict:
    return json.loads((folder / "LOCK.json").read_text())


def write(golden: Path) -> dict:
    """Make everything, then put it into `golden`, and take away what an older lock had."""
    with tempfile.TemporaryDirectory() as folder:
        lock = make(Path(folder))
        golden.mkdir(parents=True, exist_ok=True)
        old = read_lock(golden)["files"] if (golden / "LOCK.json").exists() else {}
        for name in old.keys() - lock["files"].keys():
            (golden / name).unlink(missing_ok=True)
        for name in lock["files"]:
            shutil.copyfile(Path(folder) / name, golden / name)
    (golden / "LOCK.json").write_text(json.dumps(lock, indent=1, sort_keys=True) + "\n")
    return lock


def check(golden: Path) -> dict:
    """Make everything elsewhere and compare.  GoldenError: the first difference."""
    committed = read_lock(golden)
    with tempfile.TemporaryDirectory() as folder:
        lock = make(Path(folder), committed)
    for package, version in committed["versions"].items():
        if lock["versions"][package] != version:
            print(
                f"warning: made with {package} {version}, this is {lock['versions'][package]}",
                file=sys.stderr,
            )
    odd = distinct(lock["boundary"]) ^ distinct(committed["boundary"])
    if odd:
        print(
            f"warning: boundary: not both in the lock and on this machine: {sorted(odd, key=str)}",
            file=sys.stderr,
        )
    compare(inputs(committed), inputs(lock), "files")  # first: the cause of all that follows
    compare(committed, lock)
    for name, wanted in committed["files"].items():
        if not (golden / name).is_file() or file_digest(golden / name) != wanted:
            raise GoldenError(f"{golden / name}: not the file of the lock")
    return lock


def inputs(lock: dict) -> dict[str, str]:
    """{file: digest} of checkpoints and prompts."""
    return {name: sha256 for name, sha256 in lock["files"].items() if name.endswith((".gguf", ".json"))}


def compare(committed: dict, made: dict, path: str = "") -> None:
    """GoldenError naming the first place where two locks differ."""
    ignored = NOT_COMPARED if not path else ()
    # In the order in which they were made: what differs first is the cause of what follows.
    for key in [*made, *(committed.keys() - made.keys())]:
        where = f"{path} {key}".strip()
        if key in ignored:
            continue
        a, b = committed.get(key), made.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            compare(a, b, where)
        elif a != b:
            raise GoldenError(f"{where}: want {a}, got {b}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="default: tests/golden")
    arguments = parser.parse_args()
    try:
        lock = (check if arguments.check else write)(arguments.golden)
    except GoldenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    runs = sum(len(runs) for of_model in lock["traces"].values() for runs in of_model.values())
    print(
        f"{'equal' if arguments.check else 'written'}: {len(lock['files'])} files, {runs} runs, "
        f"{len(distinct(lock['boundary']))} values on a rounding boundary",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
