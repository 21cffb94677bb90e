"""verify-files: a checkpoint directory against its provenance."""

from __future__ import annotations

from ..errors import InputError
from .options import new_command


def add_commands(commands):
    parser = new_command(
        commands,
        "verify-files",
        _verify_files,
        "A directory that `quantize` or `merge` wrote, against its provenance: the sha256 of every tensor "
        "and of every other file. Says what was checked and what was not. Exit 0: nothing is wrong, 1: "
        "something is.",
    )
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument(
        "--twin",
        metavar="DIR2",
        help="another directory of the same source, INT4 beside INT8: verified as DIR is, and against it",
    )
    parser.add_argument(
        "--source",
        metavar="SRC",
        action="append",
        default=[],
        help="the GGUF or directory that DIR was made from: it is quantized again, and must give these "
        "bytes; of a merge give each model, the base too, with a --source of its own",
    )
    parser.add_argument(
        "--calibration",
        metavar="STATS",
        help="the statistics that DIR was calibrated with, which --source then needs (default: none)",
    )


def _verify_files(options):
    from ..checkpoint import provenance

    if provenance.is_merge(provenance.read(options.directory)):
        from ..merge.verify import check_merge

        result = check_merge(options.directory, options.twin, options.source)
    else:
        from ..quantizer.verify_files import check_files

        if len(options.source) > 1:
            raise InputError(f"--source: want one for a quantized checkpoint, got {len(options.source)}")
        result = check_files(
            options.directory, options.twin, *(options.source or [None]), options.calibration
        )
    for line in result.faults or result.checked:
        print(line)
    print(f"not checked: {'; '.join(result.not_checked)}")
    return 1 if result.faults else 0
