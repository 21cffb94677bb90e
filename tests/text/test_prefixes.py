"""Sequences that outlast their generations, in memory and on disk."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import GOLDEN

import pyengine
from pyengine.text.generate import generate
from pyengine.text.prefixes import Prefixes
from pyengine.text.session_files import SUFFIX


@pytest.fixture(scope="module")
def model():
    return pyengine.load(GOLDEN / "pattern31.gguf", threads=1)


def answer(model, prefixes, ids, tokens=3):
    """-> (the answer's ids, logits after it, cached tokens), in a session of the prefixes."""
    ids = np.array(ids)
    session, reuse = prefixes.take(ids)
    generation = generate(model, ids, tokens, session=session).run()
    prefixes.give_back(session)
    assert generation.cached_tokens == reuse.cached
    return generation.ids.tolist(), session.logits.tobytes(), generation.cached_tokens


@given(
    turns=st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.integers(0, 9), min_size=1, max_size=4)), max_size=8
    ),
    memory=st.sampled_from([0, 200_000, 1 << 30]),
)
@settings(max_examples=15, deadline=None)
def test_conversations_in_any_order_have_the_bits_of_computing_them_anew(model, turns, memory):
    prefixes, talks = Prefixes(model, memory), {}
    for who, said in turns:
        talks.setdefault(who, [1, 2, 3]).extend(said)
        got = answer(model, prefixes, talks[who])
        assert got[:2] == answer(model, Prefixes(model, 0), talks[who])[:2]
        talks[who] += got[0]
        assert prefixes.nbytes <= memory


def test_a_beginning_is_copied_and_its_owner_goes_on(model):
    prefixes = Prefixes(model, 1 << 30)
    ids = list(range(1, 30))
    session, _ = prefixes.take(np.array(ids))
    session.begin(np.array(ids))
    for start in range(0, 29, 5):  # a mark every five tokens, of which four are kept
        session.advance(ids[start : start + 5])
        session.mark()
    prefixes.give_back(session)
    other, reuse = prefixes.take(np.array([*ids[:7], 99, 98]))
    assert other is not session and (reuse.cached, reuse.shared) == (5, 7)
    assert reuse.before == ids[7:15] and reuse.now == [99, 98]
    again, reuse = prefixes.take(np.array([*ids, 50]))
    assert again is session and reuse.cached == 29
    late = Prefixes(model, 1 << 30)
    late._idle.append(session)
    assert late.take(np.array([*ids[:26], 99]))[0] is session  # no more than its last piece is dropped


def test_a_long_prompt_has_marks_inside(model, monkeypatch):
    monkeypatch.setattr("pyengine.text.generate.MARK_EVERY", 16)
    monkeypatch.setattr("pyengine.text.generate.Generation.piece", 5)
    prefixes, ids = Prefixes(model, 1 << 30), list(range(1, 61))
    answer(model, prefixes, ids)
    got = answer(model, prefixes, [*ids[:55], 99])
    assert got[2] == 50  # the end of the piece in which token 48 is
    assert got[:2] == answer(model, Prefixes(model, 0), [*ids[:55], 99])[:2]


@pytest.mark.parametrize("arithmetic", ["locked", "locked-kv16", "float64"])
def test_sequences_outlast_the_process_on_disk(tmp_path, arithmetic):
    model = pyengine.load(GOLDEN / "pattern31.gguf", arithmetic=arithmetic)
    prefixes, ids = Prefixes(model, 1 << 30, tmp_path / "cache"), list(range(1, 20))
    first = answer(model, prefixes, ids)
    prefixes.close()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [SUFFIX]
    again = pyengine.load(GOLDEN / "pattern31.gguf", arithmetic=arithmetic)
    later = Prefixes(again, 1 << 30, tmp_path / "cache")
    whole = answer(again, later, [*ids, *first[0], 5])
    assert whole[2] == len(ids) + 2  # the last token was drawn and not computed
    assert whole[:2] == answer(model, Prefixes(model, 0), [*ids, *first[0], 5])[:2] or arithmetic == "float64"
    assert answer(again, Prefixes(again, 1 << 30, tmp_path / "cache"), [*ids, 7])[2] == len(ids)  # a mark


def test_what_is_in_the_directory_is_used_by_its_own_model_alone(tmp_path, model):
    prefixes = Prefixes(model, 1 << 30, tmp_path)
    answer(model, prefixes, range(9))
    prefixes.close()
    (path,) = tmp_path.iterdir()
    (tmp_path / ("0" * 32 + SUFFIX)).write_bytes(b"not a file of ours")
    other = pyengine.load(GOLDEN / "fused.gguf", threads=1)
    assert answer(other, Prefixes(other, 1 << 30, tmp_path), range(9))[2] == 0
    kv16 = pyengine.load(GOLDEN / "pattern31.gguf", threads=1, arithmetic="locked-kv16")
    assert answer(kv16, Prefixes(kv16, 1 << 30, tmp_path), range(9))[2] == 0
    late = Prefixes(model, 1 << 30, tmp_path)
    path.unlink()  # by another process, after it was found
    assert answer(model, late, range(9))[2] == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_the_directory_is_bounded(tmp_path, model):
    one = Prefixes(model, 1 << 30, tmp_path)
    answer(model, one, range(9))
    one.close()
    (path,) = tmp_path.iterdir()
    memory = 3 * path.stat().st_size
    prefixes = Prefixes(model, memory, tmp_path)
    for i in range(10):
        answer(model, prefixes, range(20 + i, 29 + i))
    prefixes.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= memory
    assert len(list(tmp_path.iterdir())) >= 2
