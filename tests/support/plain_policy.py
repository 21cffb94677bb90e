"""The policy of csrc/pyengine.h, "experts that are read when they are chosen", as plain Python: which experts
are in memory after which calls."""

from collections import Counter
from fractions import Fraction


class PlainPolicy:
    """slots experts of layers * experts in memory, or fewer; call(layer, selected) is one pe_experts."""

    def __init__(self, layers, experts, slots, ahead, heat, half_life):
        self.experts = experts
        self.slots = self.limit = min(slots, layers * experts)
        self.ahead, self.of_a_use, self.half_life = ahead, heat, half_life
        self.heat, self.last_call = Counter(), {}
        self.time, self.tokens = [0] * layers, [0] * layers
        self.memory, self.calls, self.hits, self.missed = set(), 0, 0, []

    def call(self, layer, selected):
        """selected: [tokens][top_k] -> nothing; self.hits counts, self.missed lists (layer, expert)."""
        self.calls += 1
        self.tokens[layer] += len(selected)
        while self.tokens[layer] >= self.half_life:
            self.tokens[layer] -= self.half_life
            self.time[layer] //= 2
            for expert in range(self.experts):
                self.heat[layer, expert] //= 2
        self.time[layer] += len(selected) * self.of_a_use
        uses = Counter(expert for one in selected for expert in one)
        for expert, count in uses.items():
            self.heat[layer, expert] += count * self.of_a_use
            self.last_call[layer, expert] = self.calls
        hits = sorted((layer, e) for e in uses if (layer, e) in self.memory)
        missing = sorted((layer, e) for e in uses if (layer, e) not in self.memory)
        self.hits += len(hits)
        self.missed += missing
        kept, asked, computed = set(hits), 0, 0

        def ask():
            nonlocal asked
            while asked < min(len(missing), computed + self.ahead):
                if len(self.memory) == self.limit:
                    out = [one for one in self.memory if one not in kept]
                    if not out:
                        return
                    self.memory.remove(min(out, key=self.order))
                self.memory.add(missing[asked])
                kept.add(missing[asked])
                asked += 1

        ask()
        for one in hits:
            kept.remove(one)
            ask()
        while computed < len(missing):
            kept.remove(missing[computed])
            computed += 1
            ask()

    def set_limit(self, slots):
        self.limit = max(1, min(slots, self.slots))
        while len(self.memory) > self.limit:
            self.memory.remove(min(self.memory, key=self.order))

    def order(self, one):
        """The least gives up its slot."""
        return Fraction(self.heat[one], self.time[one[0]]), self.last_call[one], one
