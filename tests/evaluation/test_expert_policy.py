"""tools/bench/expert_policy.py: the traffic is what it says, and memory is bounded."""

import expert_policy
import numpy as np
import pytest


def test_traffic():
    assert expert_policy.chances(0.9)[: expert_policy.EXPERTS // 2].sum() == pytest.approx(0.9)
    passes = list(expert_policy.traffic(np.random.default_rng(1), 2, 1, True))
    assert [kind for kind, _ in passes] == ["prompt"] + ["answer"] * expert_policy.ANSWER
    assert [one.shape for one in passes[0][1]] == [(expert_policy.PROMPT, 8)] * 2
    assert all(len(set(row)) == 8 for row in passes[0][1][0].tolist())


@pytest.mark.parametrize("policy", expert_policy.POLICIES)
def test_memory_is_bounded(policy):
    rng = np.random.default_rng(2)
    memory = expert_policy.Memory(policy, 2, 60)
    for call in range(12):
        selected = expert_policy.choose(rng, np.zeros(expert_policy.EXPERTS), 30 if call % 4 == 0 else 1)
        before = memory.there.copy()
        hits, chosen = memory.call(call % 2, selected)
        assert memory.there.sum() == memory.count <= 60
        used = np.unique(selected)
        assert (hits, chosen) == (before[call % 2, used].sum(), len(used))
        assert len(selected) > 1 or memory.there[call % 2, used].all()


def test_an_expert_in_use_is_found():
    passes = [("answer", [np.arange(8)[None]])] * 10
    assert expert_policy.hit_rates("lru", 1, 0.3, passes + [("prompt", [np.arange(8)[None]])]) == {
        "answer": 0.9,
        "prompt": 1.0,
    }
