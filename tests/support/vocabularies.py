"""Small tokenizers: all bytes, some tokens of several bytes, and added tokens."""

from pyengine.text.gguf_vocabulary import QWEN2_PATTERN
from pyengine.text.ranks import from_ranks

BYTES = [bytes([byte]) for byte in range(256)]


def tokenizer_of(tokens=(), added=(), *, pattern=QWEN2_PATTERN, vocab_size=None, bos=None, first=BYTES):
    """tokens: of several bytes, by rank, text in UTF-8 or bytes; bos: the text of one of the added tokens."""
    more = dict.fromkeys(t.encode() if isinstance(t, str) else t for t in tokens)
    ranks = {token: i for i, token in enumerate([*first, *(t for t in more if t not in first)])}
    made = from_ranks(ranks, pattern, added, vocab_size, nfc=False)
    if bos is not None:
        made.bos_id = len(ranks) + list(added).index(bos)
    return made
