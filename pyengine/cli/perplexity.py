"""perplexity: flags and figures as llama-perplexity has them."""

from __future__ import annotations

import json
import sys

from ..errors import InputError
from .options import (
    STDIN,
    add_arithmetic,
    add_json,
    add_model,
    check_output,
    limit,
    load_model,
    new_command,
    positive,
    read_ids_file,
    read_text,
)

CONTEXT = 512


def _chunks(text):
    value = limit(text)
    return None if value is None else positive(text)


def add_commands(commands):
    parser = new_command(
        commands,
        "perplexity",
        _perplexity,
        "Measure the perplexity of a text, and the KL divergence from another model. The second half of "
        "each chunk counts. With --kl-divergence, a file has the log-probabilities of the other model, the "
        "base. Chunks, files and figures are llama-perplexity's.",
    )
    add_model(parser)
    text = parser.add_mutually_exclusive_group()
    text.add_argument("-f", "--file", metavar="FILE", help="a text in UTF-8; -: standard input")
    text.add_argument(
        "--ids-file", metavar="F", help="token ids as text or .npy, instead; -: standard input, as text"
    )
    parser.add_argument(
        "-c",
        "--ctx-size",
        type=positive,
        metavar="N",
        help=f"tokens of a chunk (default: {CONTEXT}, or the base's)",
    )
    parser.add_argument("--chunks", type=_chunks, metavar="N", help="the first N only; -1: all (default: -1)")
    add_arithmetic(parser)
    parser.add_argument(
        "--kl-divergence-base",
        "--save-all-logits",
        metavar="FILE",
        dest="base",
        help="write the log-probabilities there; with --kl-divergence read a base's (default: none)",
    )
    parser.add_argument(
        "--kl-divergence", action="store_true", help="compare with the base, over the base's own tokens"
    )
    add_json(parser)
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the KL divergence by position, as .png or .svg (default: no)"
    )


def _perplexity(options):
    from ..evaluation import perplexity

    if options.plot:
        if not options.kl_divergence:
            raise InputError("--plot: want --kl-divergence, which it draws")
        perplexity.check_plot(check_output(options.plot))
    chunks, scores = _compare(options) if options.kl_divergence else _measure(options)
    if options.json:
        print(json.dumps(_as_json(chunks, perplexity.statistics(scores)), indent=2))
    elif options.kl_divergence:
        _print_divergence(perplexity.statistics(scores))
    else:
        value, error = perplexity.perplexity(scores)
        print(f"\nFinal estimate: PPL = {value:.4f} +/- {error:.5f}")
    if options.plot:
        perplexity.plot(scores, chunks.shape[1], options.plot)


# ---- the two runs ----------------------------------------------------------------------------


def _measure(options):
    """-> chunks [n, n_ctx] and their scores.  With --kl-divergence-base it writes that file too."""
    from contextlib import nullcontext

    from ..evaluation.perplexity import as_chunks
    from ..files.kld import LogProbsWriter

    output = check_output(options.base) if options.base else None
    if not options.file and not options.ids_file:
        raise InputError("perplexity: want -f FILE or --ids-file F")
    model = load_model(options)
    chunks = as_chunks(_read_ids(options, model), options.ctx_size or CONTEXT, options.chunks)
    writer = LogProbsWriter(output, chunks, model.config.vocab_size) if output else nullcontext()
    with writer:
        return chunks, _run(options, model, chunks, writer=writer if output else None)


def _compare(options):
    """-> the chunks of the base [n, n_ctx] and the scores against the base."""
    from ..files.kld import LogProbs

    if not options.base:
        raise InputError("--kl-divergence: want --kl-divergence-base FILE to read")
    base = LogProbs.open(options.base)
    if options.ctx_size and options.ctx_size < base.n_ctx:
        raise InputError(
            f"-c: want at least the {base.n_ctx} tokens of {options.base}, got {options.ctx_size}"
        )
    model = load_model(options)
    if model.config.vocab_size != base.n_vocab:
        raise InputError(
            f"{options.base}: want the model's vocabulary of {model.config.vocab_size}, got {base.n_vocab}"
        )
    chunks = base.tokens[: options.chunks]
    if options.file or options.ids_file:
        _check_same_tokens(options, chunks.reshape(-1), _read_ids(options, model))
    return chunks, _run(options, model, chunks, base=base)


def _read_ids(options, model):
    from ..evaluation import perplexity
    from ..ids import as_ids

    if options.ids_file:
        ids = read_ids_file(options.ids_file)
    else:
        text = (
            read_text(STDIN).removesuffix("\n")
            if options.file == STDIN
            else perplexity.read_text(options.file)
        )
        ids = perplexity.text_ids(model.checkpoint, text)
    return as_ids(ids, model.config.vocab_size)


def _check_same_tokens(options, tokens, ids):
    """InputError for another text or tokenizer: vocabularies of one size can differ."""
    import numpy as np

    if not np.array_equal(ids[: len(tokens)], tokens):
        raise InputError(f"{options.base}: want the tokens of {options.file or options.ids_file}, got others")


def _run(options, model, chunks, **base_or_writer):
    """-> the scores; the figures so far are shown after each chunk."""
    from ..evaluation.perplexity import bos_id, evaluate, join, perplexity
    from ..progress import progress

    parts = []
    tokens = chunks.shape[1]
    with progress(chunks.size, "perplexity", "tokens") as bar:
        show = _show(options, bar)
        for part in evaluate(model, chunks, bos_id(model.checkpoint), **base_or_writer):
            parts.append(part)
            so_far = join(parts)
            bar.set_postfix_str(f"PPL {perplexity(so_far).value:.4f}", refresh=False)
            bar.update(tokens)
            show(len(parts), so_far)
    return so_far


# ---- output ---------------------------------------------------------------------------


def _show(options, bar):
    """-> show(count, scores), which prints the figures of the first `count` chunks."""
    if options.json:
        return lambda count, scores: None
    if options.kl_divergence:
        bar.write(
            "chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence"
            "              Δp RMS            Same top p",
            file=sys.stdout,
        )
        return lambda count, scores: bar.write(_row(count, scores), file=sys.stdout)

    from ..evaluation.perplexity import perplexity

    # One line that grows.  A bar on the same terminal would break it: there, one line per chunk.
    end = "\n" if not bar.disable and sys.stdout.isatty() else ""
    return lambda count, scores: bar.write(
        f"[{count}]{perplexity(scores).value:.4f},", file=sys.stdout, end=end
    )


def _row(count, scores) -> str:
    from ..evaluation.perplexity import log_ratio, mean, perplexity, rms_delta_p, same_top

    cells = [f"{value:9.4f} ± {error:9.4f}" for value, error in [perplexity(scores)]]
    cells += [f"{value:10.5f} ± {error:10.5f}" for value, error in (log_ratio(scores), mean(scores.kld))]
    cells += [
        f"{100 * value:6.3f} ± {100 * error:6.3f} %"
        for value, error in (rms_delta_p(scores), same_top(scores))
    ]
    return "    ".join([f"{count:4d}", *cells])


def _print_divergence(figures):
    print("\n====== Perplexity statistics ======")
    for label, name in (
        ("Mean PPL(Q)", "perplexity"),
        ("Mean PPL(base)", "perplexity_base"),
        ("Cor(ln(PPL(Q)), ln(PPL(base)))", "correlation"),
        ("Mean ln(PPL(Q)/PPL(base))", "log_perplexity_ratio"),
        ("Mean PPL(Q)/PPL(base)", "perplexity_ratio"),
        ("Mean PPL(Q)-PPL(base)", "perplexity_difference"),
    ):
        if name == "correlation":
            print(f"{label}: {100 * figures[name]:6.2f}%")
        else:
            value, error = figures[name]
            print(f"{label:<30}: {value:10.6f} ± {error:10.6f}")

    print("\n====== KL divergence statistics ======")
    value, error = figures["kld"]["mean"]
    print(f"Mean    KLD: {value:10.6f} ± {error:10.6f}")
    _print_distribution(figures["kld"], "KLD", lambda value: f"{value:10.6f}", leave_out=(75, 25))

    print("\n====== Token probability statistics ======")
    _print_percent("Mean    Δp", figures["delta_p"]["mean"])
    _print_distribution(figures["delta_p"], "Δp", lambda value: f"{100 * value:6.3f}%", leave_out=())
    _print_percent("RMS Δp    ", figures["delta_p"]["rms"])
    _print_percent("Same top p", figures["same_top"])


def _print_percent(label, estimate):
    print(f"{label}: {100 * estimate.value:6.3f} ± {100 * estimate.error:5.3f} %")


def _print_distribution(figures, what, as_text, leave_out):
    print(f"Maximum {what}: {as_text(figures['maximum'])}")
    for percentile, value in figures["percentiles"].items():
        if percentile not in leave_out:
            label = "Median" if percentile == 50 else f"{percentile:4.1f}%"
            print(f"{label:<7} {what}: {as_text(value)}")
    print(f"Minimum {what}: {as_text(figures['minimum'])}")


def _as_json(chunks, figures):
    return {"n_ctx": chunks.shape[1], "n_chunks": len(chunks)} | _named(figures)


def _named(value):
    """An `Estimate` -> {"value", "error"}; the keys of percentiles -> strings, as JSON has them."""
    if isinstance(value, tuple):
        return value._asdict()
    return {str(k): _named(v) for k, v in value.items()} if isinstance(value, dict) else value
