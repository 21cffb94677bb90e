"""The models of a merge, opened and compared: they must be one model with other weights."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from ..checkpoint import provenance
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import Config
from ..checkpoint.open import open_checkpoint
from ..errors import CheckpointError, FileFormatError, InputError, quote
from ..files.gguf import GGUF
from ..files.strict_json import read_object

# Fields in which models of one kind may differ: no tensor and no step of the forward pass depends on them.
FREE = (
    "eos_token_ids",
    "pad_token_id",
    "num_nextn_predict_layers",
    "max_position_embeddings",
    "mrope_section",
)
TOKENS = "tokenizer.ggml.tokens"


def open_models(names: tuple[str, ...], reference: str) -> dict[str, Checkpoint]:
    """{name: checkpoint} of all models.

    reference: the model that the others must be like.  Errors: those of `open_checkpoint`, the message
    naming the model; CheckpointError: another size, layer or vocabulary.
    """
    models = {name: _open(name) for name in names}
    config, tokens = models[reference].config, _tokens(models[reference])
    for name, checkpoint in models.items():
        if name != reference:
            _compare(name, checkpoint.config, reference, config)
            _compare_tokens(name, _tokens(checkpoint), reference, tokens)
    return models


def _open(name: str) -> Checkpoint:
    try:
        checkpoint = open_checkpoint(name)
    except InputError as error:
        raise InputError(f"{error}; names of a hub, and adapters as MODEL+ADAPTER, are not read") from None
    if provenance.has_scaled_channels(checkpoint.path):
        raise InputError(
            f"{name}: method: want parameters that can be added to another model's, got awq, whose channels "
            "are scaled"
        )
    return checkpoint


def _compare(name: str, config: Config, reference: str, wanted: Config) -> None:
    for field in fields(Config):
        one, other = getattr(wanted, field.name), getattr(config, field.name)
        if field.name not in FREE and one != other:
            raise CheckpointError(
                f"{name}: {field.name}: want {quote(one)} as {reference} has, got {quote(other)}"
            )


def _compare_tokens(name: str, tokens: dict[int, str], reference: str, wanted: dict[int, str]) -> None:
    """Ids that both vocabularies have; a file may leave out those that no text gives."""
    for number in wanted.keys() & tokens.keys():
        if tokens[number] != wanted[number]:
            one, other = quote(wanted[number]), quote(tokens[number])
            raise CheckpointError(
                f"{name}: vocabulary: token {number}: want {one} as {reference} has, got {other}"
            )


def _tokens(checkpoint: Checkpoint) -> dict[int, str]:
    """{id: text}; empty for a model without a tokenizer."""
    if isinstance(checkpoint.file, GGUF):
        metadata = checkpoint.file.metadata
        return dict(enumerate(metadata.require(TOKENS, list, of=str))) if TOKENS in metadata else {}
    path = Path(checkpoint.path) / "tokenizer.json"
    return _tokens_of_json(path) if path.is_file() else {}


def _tokens_of_json(path: Path) -> dict[int, str]:
    said = read_object(path)
    model: Any = said.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict) or not all(type(i) is int for i in vocabulary.values()):
        raise FileFormatError(path, "model.vocab", f"want an object of ids, got {quote(vocabulary)}")
    tokens = {number: text for text, number in vocabulary.items()}
    for i, token in enumerate(said.get("added_tokens") or []):
        if (
            not isinstance(token, dict)
            or type(token.get("id")) is not int
            or not isinstance(token.get("content"), str)
        ):
            raise FileFormatError(path, f"added_tokens[{i}]", f"want an id and a content, got {quote(token)}")
        tokens[token["id"]] = token["content"]
    return tokens
