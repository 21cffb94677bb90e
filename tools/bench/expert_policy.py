"""How many of the chosen experts a policy finds in memory, on made-up traffic: no model, no file.

    python tools/bench/expert_policy.py                 # two minutes
    python tools/bench/expert_policy.py --layers 4 --turns 2

Traffic: turns of a chat, each a prompt in one pass and an answer token by token.  Routers choose 8 of 256
experts.  skewed: half of the experts get nine tenths of the tokens; a token prefers the experts of the token
before; and with each turn a tenth of the experts change places.  uniform: all experts alike.

Policies: least recently used; least often used; and csrc/pyengine.h's: the least share of the layer's tokens,
where tokens count half after each PE_HALF_LIFE of them, with several half-lives.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from pyengine.core.expert_cache import AHEAD, HALF_LIFE, HEAT
from pyengine.seed import SEED
from pyengine.tables import markdown_table

EXPERTS, TOP_K = 256, 8
PROMPT, ANSWER = 512, 192
SHARES = (0.3, 0.55, 0.8)  # of the experts that memory holds
POLICIES = ("lru", "lfu", 128, HALF_LIFE, 8192)  # a number: a half-life


# ---- traffic -----------------------------------------------------------------------------------


def chances(share_of_half: float) -> np.ndarray:
    """Chances 1 / rank^s, of which the first half has that share."""
    low, high = 0.0, 4.0
    for _ in range(50):
        middle = (low + high) / 2
        weights = np.arange(1.0, EXPERTS + 1) ** -middle
        weights /= weights.sum()
        low, high = (middle, high) if weights[: EXPERTS // 2].sum() < share_of_half else (low, middle)
    return weights


def traffic(rng, layers: int, turns: int, skewed: bool):
    """Passes: ("prompt" or "answer", [selected experts [tokens, 8] of each layer])."""
    weights = chances(0.9) if skewed else np.full(EXPERTS, 1 / EXPERTS)
    places = [rng.permutation(EXPERTS) for _ in range(layers)]
    for _ in range(turns):
        for place in places if skewed else []:
            moved = rng.choice(EXPERTS, EXPERTS // 10, replace=False)
            place[moved] = place[rng.permutation(moved)]
        logits = [np.log(weights[place]) for place in places]
        yield "prompt", [choose(rng, one, PROMPT) for one in logits]
        before = [np.empty(0, np.int64)] * layers
        for _ in range(ANSWER):
            liked = [np.zeros(EXPERTS) for _ in range(layers)]
            for one, last in zip(liked, before):
                one[last] = 1.5 if skewed else 0.0
            chosen = [choose(rng, one + more, 1) for one, more in zip(logits, liked)]
            before = [one[0] for one in chosen]
            yield "answer", chosen


def choose(rng, logits, tokens: int) -> np.ndarray:
    noisy = logits + rng.gumbel(size=(tokens, EXPERTS))
    return np.argpartition(-noisy, TOP_K, axis=1)[:, :TOP_K]


# ---- policies ----------------------------------------------------------------------------------


@dataclass
class Memory:
    """Experts in memory, at most `slots`."""

    policy: object
    layers: int
    slots: int

    def __post_init__(self):
        shape = self.layers, EXPERTS
        self.heat, self.used = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self.there, self.tokens = np.zeros(shape, bool), [0] * self.layers
        self.time = np.zeros(self.layers, np.int64)
        self.calls, self.count = 0, 0

    def call(self, layer: int, selected: np.ndarray) -> tuple[int, int]:
        """-> experts found, experts chosen."""
        uses = np.bincount(selected.ravel(), minlength=EXPERTS)
        self.calls += 1
        if isinstance(self.policy, int):
            self.tokens[layer] += len(selected)
            while self.tokens[layer] >= self.policy:
                self.tokens[layer] -= self.policy
                self.heat[layer] >>= 1
                self.time[layer] >>= 1
        self.heat[layer] += uses * HEAT
        self.time[layer] += len(selected) * HEAT
        self.used[layer, uses > 0] = self.calls
        hits = self.there[layer] & (uses > 0)
        missing = np.flatnonzero((uses > 0) & ~self.there[layer])
        for done, expert in enumerate(missing):
            if self.count == self.slots:
                self.evict(layer, missing[max(0, done - AHEAD) : done] if len(selected) == 1 else missing[:0])
            self.there[layer, expert], self.count = True, self.count + 1
        return int(hits.sum()), int((uses > 0).sum())

    def evict(self, layer: int, kept) -> None:
        order = self.used * 2.0**-50
        if self.policy == "lfu":
            order = order + self.heat
        elif self.policy != "lru":
            order = order + self.heat / np.maximum(1, self.time)[:, None]
        order = np.where(self.there, order, np.inf)
        order[layer, kept] = np.inf
        self.there[np.unravel_index(order.argmin(), order.shape)] = False
        self.count -= 1


def hit_rates(policy, layers: int, share: float, passes) -> dict[str, float]:
    memory = Memory(policy, layers, int(share * layers * EXPERTS))
    found = {"prompt": np.zeros(2), "answer": np.zeros(2)}
    for kind, selected in passes:
        for layer, one in enumerate(selected):
            found[kind] += memory.call(layer, one)
    return {kind: hits / chosen for kind, (hits, chosen) in found.items()}


# ---- the command -------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, metavar="N")
    parser.add_argument("--turns", type=int, default=4, metavar="N")
    options = parser.parse_args()
    names = [str(p) if isinstance(p, str) else f"half-life {p}" for p in POLICIES]
    rows = [["traffic", "in memory", "pass", *names]]
    for skewed in (True, False):
        passes = list(traffic(np.random.default_rng(SEED), options.layers, options.turns, skewed))
        for share in SHARES:
            rates = [hit_rates(policy, options.layers, share, passes) for policy in POLICIES]
            for kind in ("prompt", "answer"):
                name = "skewed" if skewed else "uniform"
                rows.append([name, f"{share:.0%}", kind, *(f"{rate[kind]:.1%}" for rate in rates)])
    print("\n".join(markdown_table(rows, "<><" + ">" * len(names))))


if __name__ == "__main__":
    main()
