"""The files of a quantized checkpoint that are not tensors: settings, code, tokenizer, provenance."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import hf
from ..checkpoint import provenance
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import Config
from ..checkpoint.families import family_of
from ..checkpoint.writer import CheckpointWriter
from ..files.whole import write_json
from ..text.gguf_vocabulary import export_tokenizer
from ..text.sampling import checkpoint_settings, to_generation_config
from .mix import REST, Mix
from .options import QuantizeOptions

# For transformers: its classes are in the file that is copied beside the tensors.  No
# `quantization_config`: transformers would skip an unknown method with a log line.
MODELING = Path(hf.__file__).with_name("modeling_pyengine.py")

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


def write_companions(
    writer: CheckpointWriter,
    checkpoint: Checkpoint,
    config: dict[str, Any],
    describe: Callable[[dict[str, str], dict[str, str]], provenance.Document],
    *,
    code: bool = False,
    tokenizer: Checkpoint | None = None,
) -> None:
    """All files but the tensors, to writer.partial.

    checkpoint   the source whose end ids and sampling settings the output has
    config       config.json
    describe     (tensors, files), both {name: sha256} -> the provenance
    code         whether transformers needs the modelling file
    tokenizer    the source of the tokenizer; None: checkpoint
    """
    directory = writer.partial
    writer.write_index()
    write_json(directory / "config.json", config)
    if code:
        shutil.copyfile(MODELING, directory / MODELING.name)
    write_json(directory / "generation_config.json", _generation_config(checkpoint))
    _copy_tokenizer(checkpoint if tokenizer is None else tokenizer, directory)
    writer.remove_log()
    document = describe(writer.digests, provenance.digests_of_files(directory))
    write_json(directory / provenance.FILE_NAME, document)


def quantized_config(config: Config, bits: int | Mix, options: QuantizeOptions) -> dict[str, Any]:
    """config.json of a quantized checkpoint.  Of a mix, pyengine_bits is what no pattern matches."""
    mix = {"pyengine_mix": [list(rule) for rule in bits.rules]} if isinstance(bits, Mix) else {}
    return config.to_hf() | {
        **_auto_classes(config),
        "pyengine_bits": REST if isinstance(bits, Mix) else bits,
        **mix,
        "pyengine_group_size": options.group_size,
        "pyengine_dequantize": "exact",
    }


def _auto_classes(config: Config) -> dict:
    family, module = family_of(config), MODELING.stem
    return {
        "architectures": [family.quantized_class],
        "model_type": family.quantized_type,
        "auto_map": {
            "AutoConfig": f"{module}.{family.quantized_config}",
            "AutoModelForCausalLM": f"{module}.{family.quantized_class}",
        },
    }


def _generation_config(checkpoint: Checkpoint) -> dict:
    config = checkpoint.config
    return {
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
        **to_generation_config(checkpoint_settings(checkpoint)),
    }


def _copy_tokenizer(checkpoint: Checkpoint, directory: Path) -> None:
    if checkpoint.kind == "directory":
        for name in TOKENIZER_FILES:
            if (checkpoint.path / name).is_file():
                shutil.copyfile(checkpoint.path / name, directory / name)
    elif "tokenizer.ggml.model" in checkpoint.file.metadata:
        export_tokenizer(checkpoint.file, directory)
