"""logits: next-token logits of given ids."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from ..files.whole import open_whole
from .options import add_ids_run, check_output, load_model, new_command, read_ids_option


def add_commands(commands):
    parser = new_command(commands, "logits", _logits, "Next-token logits, float32 [T, vocab], as .npy.")
    add_ids_run(parser)


def _logits(options):
    output, ids = check_output(options.output), read_ids_option(options)
    logits = load_model(options).forward(ids, chunk=options.chunk)
    with open_whole(output) as file:
        # NumPy writes past a Python file and loses the error of a full disk: give it no file.
        np.save(SimpleNamespace(write=file.write), logits)
