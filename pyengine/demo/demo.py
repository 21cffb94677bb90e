"""The demonstration: the embedded checkpoint, end to end."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from ..errors import InputError
from ..load import load
from ..oracle.bits import compare
from ..oracle.trace import Trace, record_trace
from ..quantizer.quantize import quantize
from ..text.generate import generate
from ..text.sampler import Sampler
from ..text.tokenizer import Tokenizer
from . import CHECKPOINT, GOLDEN_FLOAT64, GOLDEN_LOCKED, GOLDEN_LOCKED_INT8

PROMPT = "And God said"
NEW_TOKENS = 120
SAMPLING = {"temperature": 0.6, "top_p": 0.9}
VERSE_END = "\n"


def demo(say=print) -> bool:
    """Quantize, continue a prompt, check the bits against PyTorch's; -> whether all are equal."""
    with tempfile.TemporaryDirectory(prefix="pyengine-") as directory:
        int8 = Path(directory) / "int8"
        _quantize(int8, say)
        _continue(int8, say)
        checks = [
            (
                "float64, GGUF   equals Hugging Face's own code in float64",
                GOLDEN_FLOAT64,
                load(CHECKPOINT, "float64"),
            ),
            ("locked,  GGUF   equals its PyTorch restatement", GOLDEN_LOCKED, load(CHECKPOINT)),
            ("locked,  INT8   equals its PyTorch restatement", GOLDEN_LOCKED_INT8, load(int8)),
        ]
        # Every one is run, so that a failure shows all that differs.
        return all([_check(what, golden, model, say) for what, golden, model in checks])  # noqa: C419


def _quantize(int8: Path, say) -> None:
    start = time.perf_counter()
    quantize(CHECKPOINT, int8=int8)
    written = sum(file.stat().st_size for file in int8.glob("*.safetensors"))
    say(
        f"quantized  {CHECKPOINT.name}, {CHECKPOINT.stat().st_size:,} bytes Q8_0 -> "
        f"INT8, {written:,} bytes, in {time.perf_counter() - start:.1f} s"
    )


def _continue(int8: Path, say) -> None:
    """With the tokenizer if it can be had, with bytes as ids if not."""
    model = load(int8)
    try:
        tokenizer = Tokenizer.open(CHECKPOINT)
    except InputError as error:
        ids = Trace.load(GOLDEN_LOCKED).ids
        new = [t.id for t in generate(model, ids, NEW_TOKENS, Sampler(**SAMPLING))]
        say(f"continued  ids {list(map(int, ids))} -> {new} (text: {error})")
        return
    ids = tokenizer.encode(PROMPT)
    tokens = generate(
        model,
        ids,
        NEW_TOKENS,
        Sampler(**SAMPLING),
        stop_ids=tokenizer.end_ids,
        stop=VERSE_END,
        tokenizer=tokenizer,
    )
    say(f"continued  {PROMPT} ->" + "".join(token.text for token in tokens))


def _check(what: str, golden: Path, model, say) -> bool:
    reference = Trace.load(golden)
    result = compare(reference, record_trace(model, reference.ids))
    complete = not result.missing and not result.unknown
    if result.equal and complete:
        say(f"checked    {what}: bits equal, {len(result.compared)} tensors")
        return True
    say(
        f"checked    {what}: NOT EQUAL: "
        + (str(result.differences[0]) if result.differences else "tensors are missing")
    )
    return False
