"""What calibrated quantization costs at real sizes: time per billion weights, and memory.

    python tools/bench/bench_calibrate.py [--experts 256] [--layers 1] [--tokens 4096] [--scratch DIR]

Makes a slice of Qwen3.5-35B-A3B (tools/bench/make_slice.py) of so many layers and experts, and a text of so
many tokens; then runs `pyengine calibrate` and `pyengine quantize --int4 --scale gptq` on them, each once.
Seconds are divided by the weights that are quantized.  Memory is the greatest RssAnon seen, beside the mapped
source.  An expert's cost hardly depends on how many there are, so that 16 of them tell what 256 cost; one
expert sees tokens * 8 / experts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import string
import tempfile
from pathlib import Path

from bench_quantize import forget, timed
from make_slice import SEED, slice_config, write_slice

from pyengine.checkpoint.families import model_specs
from pyengine.checkpoint.layout import float_dtype
from pyengine.text.tokenizer import Tokenizer


def quantized_weights(config) -> int:
    count = 0
    for spec in model_specs(config):
        if spec.linear and float_dtype(spec.name) is None:
            size = 1
            for n in spec.shape:
                size *= n
            count += size
    return count


def write_text(path: Path, model: Path, tokens: int) -> int:
    """Random letters of that many tokens, at least -> tokens."""
    tokenizer, draw = Tokenizer.open(model), random.Random(SEED)
    text = "".join(draw.choices(string.ascii_lowercase + " ", k=tokens))
    while len(tokenizer.encode_prompt(text)) < tokens:
        text += "".join(draw.choices(string.ascii_lowercase + " ", k=tokens))
    path.write_text(text)
    return len(tokenizer.encode_prompt(text))


def measure(folder: Path, layers: int, experts: int, tokens: int, threads: list[str]) -> dict:
    config = dataclasses.replace(slice_config(layers, 1024), num_experts=experts)
    source, text = folder / "slice.gguf", folder / "text.txt"
    write_slice(source, config)
    seen, weights = write_text(text, source, tokens), quantized_weights(config)
    found = {"weights": weights, "tokens": seen, "layers": layers, "experts": experts}
    commands = {
        "calibrate": ["calibrate", "-m", source, "-f", text, "-o", folder / "stats.gguf", *threads],
        "quantize": ["quantize", source, "--int4", folder / "int4", "--calibration", folder / "stats.gguf"],
    }
    commands["quantize"] += threads
    for name, arguments in commands.items():
        forget(source)
        seconds, memory = timed(arguments, folder)
        found[name] = {
            "seconds": seconds,
            "seconds_per_billion": seconds / weights * 1e9,
            "anonymous_bytes": memory["RssAnon"],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("layers", 1), ("experts", 256), ("tokens", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    parser.add_argument("-t", "--threads", metavar="N")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where to write (default: here)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    threads = ["-t", options.threads] if options.threads else []
    with tempfile.TemporaryDirectory(dir=options.scratch or Path()) as folder:
        found = measure(Path(folder).absolute(), options.layers, options.experts, options.tokens, threads)
    if options.json:
        return print(json.dumps(found, indent=2))
    print(f"{found['weights'] / 1e6:.0f} million weights, {found['tokens']} tokens")
    for name in "calibrate", "quantize":
        one = found[name]
        print(
            f"{name:<10} {one['seconds']:.0f} s, {one['seconds_per_billion']:.0f} s per billion weights, "
            f"{one['anonymous_bytes'] / 2**20:.0f} MiB beside the mapped source"
        )


if __name__ == "__main__":
    main()
