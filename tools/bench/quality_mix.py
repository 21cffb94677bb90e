"""The smallest mix of INT8 and INT4 that reaches a goal, by KL divergence saved for each byte.

    python tools/bench/quality_mix.py MODEL-BF16.gguf -f TEXT [--rank-on TEXT2] [--same 98] [--kld 1.8e-3]
        [--scale mse] [--calibration STATS] [--from DIR8 DIR4] [--anew] [-c 512] [--chunks N] [-t N]

A unit is one layer's attention, delta net, router or shared expert, or one of its two stacks of routed
experts.  Each unit alone is made INT4 among units in INT8, and what that costs is measured on TEXT2 (or TEXT).
(Not the other way round: the codes of calibrated INT4 units make up for each other's errors, so that one of
them in INT8 can be worse than none.)  Units are ranked by cost for each byte, and the fewest of the first ones
that reach the goal on TEXT are found by halving.  Of these, each that the goal does not need goes back, the
largest first.  That no other set is smaller is not shown.

Parameters come from an INT8 and an INT4 checkpoint of one method: written first, or --from directories.  With
--calibration that is so for the ranking alone: rounding depends on the other bits, and every set that is
tried is quantized anew.  --anew does that without.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pyengine
from pyengine.checkpoint.summary import stored_bytes
from pyengine.cli.options import positive
from pyengine.evaluation import perplexity
from pyengine.ids import as_ids
from pyengine.progress import progress
from pyengine.quantizer.cost import compare
from pyengine.quantizer.mix import Mix
from pyengine.quantizer.plan import written_name
from pyengine.quantizer.quantize import quantize
from pyengine.tables import markdown_table
from pyengine.text.models import LockedTextModel

# Of a layer: the patterns of its units, behind its number.
PARTS = (
    "self_attn.*",
    "linear_attn.*",
    "mlp.gate",
    "mlp.shared_expert.*",
    "mlp.experts.gate_up_proj",
    "mlp.experts.down_proj",
)


AT_ONCE = 7  # models beside the base, each with its states


class Cost(NamedTuple):
    """kld and same_top with their standard errors; bytes of all weights."""

    kld: perplexity.Estimate
    same_top: perplexity.Estimate
    nbytes: int


class Search:
    """A base, the INT8 and INT4 checkpoints of one method, and models of their parameters.

    write: (mix) -> a mixed checkpoint of the method, where rounding depends on the other bits; None: the
    parameters of the two are what it would have
    """

    def __init__(self, base, int8, int4, threads, write=None):
        self.base, self.int8, self.int4, self.threads, self.write = base, int8, int4, threads, write
        self.bos = perplexity.bos_id(base.checkpoint)
        self.names = [written_name(name) for name, tensor in int8.tensors.items() if tensor.type == "INT8"]
        layers = range(base.config.num_hidden_layers)
        units = [f"*.layers.{layer}.{part}" for layer in layers for part in PARTS]
        self.units = [unit for unit in units if any(_mix([unit]).bits_of(n) == 8 for n in self.names)]

    def nbytes(self, units: list[str]) -> int:
        """Of all weights and scales, with these units in INT8."""
        every = {id(t): t for tensor in self._tensors(units).values() for t in tensor.stored}
        return sum(map(stored_bytes, every.values()))

    def composed(self, units: list[str]) -> LockedTextModel:
        """Of the parameters of the two checkpoints."""
        checkpoint = dataclasses.replace(self.int4, tensors=self._tensors(units))
        return LockedTextModel(checkpoint, self.threads)

    def _tensors(self, units: list[str]) -> dict:
        mix = _mix(units)
        return {
            name: self.int8.tensors[name] if mix.bits_of(written_name(name)) == 8 else tensor
            for name, tensor in self.int4.tensors.items()
        }

    def savings(self, chunks, advance) -> dict[str, float]:
        """Of each unit, the others in INT8: what INT8 saves in KL divergence, for each byte more."""
        without = [[one for one in self.units if one != unit] for unit in self.units]
        whole, *costs = self._costs([self.units, *without], chunks, advance)
        return {
            unit: (cost.kld.value - whole.kld.value) / (whole.nbytes - cost.nbytes)
            for unit, cost in zip(self.units, costs)
        }

    def _costs(self, sets: list[list[str]], chunks, advance) -> list[Cost]:
        """Of composed models, some of them beside the base at a time."""
        found = []
        for start in range(0, len(sets), AT_ONCE):
            some = sets[start : start + AT_ONCE]
            models = [self.composed(units) for units in some]
            scores = compare.divergences(self.base, models, chunks, self.bos)
            found += [_cost(one, self.nbytes(units)) for one, units in zip(scores, some)]
            advance(len(some))
        return found

    def cost(self, units: list[str], chunks) -> Cost:
        """Of the checkpoint that `quantize` would write."""
        if self.write is None or not units:
            model = self.composed(units)
        else:
            model = pyengine.load(self.write(as_list(units, self.units)), threads=self.threads)
        (scores,) = compare.divergences(self.base, [model], chunks, self.bos)
        return _cost(scores, self.nbytes(units))


def _mix(units: list[str]) -> Mix:
    return Mix(tuple((unit, 8) for unit in units))


def _cost(scores, nbytes: int) -> Cost:
    return Cost(perplexity.mean(scores.kld), perplexity.same_top(scores), nbytes)


Steps = list[tuple[str, Cost]]


def search(found: Search, chunks, rank_chunks, reached, bar) -> tuple[list[str], Steps]:
    """-> the units that are INT8, and what was measured on the way, the result last."""
    savings = found.savings(rank_chunks, bar.update)
    ranked = sorted(found.units, key=savings.__getitem__, reverse=True)
    steps: Steps = []

    def measured(units: list[str], what: str) -> Cost:
        cost = found.cost(units, chunks)
        steps.append((what, cost))
        bar.update(1)
        return cost

    if reached(measured([], "none")):
        return [], steps
    result = measured(ranked, "all")
    if not reached(result):
        return ranked, steps
    low, high = 0, len(ranked)  # the first `low` do not reach the goal, the first `high` do
    while high - low > 1:
        middle = (low + high) // 2
        cost = measured(ranked[:middle], f"the first {middle}")
        if reached(cost):
            high, result = middle, cost
        else:
            low = middle
    chosen = ranked[:high]
    for unit in sorted(chosen, key=lambda unit: found.nbytes([unit]), reverse=True):
        fewer = [one for one in chosen if one != unit]
        cost = measured(fewer, f"without {unit}")
        if reached(cost):
            chosen, result = fewer, cost
    return chosen, [*steps, ("the result", result)]


def as_list(units: list[str], every: list[str]) -> str:
    """For --mix: one pattern for a part that is INT8 in every layer that has it."""
    patterns = []
    for part in PARTS:
        mine = [unit for unit in units if unit.endswith(f".{part}")]
        whole = [unit for unit in every if unit.endswith(f".{part}")]
        patterns += [f"*.{part}"] if mine and len(mine) == len(whole) else mine
    return ",".join(f"{pattern}=int8" for pattern in patterns)


# ---- the command -----------------------------------------------------------------------------


def measure(options) -> str:
    base = pyengine.load(options.model, threads=options.threads)
    chunks = _chunks(base, options.file, options)
    rank_chunks = _chunks(base, options.rank_on, options) if options.rank_on else chunks

    def reached(cost: Cost) -> bool:
        return 100 * cost.same_top.value >= options.same and cost.kld.value <= options.kld

    with tempfile.TemporaryDirectory(prefix="pyengine-") as directory:
        root = Path(directory)
        how = {"scale": options.scale, "threads": options.threads}
        if options.calibration:
            how |= {"calibration": options.calibration}
        twins = [Path(path) for path in options.twins or (root / "int8", root / "int4")]
        if not options.twins:
            quantize(options.model, *twins, **how)
        int8, int4 = (pyengine.load(path, threads=1).checkpoint for path in twins)
        numbers = itertools.count()

        def write(mix: str) -> Path:
            path = root / f"mixed-{next(numbers)}"
            quantize(options.model, mixed=path, mix=mix, **how)
            return path

        found = Search(
            base, int8, int4, options.threads, write if options.anew or options.calibration else None
        )
        with progress(3 * len(found.units), "mix", "models") as bar:
            chosen, steps = search(found, chunks, rank_chunks, reached, bar)
    _, cost = steps[-1]
    mix = as_list(chosen, found.units)
    return "\n".join([*_as_markdown(steps), "", *_verdict(options, reached(cost), mix, cost)])


def _chunks(base, path, options):
    ids = perplexity.text_ids(base.checkpoint, perplexity.read_text(path))
    return perplexity.as_chunks(as_ids(ids, base.config.vocab_size), options.ctx_size, options.chunks)


def _as_markdown(steps: list[tuple[str, Cost]]) -> list[str]:
    rows = [["INT8", "bytes", "KLD", "same token"]]
    for what, cost in steps:
        kld, same = cost.kld, cost.same_top
        rows.append(
            [what, f"{cost.nbytes:,}", f"{kld.value:.2e} ± {kld.error:.0e}"]
            + [f"{100 * same.value:.2f} ± {100 * same.error:.2f} %"]
        )
    return markdown_table(rows, "<>>>")


def _verdict(options, is_reached: bool, mix: str, cost: Cost) -> list[str]:
    goal = f"same token >= {options.same:g} %" + (f", KLD <= {options.kld:g}" if options.kld < 1e9 else "")
    if not is_reached:
        return [f"{goal}: not reached"]
    return [f"{goal}: {cost.nbytes:,} bytes", f"--mix '{mix}'" if mix else "INT4 alone"]


def _options(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL-BF16.gguf")
    parser.add_argument("-f", "--file", metavar="TEXT", required=True)
    parser.add_argument("--rank-on", metavar="TEXT2", help="units are ranked on this text (default: TEXT)")
    parser.add_argument("--same", type=float, default=98.0, metavar="PERCENT")
    parser.add_argument("--kld", type=float, default=1e9, metavar="NATS")
    parser.add_argument("--scale", default="mse", help="as of `pyengine quantize` (default: mse)")
    parser.add_argument("--calibration", metavar="STATS", help="as of `pyengine quantize`")
    parser.add_argument("--from", nargs=2, dest="twins", metavar=("DIR8", "DIR4"), help="as they are")
    parser.add_argument("--anew", action="store_true", help="quantize every set that is tried")
    parser.add_argument("-c", "--ctx-size", type=positive, default=512, metavar="N")
    parser.add_argument("--chunks", type=positive, metavar="N", help="of each text, the first N only")
    parser.add_argument("-t", "--threads", type=positive, metavar="N")
    return parser.parse_args(arguments)


def main(arguments=None) -> int:
    options = _options(arguments)
    try:
        print(measure(options))
    except (pyengine.PyengineError, OSError) as error:
        print(f"quality_mix: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
