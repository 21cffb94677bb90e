"""What merging costs: speed against copying the bytes that it reads and writes, and memory.

    python tools/bench/bench_merge.py A.gguf B.gguf [--method dare_ties] [--density 0.5] [--rounds 3]

Each round runs `pyengine merge` of the base A and the model B to a directory of BF16, then copies both
sources and the directory (`cp`, then fsync), and deletes all of it; neither finds its input in the page
cache.  The ratio is that of the medians of the times.  Memory is the greatest RssAnon seen (every 20 ms),
and VmHWM, in which mapped pages count.

tools/bench/make_slice.py makes sources of real sizes: `--seed` makes another one of the same shapes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from bench_quantize import MEMORY, copy, files_of, forget, timed

DENSE = ("linear", "task_arithmetic")  # methods without a density


def write_configuration(path: Path, sources: list[Path], method: str, density: float) -> None:
    base, other = (str(source.resolve()) for source in sources)
    own = {"weight": 0.7} if method in DENSE else {"weight": 0.7, "density": density}
    models = [{"model": other, "parameters": own}]
    said = {"merge_method": method, "base_model": base, "models": models, "dtype": "bfloat16"}
    if method == "linear":
        models.insert(0, {"model": base, "parameters": {"weight": 0.3}})
    path.write_text(json.dumps(said))  # JSON is YAML


def measure(sources: list[Path], scratch: Path, rounds: int, configuration: Path, options: list[str]) -> dict:
    copies, runs, most = [], [], dict.fromkeys(MEMORY, 0)
    merged = scratch / "merged"
    for _ in range(rounds):
        forget(*sources)
        seconds, memory = timed(["merge", configuration, merged, *options], scratch)
        runs.append(seconds)
        most = {name: max(most[name], memory[name]) for name in MEMORY}
        written = sum(path.stat().st_size for path in files_of(merged))
        copies.append(copy([*sources, merged], scratch / "copy"))
        for path in (merged, scratch / "copy"):
            shutil.rmtree(path)
    return {
        "read": sum(source.stat().st_size for source in sources),
        "written": written,
        "copy_seconds": copies,
        "merge_seconds": runs,
        "ratio": statistics.median(copies) / statistics.median(runs),
        **{f"peak_{name}": value for name, value in most.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path, nargs=2, metavar="SRC.gguf")
    parser.add_argument("--method", default="dare_ties")
    parser.add_argument("--density", type=float, default=0.5, metavar="X")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where to write (default: beside SRC)")
    parser.add_argument("--json", action="store_true")
    options, others = parser.parse_known_args()  # the rest is for `pyengine merge`
    where = options.scratch or options.sources[0].absolute().parent
    with tempfile.TemporaryDirectory(dir=where) as scratch:
        configuration = Path(scratch) / "merge.yaml"
        write_configuration(configuration, options.sources, options.method, options.density)
        found = measure(options.sources, Path(scratch), options.rounds, configuration, others)
    if options.json:
        return print(json.dumps(found, indent=2))
    moved = found["read"] + found["written"]
    for name in ("copy", "merge"):
        seconds = ", ".join(f"{value:.1f}" for value in found[f"{name}_seconds"])
        speed = moved / statistics.median(found[f"{name}_seconds"])
        print(f"{name:<8} {speed / 1e9:.2f} GB/s read and written ({seconds} s)")
    print(f"ratio    {found['ratio']:.0%}")
    print(
        f"memory   {found['peak_RssAnon'] / 2**20:.0f} MiB beside the mapped sources (peak RssAnon), "
        f"{found['peak_VmHWM'] / 2**20:.0f} MiB with them (VmHWM)"
    )


if __name__ == "__main__":
    sys.exit(main())
