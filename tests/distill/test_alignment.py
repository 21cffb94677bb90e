"""Labels placed on the student's tokens: against a definition by sets of byte offsets."""

import itertools

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import tokenizer_of

from pyengine.distill.alignment import align, place_labels, place_mask
from pyengine.distill.labels import Labels
from pyengine.distill.vocabulary import VocabularyMap, purify_logits
from pyengine.errors import InputError
from pyengine.probabilities import log_softmax
from pyengine.text.gguf_vocabulary import LLAMA3_PATTERN

END, START = "<|endoftext|>", "<|im_start|>"
TOKENS = st.lists(st.text("ab é1", min_size=2, max_size=4), max_size=12)


def words(tokenizer, ids):
    return [tokenizer.token_bytes(int(i)) for i in ids]


def offsets(tokenizer, ids):
    return np.cumsum([len(data) for data in words(tokenizer, ids)]).tolist()


def by_definition(vocabularies, teacher_ids, student_ids):
    """rows of `Alignment`, of a text without special tokens."""
    ours, theirs = offsets(vocabularies.teacher, teacher_ids), offsets(vocabularies.student, student_ids)
    rows = []
    for i, offset in enumerate(theirs):
        row = ours.index(offset) if offset in ours else -1
        if row >= 0 and row + 1 < len(ours):
            place = vocabularies.sequence(int(teacher_ids[row + 1]))[0]
            row = row if place == student_ids[i + 1] else -1
        else:
            row = -1
        rows.append(row)
    return rows


# ---- where a label has its place ----------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(TOKENS, TOKENS, st.text("ab é1\n", min_size=1, max_size=40))
def test_any_text(ours, theirs, text):
    vocabularies = VocabularyMap(tokenizer_of(ours), tokenizer_of(theirs), larger=True)
    ids = vocabularies.teacher.encode(text)
    found = align(ids, vocabularies)
    assert found.student_ids.tolist() == vocabularies.student.encode(text)
    assert found.rows.tolist() == by_definition(vocabularies, ids, found.student_ids.tolist())
    counts = found.counts
    assert sum(counts.values()) == len(found.student_ids) and counts["last"] == 1
    assert counts["placed"] == (found.rows >= 0).sum()
    for i in np.flatnonzero(found.exact):
        data = vocabularies.teacher.token_bytes(ids[found.rows[i] + 1])
        assert data == vocabularies.student.token_bytes(int(found.student_ids[i + 1]))
    for i, j, k, end in found.chunks:
        both = words(vocabularies.student, found.student_ids[i:j]), words(vocabularies.teacher, ids[k:end])
        assert b"".join(both[0]) == b"".join(both[1]) and both[0]


def test_one_tokenizer_keeps_every_row():
    tokenizer = tokenizer_of(["th", "the", " the"], [END])
    one = VocabularyMap(tokenizer, tokenizer)
    ids = tokenizer.encode(f"the other{END}the thing", special=True)
    found = align(ids, one)
    assert found.student_ids.tolist() == ids and found.left_out == 0
    assert found.rows.tolist() == [*range(len(ids) - 1), -1]
    assert found.exact.tolist() == [True] * (len(ids) - 1) + [False]
    assert found.counts == {"placed": len(ids) - 1, "inside": 0, "other": 0, "last": 1}


def test_why_a_row_has_no_label():
    vocabularies = VocabularyMap(tokenizer_of(["th", "in", "ing"]), tokenizer_of(["th", "the", "in"]))
    teacher, student = vocabularies.teacher, vocabularies.student
    ids = teacher.encode("a the ing")
    found = align(ids, vocabularies)
    assert words(teacher, ids) == [b"a", b" ", b"th", b"e", b" ", b"ing"]
    assert words(student, found.student_ids) == [b"a", b" ", b"the", b" ", b"in", b"g"]
    # a: " " follows in both.  " ": th, but the student reads "the".  the: " ".  " ": ing, of which "in" is
    # the first.  in: inside the teacher's "ing".  g: the end.
    assert found.rows.tolist() == [0, -1, 3, 4, -1, -1]
    assert found.exact.tolist() == [True, False, True, False, False, False]
    assert found.counts == {"placed": 3, "inside": 1, "other": 1, "last": 1}
    assert found.chunks.tolist() == [[1, 2, 1, 2], [2, 3, 2, 4], [3, 4, 4, 5], [4, 6, 5, 6]]


def test_split_digits():
    """Qwen cuts a number into digits, Llama 3 by threes."""
    digits, threes = tokenizer_of(["in"]), tokenizer_of(["in", "12", "123"], pattern=LLAMA3_PATTERN)
    down = VocabularyMap(threes, digits)
    ids = threes.encode("in 1234 a")
    found = align(ids, down)
    assert words(threes, ids) == [b"in", b" ", b"123", b"4", b" ", b"a"]
    assert words(digits, found.student_ids) == [b"in", b" ", b"1", b"2", b"3", b"4", b" ", b"a"]
    assert found.rows.tolist() == [0, 1, -1, -1, 2, 3, 4, -1]  # "1" is the first of "123"
    up = align(digits.encode("in 1234 a"), VocabularyMap(digits, threes, larger=True))
    assert words(threes, up.student_ids) == [b"in", b" ", b"123", b"4", b" ", b"a"]
    # Behind the space the teacher says how likely a "1" is; the student's next token is "123".
    assert up.rows.tolist() == [0, -1, 4, 5, 6, -1] and up.counts["other"] == 1


def test_halves_of_characters():
    """A token of the student ends within a character, and another has halves of two."""
    text = "xéàé"
    teacher, student = tokenizer_of(["é", "à", "éà"]), tokenizer_of([b"\xa9\xc3", b"x\xc3"])
    vocabularies = VocabularyMap(teacher, student)
    ids = teacher.encode(text)
    found = align(ids, vocabularies)
    assert words(teacher, ids) == [b"x", "éà".encode(), "é".encode()]
    assert words(student, found.student_ids) == [b"x\xc3", b"\xa9\xc3", b"\xa0", b"\xc3", b"\xa9"]
    assert found.rows.tolist() == [-1, -1, 1, -1, -1]  # \xc3 is the first of the teacher's "é"
    assert found.counts == {"placed": 1, "inside": 3, "other": 0, "last": 1}
    # A text that was cut off within a character, at both ends.
    cut = align(teacher.encode_bytes(text.encode()[2:-1]), vocabularies)
    assert b"".join(words(student, cut.student_ids)) == text.encode()[2:-1]


def test_text_that_is_not_in_nfc_keeps_its_bytes():
    teacher, student = tokenizer_of(["é"]), tokenizer_of(["é"])
    student._backend.normalizer = tokenizers.normalizers.NFC()
    assert student.encode("e\u0301") == [256]
    found = align(teacher.encode("ae\u0301b"), VocabularyMap(teacher, student))
    assert b"".join(words(student, found.student_ids)) == "ae\u0301b".encode()
    assert found.counts["placed"] == len(found.student_ids) - 1


# ---- special tokens -----------------------------------------------------------------------------------


def chat(tokenizer):
    return tokenizer.encode(f"{START}ab{END}{START}the", special=True)


def test_special_tokens_of_both():
    """Their places are their own: the text of one is longer than the other's is not."""
    teacher, student = tokenizer_of(["the"], [END, START]), tokenizer_of(["th"], [START, END, "<|x|>"])
    found = align(chat(teacher), VocabularyMap(teacher, student, larger=True))
    assert words(student, found.student_ids) == [
        *[START.encode(), b"a", b"b", END.encode(), START.encode()],
        *[b"th", b"e"],
    ]
    assert found.rows.tolist() == [0, 1, 2, 3, 4, -1, -1] and found.left_out == 0


def test_a_special_token_that_the_student_does_not_have():
    teacher, student = tokenizer_of(["the"], [END, START]), tokenizer_of(["the"], ["</s>"])
    left_out = align(chat(teacher), VocabularyMap(teacher, student))
    assert words(student, left_out.student_ids) == [b"a", b"b", b"the"] and left_out.left_out == 3
    # b: two special tokens were left out before "the".
    assert left_out.rows.tolist() == [1, -1, -1]
    assert left_out.counts == {"placed": 1, "inside": 1, "other": 0, "last": 1}
    paired = align(chat(teacher), VocabularyMap(teacher, student, pairs={257: 257}))
    assert words(student, paired.student_ids) == [b"a", b"b", b"</s>", b"the"] and paired.left_out == 2
    assert paired.rows.tolist() == [1, 2, -1, -1]


@pytest.mark.parametrize("ours, theirs", list(itertools.product([None, END], repeat=2)))
def test_bos(ours, theirs):
    teacher, student = tokenizer_of(["th"], [END], bos=ours), tokenizer_of(["th"], [START, END], bos=theirs)
    ids = teacher.encode_prompt("tha")
    found = align(ids, VocabularyMap(teacher, student, larger=True))
    assert words(student, found.student_ids) == [END.encode()] * (theirs is not None) + [b"th", b"a"]
    assert (
        found.rows.tolist()
        == {
            (None, None): [0, -1],
            (END, None): [1, -1],  # the row of the teacher's BOS has no place
            (None, END): [-1, 0, -1],  # nothing was computed before the first token
            (END, END): [0, 1, -1],
        }[ours, theirs]
    )
    assert found.left_out == 0


def test_ids_that_are_no_tokens():
    padded = tokenizer_of(["th"], vocab_size=300)
    vocabularies = VocabularyMap(padded, padded)
    with pytest.raises(InputError, match="ids: want tokens of the teacher, got 299, which is padding"):
        align([1, 299], vocabularies)
    with pytest.raises(InputError, match="300"):
        align([300], vocabularies)
    no_z = tokenizer_of(first=[bytes([byte]) for byte in range(256) if byte != ord("z")])
    with pytest.raises(InputError, match="student: want a vocabulary of every byte"):
        align(padded.encode("az"), VocabularyMap(padded, no_z))


# ---- the labels ---------------------------------------------------------------------------------------


def labels_of(logprobs, ids, k=None):
    """Top-k labels, k the whole vocabulary by default."""
    k = k or logprobs.shape[1]
    order = np.argsort(-logprobs, axis=1, kind="stable")[:, :k].astype(np.int32)
    values = np.take_along_axis(logprobs, order, 1)
    true = np.append(logprobs[np.arange(len(ids) - 1), ids[1:]], np.nan)
    outside = np.maximum(1 - np.exp(values).sum(1), 0)
    parts = (values, true, np.full(len(ids), 3.0), outside)
    values, true, lse, outside = (part.astype(np.float32) for part in parts)
    return Labels(order, values, None, true, lse, outside)


@pytest.fixture(scope="module")
def placed():
    teacher, student = tokenizer_of(["the", "ing"], [END, START]), tokenizer_of(["th", "in"], ["</s>", END])
    vocabularies = VocabularyMap(teacher, student)
    ids = np.array(teacher.encode(f"the thing is{END}a thing", special=True))
    logits = np.random.default_rng(1729).normal(size=(len(ids), vocabularies.teacher_size)) * 3
    return vocabularies, ids, logits, align(ids, vocabularies)


def test_all_ids_as_labels_are_the_purified_logits(placed):
    vocabularies, ids, logits, alignment = placed
    found = place_labels(labels_of(log_softmax(logits), ids), alignment, vocabularies)
    wanted = purify_logits(logits, vocabularies)
    rows = np.flatnonzero(alignment.rows >= 0)
    assert 5 < len(rows) < len(alignment.student_ids)
    for i in rows:
        row = alignment.rows[i]
        listed = found.ids[i] >= 0
        dense = np.full(vocabularies.student_size, -np.inf)
        dense[found.ids[i][listed]] = found.logprobs[i][listed]
        reached = np.isfinite(wanted.logprobs[row])
        assert np.array_equal(np.isfinite(dense), reached)
        assert np.abs(dense[reached] - wanted.logprobs[row][reached]).max() < 1e-5
        assert (np.diff(found.logprobs[i][listed]) <= 0).all() and found.outside[i] < 1e-6
        kept = np.log(1 - wanted.lost[row] - wanted.padding[row])
        assert abs(found.logsumexp[i] - (3 + kept)) < 1e-6
    bare = np.delete(np.arange(len(alignment.student_ids)), rows)
    assert (found.ids[bare] == -1).all() and np.isneginf(found.logprobs[bare]).all()
    assert (found.outside[bare] == 1).all() and np.isnan(found.logsumexp[bare]).all()


def test_the_true_token(placed):
    vocabularies, ids, logits, alignment = placed
    logprobs = log_softmax(logits)
    found = place_labels(labels_of(logprobs, ids, 9), alignment, vocabularies)
    exact = np.flatnonzero(alignment.exact)
    assert len(exact) and np.isnan(np.delete(found.true_logprob, exact)).all()
    for i in exact:
        row = alignment.rows[i]
        top = np.argsort(-logprobs[row], kind="stable")[:9]
        lost = np.exp(logprobs[row][[j for j in top if vocabularies.places[j] < 0]]).sum()
        assert abs(found.true_logprob[i] - (logprobs[row, ids[row + 1]] - np.log(1 - lost))) < 1e-5


def test_top_k_keeps_the_whole(placed):
    vocabularies, ids, logits, alignment = placed
    found = place_labels(labels_of(log_softmax(logits), ids, 9), alignment, vocabularies)
    rows = alignment.rows >= 0
    total = np.exp(found.logprobs[rows].astype(np.float64)).sum(1) + found.outside[rows]
    assert np.abs(total - 1).max() < 1e-6 and (found.outside[rows] > 0.001).all()


def test_a_row_whose_labels_are_all_lost(placed):
    vocabularies, ids, _, alignment = placed
    logprobs = np.full((len(ids), vocabularies.teacher_size), -1e9)
    logprobs[:, vocabularies.teacher.encode(START, special=True)] = 0
    found = place_labels(labels_of(logprobs, ids, 1), alignment, vocabularies)
    assert (found.ids == -1).all() and (found.outside == 1).all()


def test_the_mean_of_sampled_labels(placed):
    """One draw a row, every id in turn with its probability: the weights' mean is the mass of each place."""
    vocabularies, ids, logits, alignment = placed
    logprobs = log_softmax(logits)
    mean = np.zeros((len(alignment.student_ids), vocabularies.student_size))
    for drawn in range(vocabularies.teacher_size):
        chosen = np.full((len(ids), 1), drawn, np.int32)
        some = logprobs[:, [drawn]].astype(np.float32)
        plain = np.zeros(len(ids), np.float32)
        labels = Labels(chosen, some, np.ones((len(ids), 1), np.float32), plain, plain, plain)
        found = place_labels(labels, alignment, vocabularies)
        for i in np.flatnonzero(found.ids[:, 0] >= 0):
            mean[i, found.ids[i, 0]] += np.exp(logprobs[alignment.rows[i], drawn]) * found.weights[i, 0]
    rows = np.flatnonzero(alignment.rows >= 0)
    wanted = vocabularies.gather(np.exp(logprobs))[alignment.rows[rows]]
    assert np.abs(mean[rows] - wanted).max() < 1e-12 and (np.delete(mean, rows, 0) == 0).all()


def test_masks(placed):
    vocabularies, ids, _, alignment = placed
    teacher = vocabularies.teacher
    assert words(teacher, ids)[:4] == [b"the", b" ", b"t", b"h"]
    mask = np.zeros(len(ids), np.int8)
    mask[1:4] = 1  # " ", "t", "h": the student has "th" as one
    found = place_mask(mask, alignment)
    chosen = [data for data, use in zip(words(vocabularies.student, alignment.student_ids), found) if use]
    assert chosen == [b" ", b"th"]
    mask[3] = 0  # half of "th"
    assert place_mask(mask, alignment).sum() == 1
    assert place_mask(np.ones(len(ids)), alignment).all()
