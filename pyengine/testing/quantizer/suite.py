"""Run the properties on a quantizer and report the outcomes."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from random import Random

import numpy as np
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis.errors import HypothesisException, NoSuchExample

from ...errors import InputError
from ...seed import SEED
from . import planted as faults
from .format import Format
from .names import Name, property_of
from .properties import PROPERTIES, Property, merged
from .subject import Fault, Subject

SELF_CHECK = Name.SELF_CHECK
SELF_CHECK_TITLE = "the suite can fail"
SELF_CHECK_EQUATION = "Each property that holds fails when a fault that it forbids is planted."

HOLDS, FAILS, NOT_APPLICABLE = "holds", "FAILS", "not applicable"
AS_DECLARED, UNPROMISED = "fails, as declared", "holds, though not promised"


@dataclass(frozen=True)
class Outcome:
    """What became of one property.

    status   "holds", "FAILS", "not applicable", "fails, as declared" or "holds, though not promised"
    detail   what is wrong in the smallest example, what is needed, or why it is not promised
    example  the arguments of the smallest failing example (float32 arrays among them), or None
    """

    number: int
    title: str
    equation: str
    status: str
    detail: str = ""
    example: Mapping | None = None

    def __str__(self):
        lines = [f"{self.number:2}  {self.title:34}  {self.status}"]
        if self.detail:
            lines.append(f"      {self.detail}")
        if self.example:
            lines += [f"      {name} = {_show(value)}" for name, value in self.example.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """The outcomes by number; `print(report)` is a table.

    ok        nothing fails that the format did not declare
    failures  {number: Outcome} of what fails undeclared
    """

    format: Format
    outcomes: Mapping[int, Outcome]

    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> dict[int, Outcome]:
        return {n: outcome for n, outcome in self.outcomes.items() if outcome.status == FAILS}

    def __getitem__(self, number: int | str) -> Outcome:
        """Of a property's number or name: report[5], report["ties"]."""
        return self.outcomes[property_of(number) or number]

    def __str__(self):
        return "\n".join(str(outcome) for outcome in self.outcomes.values())


def check_quantizer(
    quantize: Callable,
    dequantize: Callable,
    format: Format,
    *,
    pack: Callable | None = None,
    unpack: Callable | None = None,
    save: Callable | None = None,
    load: Callable | None = None,
    from_q8_0: Callable | None = None,
    native: Mapping[str, Callable] | None = None,
    calibrated: Callable | None = None,
    properties: Iterable[int | str] | None = None,
    examples: int = 100,
    seed: int = SEED,
    shrink: bool = True,
) -> Report:
    """Try the properties on a quantizer, each on `examples` generated inputs.

    quantize(x)             x float32 [rows, cols], finite or not -> codes, scales: any integer
                            dtype [rows, cols], any float dtype [rows, n_groups] (format.axis 1)
    dequantize(codes, scales)  what quantize returned -> floats [rows, cols]
    pack(codes), unpack(packed)  unpack may return more columns, which are padding
    save(directory, codes, scales), load(directory)   load raises on a file that was damaged
    from_q8_0(blocks)       uint8 [rows, bytes], llama.cpp's Q8_0 -> codes, scales
    native                  {name: quantize}: other implementations, which must give the same bits
    calibrated(x, samples)  x as of quantize, samples float32 [n, cols] of what its rows are multiplied with,
                            n from 0 on -> codes, scales: properties 22 to 24
    properties              numbers or names of those to try; if None 1 to 21, and 22 to 24 with `calibrated`
    shrink                  False: report the first failing example found, not the smallest

    Whatever quantize raises is a failure of the property, except where property 15 wants an error.
    The same arguments give the same report.  Errors: InputError (an argument, or codes and scales of
    another shape or kind than stated here).
    """
    wanted = _checked(properties, examples, calibrated is not None)
    subject = Subject(
        quantize, dequantize, format, pack, unpack, save, load, from_q8_0, native or {}, calibrated
    )
    outcomes = {}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy, about overflow and NaN
        _check_shapes(subject)
        for number in wanted:
            if number != SELF_CHECK:
                outcomes[number] = _try(PROPERTIES[number], subject, examples, seed, shrink)
        if SELF_CHECK in wanted:
            outcomes[SELF_CHECK] = _self_check(subject, outcomes, examples, seed)
    return Report(format, dict(sorted(outcomes.items())))


def _checked(properties, examples, calibrated) -> list[Name]:
    every = [name for name in Name if calibrated or name <= SELF_CHECK]
    given = every if properties is None else list(properties)
    unknown = [key for key in given if property_of(key) is None]
    if unknown:
        raise InputError(
            f"properties: want numbers from 1 to {max(Name)}, got {unknown[0]!r} "
            "(names such as 'ties' stand for them)"
        )
    if not isinstance(examples, int) or examples < 1:
        raise InputError(f"examples: want a number from 1 on, got {examples!r}")
    return sorted({property_of(key) for key in given})


def _check_shapes(subject: Subject) -> None:
    """InputError where not the quantizer is at fault but its arguments and results are mistaken."""
    columns = int(np.lcm(subject.format.group_size or 1, subject.format.multiple))
    x = np.linspace(-1, 1, 2 * columns, dtype=np.float32).reshape(2, columns)
    try:
        subject.values(subject(x))
    except Fault as error:
        raise InputError(f"check_quantizer: {error}") from None
    except Exception:
        pass  # a failure of properties, which say with what input


# ---- one property ----------------------------------------------------------------------------


def _try(prop: Property, subject: Subject, examples, seed, shrink) -> Outcome:
    lacking = prop.lacks(subject)
    if lacking:
        return _outcome(prop, NOT_APPLICABLE, lacking)
    found = _find(prop, subject, examples, seed, shrink)
    reason = subject.format.not_promised.get(prop.number)
    if found is None:
        return _outcome(prop, HOLDS if reason is None else UNPROMISED)
    detail, example = found
    if reason is not None:
        return _outcome(prop, AS_DECLARED, f"{reason}: {detail}", example)
    return _outcome(prop, FAILS, detail, example)


def _outcome(prop, status, detail="", example=None):
    return Outcome(prop.number, prop.title, prop.equation, status, detail, example)


def _find(prop: Property, subject: Subject, examples, seed, shrink):
    """-> (what is wrong, the example), of the smallest failing example; None if there is none."""
    cases = _cases(prop, subject.format, max(1, math.ceil(examples / prop.cost)), seed)
    tried = ((_wrong(prop, subject, case), case) for case in cases)
    failing = next((found for found in tried if found[0]), None)
    if failing is None or not shrink:
        return failing

    def fails(case):
        nonlocal failing
        wrong = _wrong(prop, subject, case)
        if wrong:
            failing = wrong, case
        return bool(wrong)

    try:
        find(
            prop.cases(subject.format),
            fails,
            random=Random(seed),
            settings=_settings(len(cases), Phase.generate, Phase.shrink),
        )
    except HypothesisException:
        pass  # a quantizer that is not a function of its input: the last failure seen is one
    return _simplify(prop, subject, *failing)


def _cases(prop: Property, format, examples, seed) -> list[dict]:
    parts = [_drawn(part, format, examples, seed) for part in prop.parts]
    # A strategy of few values gives fewer than are wanted: they go round.
    return [merged(part[i % len(part)] for part in parts) for i in range(max(map(len, parts)))]


@functools.lru_cache(maxsize=128)  # making examples takes longer than trying them
def _drawn(part, format, examples, seed) -> list[dict]:
    """What Hypothesis gives the properties with this part to try, always the same."""
    drawn = []
    try:
        find(part(format), drawn.append, random=Random(seed), settings=_settings(examples, Phase.generate))
    except NoSuchExample:  # append is never true
        pass
    return drawn


def _settings(examples, *phases):
    return settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )


def _wrong(prop: Property, subject: Subject, case) -> str | None:
    # Copies: some quantizers write to their input, and the cases are tried again.
    case = {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in case.items()}
    try:
        return prop.check(subject, **case)
    except Exception as error:  # the quantizer's, on an input that it should take
        return f"raised {type(error).__name__}: {str(error):.300}"


def _simplify(prop, subject, wrong, case):
    """Fewer values and fewer bits, while it fails: Hypothesis does not look inside a dense array."""
    for name, array in case.items():
        if not isinstance(array, np.ndarray):
            continue
        for simpler in (_with_zeros, _with_fewer_bits):
            attempts = simpler(array)
            attempt = next(attempts, None)
            while attempt is not None:
                found = _wrong(prop, subject, case | {name: attempt})
                if found:
                    wrong, case = found, case | {name: attempt}
                attempt = _send(attempts, bool(found))
            array = case[name]
    return wrong, case


def _send(generator, value):
    try:
        return generator.send(value)
    except StopIteration:
        return None


def _with_zeros(array):
    """Attempts with ever smaller runs of values set to zero; is told whether one still fails."""
    run = array.size
    while run:
        for start in range(0, array.size, run):
            attempt = array.copy()
            attempt.reshape(-1)[start : start + run] = 0
            if not np.array_equal(attempt, array) and (yield attempt):
                array = attempt
        run //= 2


def _with_fewer_bits(array):
    """Attempts with each value rounded to 1, 2, 4 or 8 bits; is told whether one still fails."""
    if array.dtype != np.float32 or np.count_nonzero(array) > 16:
        return
    for index in np.flatnonzero(array):
        for bits in (1, 2, 4, 8):
            attempt = array.copy()
            significand, exponent = np.frexp(float(array.flat[index]))
            attempt.flat[index] = np.ldexp(np.rint(np.ldexp(significand, bits)), int(exponent) - bits)
            if attempt.flat[index] != array.flat[index] and (yield attempt):
                array = attempt
                break


# ---- property 21 -----------------------------------------------------------------------------


def _self_check(subject: Subject, outcomes, examples, seed) -> Outcome:
    tried = [n for n, outcome in outcomes.items() if outcome.status in (HOLDS, UNPROMISED)]
    if not tried:
        return Outcome(
            SELF_CHECK, SELF_CHECK_TITLE, SELF_CHECK_EQUATION, NOT_APPLICABLE, "needs a property that holds"
        )
    blind = [
        n for n in tried if _find(PROPERTIES[n], faults.broken(subject, n), examples, seed, False) is None
    ]
    reason = subject.format.not_promised.get(SELF_CHECK)
    if not blind:
        status, detail = HOLDS if reason is None else UNPROMISED, ""
    else:
        status = FAILS if reason is None else AS_DECLARED
        detail = "with a planted fault these still hold: " + ", ".join(
            f"{n} ({PROPERTIES[n].title})" for n in blind
        )
    return Outcome(SELF_CHECK, SELF_CHECK_TITLE, SELF_CHECK_EQUATION, status, detail)


# ---- examples in words -----------------------------------------------------------------------


def _show(value, most: int = 6) -> str:
    """Arrays as their shape and first values that are not zero."""
    if not isinstance(value, np.ndarray):
        return repr(value)
    places = np.argwhere(value != 0)
    items = [f"[{', '.join(map(str, place))}] = {value[tuple(place)]!s}" for place in places[:most]]
    rest = f", and {len(places) - most} more" if len(places) > most else ""
    return f"{value.dtype} {list(value.shape)}, " + (
        f"zeros but {', '.join(items)}{rest}" if items else "zeros"
    )
