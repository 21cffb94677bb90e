"""labels: a teacher's soft labels of texts, as a Parquet data set."""

from __future__ import annotations

import time

from ..distill.documents import EMPTY, LENGTHS
from ..distill.labels import DEFAULT_K
from ..distill.layout import DEFAULT_FRACTION_BITS, FRACTION_BITS, LAYOUTS
from ..distill.plan import DEFAULT_PART_TOKENS
from ..errors import InputError
from ..seed import SEED
from .options import add_arithmetic, add_model, load_model, new_command, positive


def add_commands(commands):
    parser = new_command(
        commands,
        "labels",
        _labels,
        "Write a model's soft labels of texts, for distillation. The data set is Parquet: the likeliest ids "
        "of each position, or ids drawn from the model, with log-probabilities. A run that was ended "
        "continues when the same command is given again, to the same bytes.",
    )
    add_model(parser)
    parser.add_argument(
        "-f",
        "--file",
        required=True,
        nargs="+",
        metavar="PATH",
        help="texts, .jsonl, .parquet, or folders of them; an object has messages, or prompt and completion, "
        "or text",
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="the data set: a directory, or a URI (s3://...)"
    )
    parser.add_argument(
        "--ids",
        nargs="?",
        const="input_ids",
        metavar="FIELD",
        help="the files have token ids, in this field (default: texts; FIELD: input_ids)",
    )
    _add_labels(parser)
    _add_documents(parser)
    add_arithmetic(parser)
    parser.add_argument(
        "--part-tokens",
        type=positive,
        default=DEFAULT_PART_TOKENS,
        metavar="N",
        help=f"tokens of a Parquet file, at least (default: {DEFAULT_PART_TOKENS})",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="compute on a Ray cluster: auto, HOST:PORT, or local for one on this machine (default: no)",
    )
    parser.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="with --ray: models at work, -t threads each (default: 1)",
    )


def _add_labels(parser):
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "-k",
        "--top-k",
        type=positive,
        metavar="K",
        help=f"the K likeliest ids of each position (default: {DEFAULT_K})",
    )
    kind.add_argument(
        "--sample",
        type=positive,
        metavar="N",
        help="N draws from the model at each position, with weights that are unbiased (default: no, top-k)",
    )
    parser.add_argument(
        "--proposal-temperature",
        type=float,
        default=1,
        metavar="T",
        help="with --sample: draw at this temperature; the weights make up for it (default: 1)",
    )
    parser.add_argument(
        "-s", "--seed", type=int, default=SEED, metavar="N", help=f"of the draws (default: {SEED})"
    )
    parser.add_argument(
        "--temperature", type=float, default=1, metavar="T", help="of the teacher's softmax (default: 1)"
    )
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default=LAYOUTS[0],
        help="packed: small; lists: plain lists, not rounded; distillkit: the columns of arcee-ai/DistillKit "
        "(default: packed)",
    )
    parser.add_argument(
        "--fraction-bits",
        type=int,
        choices=FRACTION_BITS,
        default=DEFAULT_FRACTION_BITS,
        help="of packed log-probabilities, which are float16: N bits are exact to 2^-(N+1) of the value "
        f"(default: {DEFAULT_FRACTION_BITS})",
    )


def _add_documents(parser):
    parser.add_argument(
        "-c",
        "--ctx-size",
        type=positive,
        metavar="N",
        help="the most tokens of a row (default: the model's context)",
    )
    parser.add_argument(
        "--too-long",
        choices=LENGTHS,
        default=LENGTHS[0],
        help="a document of more tokens: an error, rows of the context's length, or its beginning "
        "(default: fail)",
    )
    parser.add_argument(
        "--empty",
        choices=EMPTY,
        default=EMPTY[0],
        help="a document without a token: an error, or left out (default: fail)",
    )


def _labels(options):
    from ..distill.documents import Documents
    from ..distill.extract import Job
    from ..distill.labels import LabelOptions

    if options.workers is not None and options.ray is None:
        raise InputError("--workers: want it with --ray")
    if options.sample is None and options.proposal_temperature != 1:
        raise InputError("--proposal-temperature: want it with --sample")
    chosen = LabelOptions(
        top_k=None if options.sample else options.top_k or DEFAULT_K,
        draws=options.sample,
        temperature=options.temperature,
        proposal_temperature=options.proposal_temperature,
        seed=options.seed,
    )
    model = load_model(options)
    documents = Documents(
        tuple(options.file),
        model,
        model.config.vocab_size,
        options.ctx_size or model.context,
        ids_column=options.ids,
        too_long=options.too_long,
        empty=options.empty,
    )
    job = Job.prepare(
        model,
        documents,
        chosen,
        options.layout,
        output=options.output,
        fraction_bits=options.fraction_bits,
        part_tokens=options.part_tokens,
    )
    start = time.perf_counter()
    computed = _run(options, job, model)
    _print_summary(options.output, job, computed, time.perf_counter() - start)


def _run(options, job, model):
    if options.ray is None:
        return job.run(model)
    from ..distill.ray_data import run_on_ray

    return run_on_ray(
        job, options.model, address=options.ray, workers=options.workers or 1, threads=options.threads or 1
    )


def _print_summary(output, job, computed, seconds):
    plan, nbytes = job.plan, sum(job.place.parts().values())
    speed = f", {computed / seconds:,.0f} tokens/s" if computed else ""
    print(
        f"{output}: {plan.documents:,} documents, {plan.rows:,} rows, {plan.tokens:,} tokens in "
        f"{len(plan.parts):,} files; {nbytes / plan.tokens:.1f} bytes per token; "
        f"computed {computed:,} tokens{speed}"
    )
