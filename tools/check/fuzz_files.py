#!/usr/bin/env python3
"""Files that mean harm, made by the million: no crash, no hang, no traceback, no large allocation.

    python tools/check/fuzz_files.py                          # ten seconds for each target
    python tools/check/fuzz_files.py gguf --runs 10000000     # the structure-aware mutator
    python tools/check/fuzz_files.py gguf --runs 1000000 --coverage    # the same mutator, led by atheris

Targets: gguf, safetensors, trace (the readers, in memory); json (config, tokenizer and provenance
files), ids (.npy), template (chat templates), model (a small model's file changed, and what is still
accepted loaded and run: what reaches C; tools/check/check_sanitizers.sh runs it on a sanitized core),
blocks (the same of a model of every block type, in float64; in locked too where it has its types).

Every input starts as a file of tests/fuzz_corpus, is taken apart into the fields of its format
(lengths, counts, types, names, JSON's tokens), some of which are changed, and is put together again.
An input fails when it takes more than a second of processor time (a template: ten), raises anything
but pyengine's own errors and OSError (a RuntimeWarning counts: it would be a second line for the
user), or takes more memory than 64 times its size and 1 MB: a limit of the address space holds for
every input, the exact peak is taken of one in 256.  It is then written to --findings, and the exit
code is 1.  The input being tried lies in --findings/TARGET.last, should the process die.

--coverage needs the extra `fuzz`.  Inputs that reached new code are added to --keep DIR, if given.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import mmap
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
from pathlib import Path

SEED = 1729
CORPUS = Path(__file__).parents[2] / "tests" / "fuzz_corpus"
MAX_INPUT = 1 << 20
MEMORY_FACTOR, MEMORY_FREE = 64, 1 << 20
SAMPLE = 256

INTEGERS = sorted(
    {
        0,
        1,
        2,
        3,
        4,
        5,
        7,
        8,
        12,
        13,
        16,
        31,
        32,
        33,
        64,
        65,
        127,
        128,
        255,
        256,
        1000,
        65535,
        65536,
        10**6,
        *(2**k + d for k in (24, 31, 32, 40, 53, 60, 62, 63, 64) for d in (-1, 0, 1)),
    }
)
NUMBERS = [
    *map(str, INTEGERS),
    "-1",
    "-0",
    "1e5",
    "1e400",
    "-1e400",
    "0.5",
    "1.0",
    "NaN",
    "Infinity",
    "1" * 30,
    "1" * 5000,
    "true",
    "false",
    "null",
    "[]",
    "{}",
    '""',
    "[[[[]]]]",
    '"\\ud800"',
    '"\\u0000"',
]
SCALARS = [
    b"\0" * 4,
    b"\xff" * 4,
    b"\0\0\xc0\x7f",
    b"\0\0\x80\x7f",
    b"\0\0\x80\xff",
    b"\1\0\0\0",
    b"\0\0\x80\0",
    b"\0\x7e",
    b"\0\x7c",
    b"\xff\x7b",
    b"\1\0",
    b"\0\x04",
    b"\x80" * 8,
    b"\x7f" * 8,
]


# ---- formats, as lists of fields ---------------------------------------------------------------
# A field is bytes; its kind is what `change` does with it: "n" a little-endian integer, "s" a text,
# "j" a token of JSON, "r" raw bytes.


def gguf_fields(data: bytes) -> list[tuple[str, bytes]]:
    """A GGUF's fields, as far as it goes; the rest as raw bytes."""
    fields, position = [], 0

    def take(size, kind):
        nonlocal position
        if size > len(data) - position:
            raise EOFError
        fields.append((kind, data[position : position + size]))
        position += size
        return int.from_bytes(fields[-1][1], "little") if kind == "n" else None

    def value(kind, depth=0):
        sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
        if kind == 8:
            take(take(8, "n"), "s")
        elif kind == 9 and depth == 0:
            element, count = take(4, "n"), take(8, "n")
            if element in sizes:
                take(sizes[element] * count, "r")
            elif count <= 64:
                for _ in range(count):
                    value(element, 1)
        elif kind in sizes:
            take(sizes[kind], "n")

    try:
        take(4, "r")
        take(4, "n")
        tensors, values = take(8, "n"), take(8, "n")
        for _ in range(min(values, 64)):
            take(take(8, "n"), "s")
            value(take(4, "n"))
        for _ in range(min(tensors, 128)):
            take(take(8, "n"), "s")
            for _ in range(min(take(4, "n"), 8)):
                take(8, "n")
            take(4, "n")
            take(8, "n")
    except EOFError:
        pass
    if position < len(data):
        fields.append(("r", data[position:]))
    return fields


TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[-+0-9.eE]+|[A-Za-z]+|[\[\]{},:]|\s+|.', re.DOTALL)


def json_fields(data: bytes) -> list[tuple[str, bytes]]:
    return [("j", token) for token in TOKEN.findall(data)]


def safetensors_fields(data: bytes) -> list[tuple[str, bytes]]:
    """Header length (put right again by `safetensors_bytes`), tokens of the header, data."""
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(len(data) - 8, 1 << 16):
        return [("r", data)]
    return [("n", data[:8]), *json_fields(data[8 : 8 + length]), ("r", data[8 + length :])]


def joined(fields, rng) -> bytes:
    return b"".join(content for _, content in fields)


def safetensors_bytes(fields, rng) -> bytes:
    """Mostly with the length and, for the header's own sum of sizes, the data that it should have."""
    header = b"".join(content for kind, content in fields if kind == "j")
    if not header or rng.random() < 0.1:
        return joined(fields, rng)
    data = fields[-1][1] if fields[-1][0] == "r" else b""
    return len(header).to_bytes(8, "little") + header + data


def script_fields(data: bytes) -> list[tuple[str, bytes]]:
    """A template: its tags, texts and words."""
    return [("t", token) for token in re.findall(rb"\{[{%#]-?|-?[}%#]\}|\w+|\s+|.", data, re.DOTALL)]


# ---- changing them -------------------------------------------------------------------------------


def change(fields, pool, rng):
    """One to four fields changed, removed, doubled, swapped or taken from elsewhere."""
    fields = list(fields)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        if not fields:
            return fields
        i, how = rng.randrange(len(fields)), rng.random()
        if how < 0.80:
            kind, content = fields[i]
            changed = CHANGES[kind](content, fields, rng)
            fields[i] = kind, changed
            if kind == "s" and i and rng.random() < 0.9:  # its length goes with it
                fields[i - 1] = "n", len(changed).to_bytes(8, "little")
        elif how < 0.84:
            del fields[i : i + rng.choice((1, 1, 2, 4))]
        elif how < 0.88:
            j = rng.randrange(len(fields))
            fields[j:j] = fields[i : i + rng.choice((1, 1, 2, 6))]
        elif how < 0.92:
            j = rng.randrange(len(fields))
            fields[i], fields[j] = fields[j], fields[i]
        elif how < 0.98:
            other = rng.choice(pool)
            j = rng.randrange(len(other)) if other else 0
            fields[i : i + rng.choice((0, 1))] = other[j : j + rng.choice((1, 2, 8))]
        else:
            del fields[i:]
    return fields


def change_integer(content, fields, rng):
    size, value = len(content), int.from_bytes(content, "little")
    how = rng.random()
    if how < 0.5:
        value = rng.choice(INTEGERS)
    elif how < 0.7:
        value += rng.choice((-32, -8, -1, 1, 8, 32))
    elif how < 0.85:
        value ^= 1 << rng.randrange(8 * size or 1)
    else:
        value = int.from_bytes(rng.choice(fields)[1][:8], "little")
    return (value % (1 << 8 * size)).to_bytes(size, "little")


def change_text(content, fields, rng):
    how = rng.random()
    if how < 0.4:
        return rng.choice(fields)[1][:200]
    if how < 0.5:
        return b""
    if how < 0.6:
        return content * 2
    return change_raw(content, fields, rng)


def change_raw(content, fields, rng):
    if not content:
        return rng.choice(SCALARS)
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        i = rng.randrange(len(content))
        how = rng.random()
        if how < 0.5:
            content[i] ^= 1 << rng.randrange(8)
        elif how < 0.8:
            word = rng.choice(SCALARS)
            content[i : i + len(word)] = word
        elif how < 0.9:
            del content[i : i + rng.choice((1, 2, 4, 32))]
            if not content:
                break
        else:
            content[i:i] = rng.choice(SCALARS)
    return bytes(content)


def change_token(content, fields, rng):
    how = rng.random()
    if content[:1] == b'"' and how < 0.3:  # JSON within JSON: a trace's order
        inner = json_fields(content[1:-1].replace(b'\\"', b'"'))
        if len(inner) > 2:
            i = rng.randrange(len(inner))
            inner[i] = "j", change_token(inner[i][1], inner, rng)
            return b'"' + b"".join(c for _, c in inner).replace(b'"', b'\\"') + b'"'
    if content in PUNCTUATION and how < 0.7:
        return content
    if content.isdigit() and how < 0.4:
        return str(int(content[:20]) + rng.choice((-1, 1, 8))).encode()
    if how < 0.6:
        return rng.choice(NUMBERS).encode()
    if how < 0.9:  # one of its own kind, where a few tries find one
        for _ in range(6):
            other = rng.choice(fields)[1][:200]
            if other[:1].isdigit() == content[:1].isdigit() and other[:1] not in PUNCTUATION:
                return other
        return other
    return change_raw(content, fields, rng)


PUNCTUATION = (b"{", b"}", b"[", b"]", b",", b":", b" ")
WORDS = [
    b"{{",
    b"}}",
    b"{%",
    b"%}",
    b"for",
    b"in",
    b"range",
    b"(",
    b")",
    b"if",
    b"endif",
    b"endfor",
    b"set",
    b"__class__",
    b"__globals__",
    b"__subclasses__",
    b"__init__",
    b"mro",
    b".",
    b"|",
    b"attr",
    b"map",
    b"'%c'",
    b"format",
    b"join",
    b"*",
    b"**",
    b"10**9",
    b"999999999",
    b"[]",
    b"messages",
    b"loop",
    b"cycler",
    b"namespace",
    b"lipsum",
    b"dict",
    b"raise_exception",
    b"macro",
    b"call",
    b"include",
    b"import",
    b"extends",
    b"recursive",
    b"'a'",
    b"tojson",
    b"batch",
    b"center",
    b"indent",
    b"\x00",
    b"\xff",
]


def change_word(content, fields, rng):
    return rng.choice(WORDS) if rng.random() < 0.6 else rng.choice(fields)[1]


CHANGES = {"n": change_integer, "s": change_text, "r": change_raw, "j": change_token, "t": change_word}


# ---- targets ---------------------------------------------------------------------------------------


class Target:
    """fields and join take an input apart and together; run reads one, raising what it raises."""

    fields, join = staticmethod(json_fields), staticmethod(joined)
    folder: str
    seconds = 1.0  # of processor time
    memory = MEMORY_FACTOR, MEMORY_FREE  # bytes for each of the input's, and for none
    address_space = 2 << 30  # more than at the start

    def __init__(self):
        self.seeds = [path.read_bytes() for path in sorted((CORPUS / self.folder).iterdir())]
        self.pool = [self.fields(seed) for seed in self.seeds]
        # Small files often: they are read faster, and a change in them is likelier to matter.
        self.weights = list(itertools.accumulate(1 / (len(fields) + 8) for fields in self.pool))

    def pick(self, rng):
        return rng.choices(self.pool, cum_weights=self.weights)[0]

    def mutate(self, fields, rng) -> bytes:
        return self.join(change(fields, self.pool, rng), rng)[:MAX_INPUT]


class Gguf(Target):
    """The header, every metadata value, small tensors, the hyper-parameters."""

    folder, fields = "gguf", staticmethod(gguf_fields)

    def __init__(self):
        super().__init__()
        from pyengine.checkpoint.config import Config
        from pyengine.files import gguf

        self.module, self.Config, self.path = gguf, Config, Path("fuzz-00001-of-00002.gguf")

    def run(self, data):
        self.module.map_file = lambda path: data if data else _empty(path)
        file = self.module.GGUF.open(self.path)
        for key in file.metadata:
            _allowed(file.metadata.__getitem__, key)
        for tensor in file.tensors.values():
            if tensor.nbytes <= 4096 and tensor.type in self.module.BY_GGML:
                self.module.dequantize(tensor)
                self.module.first_nonfinite_scale(tensor)
        _allowed(self.Config.from_gguf, file)


class Safetensors(Target):
    folder, fields, join = "safetensors", staticmethod(safetensors_fields), staticmethod(safetensors_bytes)

    def __init__(self):
        super().__init__()
        from pyengine.files import safetensors

        self.module, self.path = safetensors, Path("fuzz.safetensors")

    def open(self, data):
        self.module.map_file = lambda path: data if data else _empty(path)
        return self.module.SafetensorsFile.open(self.path)

    def run(self, data):
        for tensor in self.open(data).tensors.values():
            tensor.data.tobytes()


class Trace(Safetensors):
    """Read, and compared with itself and with another trace."""

    folder = "trace"

    def __init__(self):
        super().__init__()
        from pyengine.oracle.bits import compare
        from pyengine.oracle.trace import Trace as Reader

        self.Reader, self.compare = Reader, compare
        self.open(self.seeds[0])
        self.other = Reader.load(self.path)

    def run(self, data):
        self.module.map_file = lambda path: data if data else _empty(path)
        trace = self.Reader.load(self.path)
        for reference in (trace, self.other):
            _allowed(self._compare, reference, trace)

    def _compare(self, reference, candidate):
        result = self.compare(reference, candidate)
        json.dumps(result.as_dict())
        return [str(difference) for difference in result.differences]


class Json(Target):
    """config.json, tokenizer.json, provenance, an index: each input as each of them."""

    folder = "json"

    def __init__(self):
        super().__init__()
        from pyengine.checkpoint import provenance
        from pyengine.checkpoint.config import Config
        from pyengine.files import strict_json
        from pyengine.text import directory_vocabulary

        self.json, self.provenance, self.Config = strict_json, provenance, Config
        self.vocabulary = directory_vocabulary

    def run(self, data):
        self.json.map_file = lambda path: data if data else _empty(path)
        said = self.json.read_object("fuzz.json", constants=True)
        _allowed(self.Config.from_hf, said)
        _allowed(self.provenance.read, "fuzz")
        _allowed(self.vocabulary.family_json, "fuzz.json")
        _allowed(self.vocabulary.directory_bos, Path("fuzz.json"), said, said, 100)
        self.json.read_object("fuzz.json")


class Ids(Target):
    """.npy files, through a file, since NumPy maps it."""

    folder = "ids"

    @staticmethod
    def fields(data):
        length = int.from_bytes(data[8:10], "little")
        return [
            ("r", data[:8]),
            ("n", data[8:10]),
            *script_fields(data[10 : 10 + length]),
            ("r", data[10 + length :]),
        ]

    def __init__(self):
        super().__init__()
        from pyengine.ids import as_ids, read_ids

        self.read_ids, self.as_ids = read_ids, as_ids
        self.path = Path(tempfile.mkdtemp()) / "fuzz.npy"

    def run(self, data):
        self.path.write_bytes(data)
        self.as_ids(self.read_ids(self.path), 1000)


class Model(Target):
    """A small model's files, changed; what is accepted is loaded, run and quantised.

    Half of the inputs keep their header and differ in the weights alone.
    """

    folder = "model"
    fields = staticmethod(gguf_fields)
    memory = 64, 64 << 20  # of the model, its state and scratch

    def __init__(self):
        super().__init__()
        import pyengine
        from pyengine.quantizer.quantize import quantize

        self.pyengine, self.quantize = pyengine, quantize
        self.folder = Path(tempfile.mkdtemp())
        self._add_quantized()

    def _add_quantized(self):
        """The same model as INT8 and INT4: other kernels, and the other format."""
        source = self.folder / "model.gguf"
        source.write_bytes(self.seeds[0])
        for bits, keyword in ((8, "int8"), (4, "int4")):
            directory = self.folder / keyword
            self.quantize(source, **{keyword: directory})
            seed = (directory / "model.safetensors").read_bytes()
            self.seeds.append(bytes([bits]) + seed)
            self.pool.append([("r", bytes([bits])), *safetensors_fields(seed)])
        self.weights = [1, 2, 3]

    def mutate(self, fields, rng):
        if rng.random() < 0.5:
            fields = list(fields)
            kind, content = fields[-1]
            for _ in range(rng.choice((1, 4, 64))):
                content = change_raw(content, fields, rng)[: len(content)].ljust(len(content), b"\0")
            fields[-1] = kind, content
            return joined(fields, rng)
        if fields[0][1] in (b"\x08", b"\x04"):
            return fields[0][1] + safetensors_bytes(change(fields[1:], self.pool, rng) or [("r", b"")], rng)
        return super().mutate(fields, rng)

    def run(self, data):
        directory = {8: "int8", 4: "int4"}.get(data[0] if data else 0)
        if directory:
            path = self.folder / directory
            (path / "model.safetensors").write_bytes(data[1:])
        else:
            path = self.folder / "model.gguf"
            path.write_bytes(data)
        model = self.pyengine.load(path, threads=1)
        state = model.new_state()
        _allowed(model.forward, [1, 2, 3, 1], state)
        _allowed(model.forward, [5], state)


class Blocks(Model):
    """Small models of every block type, changed; what is accepted runs in float64, and in locked where it has
    the types."""

    folder = "blocks"
    memory = 64, 64 << 20

    def _add_quantized(self):
        self.weights = [1, 2]

    def run(self, data):
        path = self.folder / "model.gguf"
        path.write_bytes(data)
        model = self.pyengine.load(path, "float64")
        _allowed(model.forward, [1, 2, 3, 1])
        model = _allowed(self.pyengine.load, path)
        if model is not None:
            _allowed(model.forward, [1, 2, 3, 1])


class TimeUp(BaseException):
    """No Exception: a template's own `render` must not take it for a fault of the template."""


class Template(Target):
    """Chat templates in the sandbox, in this process and without its parent's watch.

    What tells an escape: while it renders, a template must cause no audit event of Python's (opening,
    importing, compiling, processes, sockets).  One that runs on is stopped, as the parent would.
    """

    folder, fields = "template", staticmethod(script_fields)
    seconds = 10.0  # the parent's limit; what runs on in Python is stopped by the timer
    memory = 64, 1 << 30  # bounded by the address space, as by the parent
    address_space = 1 << 30
    timer = 0.3
    VARIABLES = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "tools": None,
        "add_generation_prompt": True,
        "enable_thinking": True,
    }

    def __init__(self):
        super().__init__()
        import jinja2

        from pyengine.text import chat_sandbox

        # Errors as they are: jinja2's own rewriting of tracebacks compiles.
        jinja2.Environment.handle_exception = _reraise
        self.sandbox, self.rendering, self.stopped = chat_sandbox, False, 0
        self._one(self.seeds[0])  # what is imported on first use
        signal.signal(signal.SIGVTALRM, self._time_up)
        sys.addaudithook(self._audit)

    def run(self, data):
        signal.setitimer(signal.ITIMER_VIRTUAL, self.timer)
        try:
            self._one(data)
        except TimeUp:
            self.stopped += 1
        finally:
            self.rendering = False
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def _one(self, data):
        template, fault = self.sandbox.compile_template(data.decode("utf-8", "replace"))
        self.rendering = True
        answer = fault or self.sandbox.render(template, [self.VARIABLES])
        self.rendering = False
        if not set(answer) <= {"texts", "written", "error", "message"}:
            raise AssertionError(f"want an answer, got {answer!r:.200}")

    def _audit(self, event, arguments):
        if self.rendering and event.split(".")[0] in AUDITED:
            self.rendering = False
            raise EscapedError(f"{event} {arguments!r:.200}")

    @staticmethod
    def _time_up(*arguments):
        raise TimeUp


def _reraise(environment, source=None):
    raise  # called where an exception is being handled


class EscapedError(BaseException):
    """A template reached something that is not its own."""


AUDITED = {
    "open",
    "import",
    "exec",
    "compile",
    "os",
    "subprocess",
    "socket",
    "shutil",
    "ctypes",
    "pty",
    "code",
    "marshal",
    "pickle",
}


TARGETS = {
    "gguf": Gguf,
    "safetensors": Safetensors,
    "trace": Trace,
    "json": Json,
    "ids": Ids,
    "template": Template,
    "model": Model,
    "blocks": Blocks,
}


def _empty(path):
    from pyengine.errors import FileFormatError

    raise FileFormatError(path, "file", "want some bytes, got an empty file")


def _allowed(function, *arguments):
    from pyengine.errors import PyengineError

    try:
        return function(*arguments)
    except (PyengineError, OSError):
        return None


# ---- running them ------------------------------------------------------------------------------------


class Watch:
    """Runs inputs and keeps what is worth saying about them."""

    def __init__(self, name, target, findings: Path):
        from pyengine.errors import PyengineError, PyengineWarning

        self.name, self.target, self.findings = name, target, findings
        self.ignored = PyengineWarning
        self.allowed = PyengineError, OSError
        self.inputs = self.accepted = self.bytes = self.faults = 0
        self.kinds, self.slowest, self.largest = set(), 0.0, 0.0
        findings.mkdir(parents=True, exist_ok=True)
        with open(findings / f"{name}.last", "w+b") as file:
            file.truncate(MAX_INPUT + 8)
            self.last = mmap.mmap(file.fileno(), 0)

    def __call__(self, data: bytes) -> None:
        self.last[: 8 + len(data)] = struct.pack("<Q", len(data)) + data
        self.inputs += 1
        self.bytes += len(data)
        sampled = self.inputs % SAMPLE == 0
        if sampled:
            tracemalloc.start()
        start = time.thread_time()
        try:
            with warnings.catch_warnings():  # an input may have any number of unknown keys
                warnings.simplefilter("ignore", self.ignored)
                self.target.run(data)
            self.accepted += 1
        except self.allowed as error:
            if self.inputs % 64 == 0:
                self.kinds.add(re.sub(r"\d+|'.*'|b'.*'|\(.*\)", "#", str(error))[:60])
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self.found(data, f"{type(error).__name__}: {error}")
        seconds = time.thread_time() - start
        if sampled:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            factor, free = self.target.memory
            self.largest = max(self.largest, peak / (len(data) + 1))
            if peak > factor * len(data) + free:
                self.found(data, f"{peak} bytes for {len(data)}")
        else:
            self.slowest = max(self.slowest, seconds)
        if seconds > self.target.seconds:
            self.found(data, f"{seconds:.1f} s")

    def found(self, data, what):
        self.faults += 1
        path = self.findings / f"{self.name}-{self.faults}"
        if self.faults <= 20:
            path.write_bytes(data)
            print(f"{self.name}: {what[:200]}: input {self.inputs} is in {path}", flush=True)

    def report(self, seconds) -> str:
        rate = self.inputs / seconds if seconds else 0
        return (
            f"{self.name:<12} {self.inputs:>11,} inputs, {rate:>7,.0f}/s, mean "
            f"{self.bytes // max(1, self.inputs):,} bytes; {self.accepted:,} accepted, "
            f"{len(self.kinds)} kinds of error; slowest {1000 * self.slowest:.0f} ms; "
            f"{self.faults} faults"
        )


def run_mutator(watch, target, runs, seconds, seed) -> float:
    """-> seconds it took.  Seeds as they are, then changed ones."""
    rng, start = random.Random(f"{seed} {watch.name}"), time.monotonic()
    for data in target.seeds:
        watch(data)
    said = start
    while watch.inputs < runs:
        if watch.inputs % 128 == 0:
            now = time.monotonic()
            if now - start > seconds:
                break
            if now - said > 60:
                said = now
                print(watch.report(now - start), flush=True)
        watch(target.mutate(target.pick(rng), rng))
    return time.monotonic() - start


def run_coverage(watch, target, runs, seconds, seed, keep) -> None:
    """atheris calls exit when it is done: one target a process."""
    import atheris

    folder = Path(keep or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    seeds = Path(tempfile.mkdtemp())
    for i, data in enumerate(target.seeds):
        (seeds / str(i)).write_bytes(data)
    start = time.monotonic()

    def mutator(data, max_size, mutation_seed):
        rng = random.Random(mutation_seed)
        if rng.random() < 0.3:
            return atheris.Mutate(data, max_size)
        return target.mutate(target.fields(data), rng)[:max_size]

    def one(data):
        watch(data)
        if watch.inputs >= runs or time.monotonic() - start > seconds:
            print(watch.report(time.monotonic() - start), flush=True)
            os._exit(1 if watch.faults else 0)

    atheris.Setup(
        [
            sys.argv[0],
            str(folder),
            str(seeds),
            f"-seed={seed}",
            "-max_len=8192",
            "-verbosity=0",
            "-rss_limit_mb=4096",
            "-timeout=60",
            "-print_final_stats=0",
        ],
        one,
        custom_mutator=mutator,
    )
    atheris.Fuzz()


def limit_memory(more):
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + more
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--runs", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=None, help="of each target (default: 10)")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--coverage", action="store_true")
    parser.add_argument("--keep", metavar="DIR")
    parser.add_argument("--findings", type=Path, default=Path("fuzz_findings"), metavar="DIR")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="one input, with its traceback")
    options = parser.parse_args()
    unknown = set(options.targets) - set(TARGETS)
    if unknown:
        parser.error(f"want {', '.join(TARGETS)}, got {unknown.pop()}")
    warnings.simplefilter("error", RuntimeWarning)
    if options.replay:
        if len(options.targets) != 1:
            parser.error("--replay: want one TARGET")
        return TARGETS[options.targets[0]]().run(options.replay.read_bytes())
    codes = [apart(functools.partial(fuzz, name, options)) for name in options.targets or TARGETS]
    return 1 if any(codes) else 0


def fuzz(name, options):
    """One target -> the exit code."""
    if options.coverage:
        import atheris

        with atheris.instrument_imports(include=["pyengine"]):
            import pyengine.cli
            import pyengine.oracle.bits  # noqa: F401
    try:
        target = TARGETS[name]()
    except ImportError as error:
        print(f"{name:<12} left out: {error}")
        return 0
    watch = Watch(name, target, options.findings)
    runs = options.runs or sys.maxsize
    seconds = options.seconds or (float("inf") if options.runs else 10)
    if "PYENGINE_SANITIZED_BUILD" not in os.environ:  # whose shadow is terabytes of addresses
        limit_memory(target.address_space)
    if options.coverage:
        run_coverage(watch, target, runs, seconds, options.seed, options.keep)
    print(watch.report(run_mutator(watch, target, runs, seconds, options.seed)))
    return 1 if watch.faults else 0


def apart(work):
    """Run in a process of its own -> its exit code.

    The targets put their input in place of pyengine's mapped file and limit their own memory, which
    is nothing for the next one; and a process that dies has its temporary files removed.  It does
    not outlive this one, unless that is killed by SIGKILL.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        sys.stdout.flush()
        process = os.fork()
        if not process:
            code = 1
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                tempfile.tempdir = folder
                code = work()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        try:
            return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        except BaseException:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise


if __name__ == "__main__":
    sys.exit(main())
