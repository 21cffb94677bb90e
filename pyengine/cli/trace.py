"""trace: every module's output for given ids."""

from __future__ import annotations

from .options import add_ids_run, check_output, load_model, new_command, read_ids_option


def add_commands(commands):
    parser = new_command(
        commands,
        "trace",
        _trace,
        "Every module's output, as a safetensors file. --eval-callback makes one of what llama-eval-callback "
        "printed for the same prompt. `pyengine dumper` prints files that write traces from another program.",
    )
    add_ids_run(parser)
    parser.add_argument(
        "--states",
        action="store_true",
        help="the layers' memories after the last token, too (default: the modules' outputs alone)",
    )
    parser.add_argument(
        "--eval-callback",
        metavar="LOG",
        help="the text that llama-eval-callback printed: the elements in it, with four decimals each "
        "(default: the model is run)",
    )


def _trace(options):
    from ..oracle.trace import record_trace

    output, ids = check_output(options.output), read_ids_option(options)
    if options.eval_callback is not None:
        _of_log(options, ids).save(output)
        return
    states = True if options.states else ()
    record_trace(load_model(options), ids, chunk=options.chunk, states=states).save(output)


def _of_log(options, ids):
    from ..oracle.oracle import Oracle
    from ..oracle.recorders.eval_callback import read_eval_callback

    return read_eval_callback(options.eval_callback, ids, Oracle(None, options.model).model.config)
