"""The report of what quantized models cost on texts: `measure` gives it as a dict for JSON.

    source, arithmetic, n_ctx
    base         name, bytes
    texts        [{name, sha256, bytes, tokens, chunks}]
    candidates   [{name, bytes, types, texts, floor, by_layer}]

A candidate's `texts` are figures.of_run's of each text, with other_experts, expert_groups and the weakest
chunk's beginning.  `floor` is the arithmetic's own divergence: the candidate in this arithmetic from itself
in float64, on the first chunks of the first text; 0 of float64; None where it is not measured.
`kld_above_floor` is kld less it.  `calibrated_on`: whether the candidate's provenance names the text.
`by_layer` has one layer of the candidate at a time in the base, on the first text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ...census.texts import Text
from ...checkpoint import provenance
from ...checkpoint.names import layer_name
from ...errors import CheckpointError, InputError
from ...evaluation import perplexity
from ...load import load
from ...progress import progress
from ...text.tokenizer import has_tokenizer
from . import compare, figures
from .swap import OUTSIDE, with_part

AT_ONCE = 4  # models beside the base, of which each has its states
SHOWN = 80  # characters of the weakest chunk


@dataclass(frozen=True)
class Options:
    """n_ctx: tokens of a chunk; n_chunks: of each text, None: all; floor_chunks: 0: no floor is measured;
    by_layer: whether each layer is measured alone."""

    n_ctx: int = 512
    n_chunks: int | None = None
    arithmetic: str = "locked"
    threads: int | None = None
    floor_chunks: int = 1
    by_layer: bool = False


def check(source: Any, texts: Sequence[Text], options: Options) -> None:
    """Refuses what `measure` would refuse of the source and of the texts.  Errors: its own."""
    load(source, options.arithmetic, options.threads)
    for text in texts:
        _chunks_of(text, options)


def measure(source: Any, paths: Sequence[Any], texts: Sequence[Text], options: Options) -> dict[str, Any]:
    """The report on the models `paths`, quantized from `source`.

    Errors: InputError (a text that is too short), CheckpointError (another architecture), those of `load` and
    of `forward`.
    """
    base = load(source, options.arithmetic, options.threads)
    candidates = [load(path, options.arithmetic, options.threads) for path in paths]
    for candidate in candidates:
        _check_alike(base, candidate)
    chunks = [_chunks_of(text, options) for text in texts]
    bos = perplexity.bos_id(base.checkpoint)
    said = [
        {"name": Path(path).name, **_stored(candidate), "texts": []}
        for path, candidate in zip(paths, candidates)
    ]
    calibrations = [_calibration_texts(path) for path in paths]
    floors = _floors(base, paths, chunks[0], bos, options)
    total = sum(part.size for part in chunks) * (1 + 2 * len(candidates))
    with progress(total, "quality", "tokens") as bar:
        for text, part in zip(texts, chunks):
            runs, use = compare.run(
                base, candidates, part, bos, lambda n: bar.update(n * (1 + 2 * len(paths)))
            )
            for i, (run, one) in enumerate(zip(runs, said)):
                of_text = _of_text(base, text, part, run, use, i, options.n_ctx)
                one["texts"].append(of_text | {"calibrated_on": text.sha256 in calibrations[i]})
    for one, floor in zip(said, floors):
        one["floor"] = floor
        if floor is not None:
            for of_text in one["texts"]:
                of_text["kld_above_floor"] = of_text["kld"]["value"] - floor["value"]
    if options.by_layer:
        for one, candidate in zip(said, candidates):
            one["by_layer"] = _by_layer(base, candidate, chunks[0], bos)
    return {
        "format": "pyengine quality",
        "version": 1,
        "source": str(source),
        "arithmetic": options.arithmetic,
        "n_ctx": options.n_ctx,
        "base": {"name": Path(source).name, **_stored(base)},
        "texts": [text.describe() | {"chunks": len(part)} for text, part in zip(texts, chunks)],
        "candidates": said,
    }


def _check_alike(base: Any, candidate: Any) -> None:
    mine, theirs = base.config.to_hf(), candidate.config.to_hf()
    for field in mine:
        if mine[field] != theirs.get(field) and not field.endswith("token_id"):
            raise CheckpointError(
                f"{candidate.checkpoint.path}: {field}: want {mine[field]!r} as {base.checkpoint.path}, "
                f"got {theirs.get(field)!r}"
            )


def _chunks_of(text: Text, options: Options) -> NDArray[Any]:
    try:
        return perplexity.as_chunks(text.ids, options.n_ctx, options.n_chunks)
    except InputError as error:
        raise InputError(f"{text.name}: {error}") from None


def _stored(model: Any) -> dict[str, Any]:
    summary = model.checkpoint.summary
    return {"bytes": summary.weight_bytes, "types": summary.parameter_types}


def _calibration_texts(path: Any) -> set[str]:
    """The sha256 of the texts that a checkpoint's statistics are of, as its provenance has them."""
    if not (Path(path) / provenance.FILE_NAME).is_file():
        return set()
    calibration = provenance.read(path).get("calibration", {})
    return {text["sha256"] for text in calibration.get("texts", ())}


def _of_text(
    base: Any,
    text: Text,
    chunks: NDArray[Any],
    run: compare.Run,
    use: compare.Use,
    candidate: int,
    n_ctx: int,
) -> dict[str, Any]:
    said = {"text": text.name} | figures.of_run(run, n_ctx)
    said["weakest"]["begins"] = _beginning(base, chunks[said["weakest"]["chunk"]])
    if use.layers:
        said["other_experts"] = figures.other_experts(run, use, base.config.num_experts_per_tok)
        said["expert_groups"] = figures.by_expert_group(use, candidate)
    return said


def _beginning(base: Any, ids: NDArray[Any]) -> str | None:
    """The first words of a chunk's scored half; None: the model has no tokenizer."""
    if not has_tokenizer(base.checkpoint):
        return None
    try:
        text = base.tokenizer.decode(ids[len(ids) // 2 :][:SHOWN].tolist())
    except InputError:  # the extra `text` is not installed, and the ids came from a file
        return None
    return " ".join(text.split())[:SHOWN]


# ---- the floor -------------------------------------------------------------------------------


def _floors(
    base: Any, paths: Sequence[Any], chunks: NDArray[Any], bos: int | None, options: Options
) -> list[figures.Figures | None]:
    if base.arithmetic == "float64":
        return [{"value": 0.0, "error": 0.0, "tokens": 0}] * len(paths)
    if not options.floor_chunks:
        return [None] * len(paths)
    return [_floor(path, chunks[: options.floor_chunks], bos, options) for path in paths]


def _floor(path: Any, chunks: NDArray[Any], bos: int | None, options: Options) -> figures.Figures:
    exact, model = load(path, "float64"), load(path, options.arithmetic, options.threads)
    (scores,) = compare.divergences(exact, [model], chunks, bos)
    assert scores.kld is not None
    return figures.plain(perplexity.mean(scores.kld)) | {"tokens": len(scores.kld)}


# ---- one layer at a time ---------------------------------------------------------------------


def _by_layer(base: Any, candidate: Any, chunks: NDArray[Any], bos: int | None) -> list[figures.Figures]:
    parts = [*range(base.config.num_hidden_layers), OUTSIDE]
    found: list[figures.Figures] = []
    with progress(len(parts) * chunks.size, "quality by layer", "tokens") as bar:
        for some in _batches(parts):
            models = [with_part(base, candidate, part) for part in some]
            for part, scores in zip(some, compare.divergences(base, models, chunks, bos)):
                said = figures.of_scores(scores)
                name = "outside the layers" if part is OUTSIDE else layer_name(part)
                found.append({"layer": name, "kld": said["kld"], "same_top": said["same_top"]})
            bar.update(len(some) * chunks.size)
    return found


def _batches(parts: Sequence[int | None]) -> Iterator[Sequence[int | None]]:
    return (parts[start : start + AT_ONCE] for start in range(0, len(parts), AT_ONCE))
