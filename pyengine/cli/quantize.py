"""quantize and verify-files."""

from __future__ import annotations

from ..errors import InputError
from .options import new_command, positive


def add_commands(commands):
    _add_quantize(commands)
    _add_verify_files(commands)


def _add_quantize(commands):
    parser = new_command(commands, "quantize", _quantize, "A GGUF, or a Hugging Face directory, to a "
                      "symmetric INT8 checkpoint, its INT4 twin, or both in one pass.")
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("--int8", metavar="DIR", help="a new directory")
    parser.add_argument("--int4", metavar="DIR", help="a new directory")
    parser.add_argument("--group-size", type=positive, default=128, metavar="N",
                        help="columns that share a scale, an even number (default: 128; the locked "
                        "arithmetic runs no other, float64 and transformers do)")
    parser.add_argument("--scale", choices=("absmax", "mse"), default="absmax")
    parser.add_argument("-t", "--threads", type=positive, metavar="N")
    parser.add_argument("--export", choices=("compressed-tensors",),
                        help="write --int8 or --int4, a new directory, from SRC, a directory that "
                        "this command wrote, in the layout of another library")


def _quantize(options):
    from ..quantize import quantize

    if options.export:
        return _export(options)
    quantize(options.source, options.int8, options.int4, group_size=options.group_size,
             scale=options.scale, threads=options.threads)
    for directory in filter(None, (options.int8, options.int4)):
        print(f"{directory}: written")


def _export(options):
    from .. import provenance
    from ..export import export_compressed_tensors

    bits = provenance.read(options.source)["bits"]
    destination = {8: options.int8, 4: options.int4}.get(bits)
    if destination is None:
        raise InputError(f"{options.source}: want --int{bits} DIR for a checkpoint of {bits} bits")
    export_compressed_tensors(options.source, destination)
    print(f"{destination}: written")


def _add_verify_files(commands):
    parser = new_command(commands, "verify-files", _verify_files, "A quantized checkpoint against its "
                      "provenance: every tensor's sha256; that a twin has the same source; that a "
                      "source gives these bytes. Exit 0: it does, 1: it does not.")
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--twin", metavar="DIR2")
    parser.add_argument("--source", metavar="SRC")


def _verify_files(options):
    from ..verify_files import verify_files

    faults = verify_files(options.directory, options.twin, options.source)
    for fault in faults:
        print(fault)
    if not faults:
        print(f"{options.directory}: every tensor is as its provenance says")
    return 1 if faults else 0
