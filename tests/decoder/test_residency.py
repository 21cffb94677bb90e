"""Models whose weights may have less memory than they take: the same bits, and what is read for them."""

import dataclasses
import os
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from hf_directory import hf_tensors, write_single
from hypothesis import given, settings
from hypothesis import strategies as st
from make_slice import write_slice
from paths import GOLDEN
from small_slice import SMALL

import pyengine
from pyengine.checkpoint.names import layer_of
from pyengine.checkpoint.open import open_checkpoint
from pyengine.checkpoint.summary import stored_bytes
from pyengine.cli import main
from pyengine.core.expert_cache import PAGE
from pyengine.decoder import memory_watch, residency
from pyengine.decoder.expert_layout import expert_layers
from pyengine.errors import CheckpointError, FileFormatError, InputError, PyengineError
from pyengine.quantizer.quantize import quantize

NAMES = ["pattern31", "next", "slice", "mixed", "int8", "int4", "apart"]
LENGTH = 20


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    config = dataclasses.replace(SMALL, num_experts=16, moe_intermediate_size=128)
    write_slice(folder / "slice.gguf", config)
    write_slice(folder / "mixed.gguf", dataclasses.replace(SMALL, num_experts=9), "Q4_K_M")
    quantize(folder / "slice.gguf", folder / "int8", folder / "int4")
    tensors = hf_tensors(GOLDEN / "bfloat16.gguf", lambda name: "BF16" if "experts." in name else "F32", True)
    write_single(folder / "apart", GOLDEN / "bfloat16.gguf", tensors)
    made = {name: folder / f"{name}.gguf" for name in ("slice", "mixed")}
    made |= {name: folder / name for name in ("int8", "int4", "apart")}
    return {name: made.get(name, GOLDEN / f"{name}.gguf") for name in NAMES}


@pytest.fixture(scope="module")
def wanted(paths):
    """{name: (ids, logits of each)} with all weights in memory."""
    answers = {}
    for name, path in paths.items():
        model = pyengine.load(path, threads=1)
        assert model.experts_in_memory is None
        ids = np.random.default_rng(3).integers(0, model.config.vocab_size, (3, LENGTH))
        answers[name] = ids, [model.forward(one) for one in ids]
    return answers


def least(path):
    checkpoint = open_checkpoint(path)
    return residency.weights_always_used(checkpoint) + residency.least_for_experts(checkpoint)


def expert_bytes(checkpoint):
    """{layer: bytes of one expert in the file}"""
    sizes = Counter()
    for name, tensor in checkpoint.tensors.items():
        if ".mlp.experts." in name:
            sizes[layer_of(name)] += stored_bytes(tensor) // checkpoint.config.num_experts
    return sizes


def same(a, b):
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


RUNS = (
    st.sampled_from(NAMES),
    st.floats(0, 1),
    st.integers(1, 2),
    st.integers(1, 30),
    st.lists(st.integers(1, LENGTH - 1), max_size=4),
    st.booleans(),
)


@settings(max_examples=8, deadline=None)
@given(*RUNS)
def test_the_same_bits(paths, wanted, name, share, threads, chunk, cuts, batch):
    """On any bound, threads, chunk, split of the prompt, alone or in a batch."""
    check_bits(paths, wanted, name, share, threads, chunk, cuts, batch)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(*RUNS)
def test_the_same_bits_more_often(paths, wanted, name, share, threads, chunk, cuts, batch):
    check_bits(paths, wanted, name, share, threads, chunk, cuts, batch)


def check_bits(paths, wanted, name, share, threads, chunk, cuts, batch):
    path, low = paths[name], least(paths[name])
    tensors = open_checkpoint(path).tensors.items()
    high = sum(stored_bytes(t) for name, t in tensors if name != residency.EMBEDDING) - 1
    memory = low + int(share * (high - low))
    model = pyengine.load(path, threads=threads, memory=memory)
    caches = model.experts_in_memory
    assert caches.plan.always + caches.nbytes <= memory
    ids, logits = wanted[name]
    states = [model.new_state() for _ in ids]
    stops = sorted({*cuts, LENGTH})
    for start, stop in zip([0, *stops], stops):
        if batch:
            got = model.forward_batch([(one[start:stop], s) for one, s in zip(ids, states)], chunk=chunk)
        else:
            got = [model.forward(one[start:stop], s, chunk=chunk) for one, s in zip(ids, states)]
        for mine, want in zip(got, logits):
            assert same(mine, want[start:stop])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_is_what_was_missing(paths, wanted, name):
    """A prompt reads each expert that it uses once; then every token the experts that are not there."""
    model = pyengine.load(paths[name], threads=2, memory=least(paths[name]))
    caches, size = model.experts_in_memory, expert_bytes(model.checkpoint)
    used = set()

    def record(module, selected):
        if module.endswith(".gate.2"):
            used.update((layer_of(module), int(expert)) for expert in selected.ravel())

    ids, logits = wanted[name]
    state = model.new_state()
    assert same(model.forward(ids[0], state, record=record), logits[0])
    counts = caches.counts()
    assert (counts.hits, counts.misses) == (0, len(used))
    assert counts.asked_bytes == sum(size[layer] for layer, _ in used)
    for token in ids[1]:
        before = caches.counts()
        model.forward([token], state)
        counts = caches.counts() - before
        layers = sum(map(model.config.has_experts, range(model.config.num_hidden_layers)))
        assert counts.hits + counts.misses == layers * model.config.num_experts_per_tok
        assert counts.misses * min(size.values()) <= counts.asked_bytes <= counts.misses * max(size.values())
        reads = counts.misses * max(cache.slot_bytes for cache in caches.caches)
        assert counts.asked_bytes <= counts.read_bytes <= reads
    total = caches.counts()
    assert total.resident <= sum(cache.slots for cache in caches.caches)
    assert total.wait_ns >= 0 and 0 <= total.hit_rate < 1


def test_an_expert_in_use_is_read_once(paths):
    path = paths["slice"]
    (size,) = {layer.slot_bytes for layer in expert_layers(open_checkpoint(path), True).values()}
    model = pyengine.load(path, threads=2, memory=least(path) + 6 * size)
    for _ in range(30):
        model.forward([5])
    counts = model.experts_in_memory.counts()
    assert (counts.misses, counts.hits) == (8, 29 * 8)


class TestErrors:
    def test_a_memory_that_is_too_small(self, paths, capsys):
        for name in ("pattern31", "int4"):
            low = least(paths[name])
            with pytest.raises(
                InputError, match="--memory: want at least .* that every token uses and"
            ) as error:
                pyengine.load(paths[name], memory=low - 1)
            size = str(error.value).split()[4]
            assert main(["generate", "-m", str(paths[name]), "--ids", "1", "-n", "1", "--memory", size]) == 0
            assert main(["generate", "-m", str(paths[name]), "--ids", "1", "-n", "1", "--memory", "1K"]) == 2
            assert capsys.readouterr().err.count("\n") == 1

    def test_a_dense_model_needs_all(self):
        with pytest.raises(InputError, match="want at least .* for its weights, all of which every token"):
            pyengine.load(GOLDEN / "dense.gguf", memory=100_000)

    def test_float64_has_no_bound(self):
        with pytest.raises(InputError, match="memory: want a locked arithmetic"):
            pyengine.load(GOLDEN / "pattern31.gguf", "float64", memory=1 << 30)

    @pytest.mark.parametrize("part, row", [("ffn_gate_exps", 3), ("ffn_down_exps", 0)])
    def test_a_scale_that_is_not_finite(self, tmp_path, part, row):
        """As with all weights in memory: the tensor and the place; only later, when the expert is read."""
        path = tmp_path / "nan.gguf"
        data = bytearray((GOLDEN / "pattern31.gguf").read_bytes())
        tensor = open_checkpoint(GOLDEN / "pattern31.gguf").file.tensors[f"blk.1.{part}.weight"]
        at = tensor.offset + row * tensor.data.strides[1] + 4 * tensor.data.strides[0]
        data[at : at + 2] = np.array([np.nan], "<f2").tobytes()
        path.write_bytes(data)
        with pytest.raises(CheckpointError) as want:
            pyengine.load(path)
        ids = np.arange(60)
        model = pyengine.load(path, memory=least(path))
        with pytest.raises(CheckpointError) as got:
            model.forward(ids)
        assert str(got.value) == str(want.value)
        pyengine.load(path, memory=least(path), check=False)

    def test_a_file_that_changed(self, tmp_path):
        path = tmp_path / "model.gguf"
        path.write_bytes((GOLDEN / "pattern31.gguf").read_bytes())
        model = pyengine.load(path, memory=least(path))
        caches = model.experts_in_memory
        os.truncate(path, 100_000)
        with pytest.raises(FileFormatError, match="it has changed since"), caches.explaining_errors():
            raise PyengineError("a read failed")
        with pytest.raises(FileFormatError, match="it has changed since"):
            model.forward([1])

    def test_a_file_that_was_replaced(self, tmp_path):
        path = tmp_path / "model.gguf"
        path.write_bytes((GOLDEN / "pattern31.gguf").read_bytes())
        checkpoint = open_checkpoint(path)
        (tmp_path / "other").write_bytes(b"other")
        os.replace(tmp_path / "other", path)
        with pytest.raises(FileFormatError, match="got another one under its name"):
            checkpoint.file.maps[0].open_again(False)


class TestWithoutReadsPastThePageCache:
    def test_bits_and_counts(self, paths, wanted, monkeypatch):
        """A file system, or a system, that has none."""
        monkeypatch.setattr(residency.MappedFile, "open_again", self.without(residency.MappedFile.open_again))
        model = pyengine.load(paths["slice"], threads=2, memory=least(paths["slice"]))
        ids, logits = wanted["slice"]
        assert same(model.forward(ids[2]), logits[2])
        assert model.experts_in_memory.counts().misses > 0

    def without(self, open_again):
        def refuse(mapped, past_cache):
            if past_cache:
                raise OSError(22, "Invalid argument")
            return open_again(mapped, past_cache)

        return refuse


class TestTheDefault:
    def test_what_fits_stays_mapped(self, paths):
        checkpoint = open_checkpoint(paths["slice"])
        assert residency.plan_memory(checkpoint) is None
        assert residency.plan_memory(checkpoint, 1 << 30) is None

    def test_it_is_what_is_available(self, paths, monkeypatch):
        checkpoint, room = open_checkpoint(paths["slice"]), residency.SPARE + (1 << 20)
        for available in (room + (64 << 20), 1000):  # enough for the state; so little that nothing helps
            monkeypatch.setattr(residency, "available_memory", lambda available=available: available)
            assert residency.plan_memory(checkpoint, context=1, chunk=1) is None
        state = residency.footprint(checkpoint, 1, 1, 1)["total"]
        bound = least(paths["slice"]) + 5 * PAGE
        available = (bound + state) * 10 // 9
        monkeypatch.setattr(residency, "available_memory", lambda: available + residency.SPARE)
        assert (
            residency.plan_memory(checkpoint, context=1, chunk=1).memory
            == available - available // 10 - state
        )
        states = [residency.footprint(checkpoint, tokens, 1, 1)["total"] for tokens in (8192, 32_768)]
        available = (states[1] + least(paths["slice"]) + PAGE) * 10 // 9
        monkeypatch.setattr(residency, "available_memory", lambda: available + residency.SPARE)
        assert available - states[0] > 1 << 25  # all fits beside a short context
        assert residency.plan_memory(checkpoint, chunk=1) is None
        memory = residency.plan_memory(checkpoint, chunk=1, context=32_768).memory
        assert memory == available - available // 10 - states[1]


def room_for(monkeypatch, checkpoint, share):
    """Available from now on: the state of 2 tokens and this share of the experts have room."""
    state = residency.footprint(checkpoint, 2, 1, 1)["total"]
    always, low = residency.weights_always_used(checkpoint), residency.least_for_experts(checkpoint)
    experts = sum(stored_bytes(t) for name, t in checkpoint.tensors.items() if ".mlp.experts." in name)
    memory = always + max(low, int(share * experts))
    available = -(-(memory + state) * residency.LEFT // (residency.LEFT - 1)) + residency.SPARE
    monkeypatch.setattr(residency, "available_memory", lambda: available)
    return available


class TestABoundThatFollowsTheMachine:
    """available_memory says what the test wants; a model's own slots are taken from it when they are full."""

    def load(self, monkeypatch, path, share=0.5):
        monkeypatch.setattr(residency, "LOOK_EVERY", 0.0)
        available = room_for(monkeypatch, open_checkpoint(path), share)
        model = pyengine.load(path, threads=2, context=2, chunk=1)
        caches = model.experts_in_memory
        assert caches.memory == caches.plan.memory and 0 < caches.plan.others <= available // residency.LEFT
        return model, caches, available - caches.plan.always

    def filled(self, caches):
        return sum(cache.counts().resident * cache.slot_bytes for cache in caches.caches)

    @settings(max_examples=8, deadline=None)
    @given(
        st.sampled_from(["slice", "mixed", "int4"]), st.lists(st.floats(-2.0, 2.0), min_size=1, max_size=6)
    )
    def test_bits_and_bound(self, paths, wanted, name, shares):
        """Others take and give back memory, as shares of the experts; nothing else may change."""
        with pytest.MonkeyPatch.context() as patch:
            model, caches, free = self.load(patch, paths[name])
            ids, logits = wanted[name]
            low, state = least(paths[name]), model.new_state()
            for start, stop in zip(range(0, LENGTH, 2), range(2, LENGTH + 1, 2)):
                taken = int(shares[start // 2 % len(shares)] * caches.plan.experts)
                patch.setattr(residency, "available_memory", lambda taken=taken: max(0, free - taken))
                got = model.forward(ids[0][start:stop], state)
                assert same(got, logits[0][start:stop])
                assert caches.plan.always + caches.nbytes <= max(low, caches.memory)
                assert self.filled(caches) <= caches.nbytes

    def test_what_it_becomes(self, paths, monkeypatch):
        model, caches, free = self.load(monkeypatch, paths["slice"])
        plan, before = caches.plan, caches.nbytes

        def forward(available):
            """available: with no slot filled."""
            monkeypatch.setattr(residency, "available_memory", lambda: int(available) - self.filled(caches))
            model.forward([5])
            return caches.memory

        assert forward(free) == plan.memory and caches.nbytes == before
        # Others take less than half of what was left to them, and then more.
        half = plan.others // 2
        assert forward(before + half) == plan.memory
        assert forward(before + half - 1) == plan.memory - (plan.others - half + 1)
        assert caches.nbytes < before
        assert forward(0) == least(paths["slice"])
        assert sum(cache.limit for cache in caches.caches) == model.config.num_experts_per_tok
        # They give it back, and more.
        everything = 16 * len(model.layers)
        forward(1 << 40)
        assert sum(cache.limit for cache in caches.caches) == everything
        for token in range(200):
            model.forward([token])
        counts = caches.counts()
        model.forward([3])
        assert (caches.counts() - counts).misses == 0

    def test_a_bound_that_was_given_stays(self, paths, monkeypatch):
        model = pyengine.load(paths["slice"], memory=least(paths["slice"]))
        monkeypatch.setattr(residency, "available_memory", lambda: 1 << 40)
        caches = model.experts_in_memory
        before = caches.nbytes
        model.forward([1])
        assert caches.nbytes == before and caches.memory == least(paths["slice"])

    def test_a_system_without_addresses_for_all(self, paths, wanted, monkeypatch):
        made = residency.ExpertCache

        def strict(layers, slots, *others):
            if slots >= len(layers) * 16:
                raise PyengineError("could not be set aside")
            return made(layers, slots, *others)

        monkeypatch.setattr(residency, "ExpertCache", strict)
        model, caches, _ = self.load(monkeypatch, paths["slice"])
        monkeypatch.setattr(residency, "available_memory", lambda: 1 << 40)
        assert same(model.forward(wanted["slice"][0][0]), wanted["slice"][1][0])
        assert all(cache.limit == cache.slots < 16 * len(model.layers) for cache in caches.caches)


class TestMappedWeightsThatTheSystemTakesAway:
    def load(self, monkeypatch, path, **options):
        """-> the model; faults: the reads from the disk that a pass will cost."""
        self.faults = self.total = 0

        def disk_faults():
            self.total += self.faults
            return self.total

        monkeypatch.setattr(memory_watch, "disk_faults", disk_faults)
        model = pyengine.load(path, threads=2, context=2, chunk=1, **options)
        assert model.experts_in_memory is None
        return model

    def test_the_experts_are_read_from_then_on(self, paths, wanted, monkeypatch):
        """In the middle of two sequences, to the same bits."""
        for name in ("slice", "mixed", "int4", "apart"):
            model = self.load(monkeypatch, paths[name])
            ids, logits = wanted[name]
            states = [model.new_state() for _ in ids]
            for at in range(LENGTH):
                if at == 5:
                    self.faults = memory_watch.FAULTS + 1
                    room_for(monkeypatch, model.checkpoint, 0.5)
                for one, state, want in zip(ids, states, logits):
                    (got,) = model.forward([one[at]], state)
                    assert same(got, want[at])
            assert model.experts_in_memory.counts().misses > 0
            monkeypatch.undo()

    def test_in_a_batch_and_with_the_largest_logits_alone(self, paths, wanted, monkeypatch):
        model = self.load(monkeypatch, paths["slice"])
        ids, logits = wanted["slice"]
        alone, (first, second) = model.new_state(), [model.new_state() for _ in range(2)]
        model.forward([ids[2][0]], alone)
        model.forward([ids[2][1]], alone, largest=1)
        self.faults = memory_watch.FAULTS * 3
        room_for(monkeypatch, model.checkpoint, 0.5)
        for at in range(LENGTH):
            got = model.forward_batch([([ids[0][at]], first), ([ids[1][at]], second)])
            assert same(got[0][0], logits[0][at]) and same(got[1][0], logits[1][at])
        assert model.experts_in_memory is not None
        assert same(model.complete_logits(alone), logits[2][1])
        model.forward([ids[2][2]], alone, largest=1)
        assert same(model.complete_logits(alone), logits[2][2])

    def test_what_has_room_stays_mapped(self, paths, monkeypatch):
        """After a pause, or in a prompt, many reads mean nothing."""
        model, asked = self.load(monkeypatch, paths["slice"]), []
        monkeypatch.setattr(model._watch, "plan_now", lambda: asked.append(1))
        self.faults = memory_watch.FAULTS
        for _ in range(3 * memory_watch.PASSES):
            model.forward([1])
        assert not asked
        self.faults += 1
        for _ in range(3 * memory_watch.PASSES):
            model.forward([1])
        assert len(asked) == 1 and model.experts_in_memory is None
        later = time.monotonic() + memory_watch.PATIENCE
        monkeypatch.setattr(memory_watch.time, "monotonic", lambda: later)
        model.forward([1])
        model.forward([1])
        assert len(asked) == 2

    def test_a_bound_that_was_given_stays(self, paths, monkeypatch):
        model = self.load(monkeypatch, paths["slice"], memory=1 << 40)
        self.faults = 1000
        room_for(monkeypatch, model.checkpoint, 0.5)
        for _ in range(3 * memory_watch.PASSES):
            model.forward([1])
        assert model.experts_in_memory is None

    def test_a_file_that_was_replaced_stays_mapped(self, tmp_path, monkeypatch):
        path = tmp_path / "model.gguf"
        path.write_bytes((GOLDEN / "pattern31.gguf").read_bytes())
        model = self.load(monkeypatch, path)
        want = model.forward([1, 2, 3])
        (tmp_path / "other").write_bytes(b"other")
        os.replace(tmp_path / "other", path)
        self.faults = 1000
        room_for(monkeypatch, model.checkpoint, 0.5)
        for _ in range(3 * memory_watch.PASSES):
            assert same(model.forward([1, 2, 3]), want)
        assert model.experts_in_memory is None


READ_IN = """
import sys
from pyengine.checkpoint.open import open_checkpoint
from pyengine.decoder.residency import read_in
checkpoint = open_checkpoint(sys.argv[1])
(mapped,) = checkpoint.file.maps
read_in(checkpoint, experts=sys.argv[2] == "all")
print(sum(stop - start for start, stop in mapped.missing(0, len(mapped), 4096)))
"""


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no way to empty the page cache")
def test_reading_in(tmp_path):
    """Every page that a token uses is in the page cache afterwards."""
    path = tmp_path / "model.gguf"
    with open(path, "wb") as file:
        file.write((GOLDEN / "pattern31.gguf").read_bytes())
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    run = subprocess.run(
        [sys.executable, "-c", READ_IN, path, "all"], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) == 0 and run.stderr == ""


def test_info_says_what_is_read(paths, capsys):
    low = least(paths["next"])
    model = str(paths["next"])
    assert main(["info", model, "--memory", str(low)]) == 0
    out = capsys.readouterr().out
    checkpoint = open_checkpoint(model)
    plan = residency.plan_memory(checkpoint, low)
    assert f"{residency.missed_bytes_per_token(checkpoint, plan):,} bytes, if all experts" in out
    assert main(["info", "--memory", model]) == 0
    assert "all weights stay in memory" in capsys.readouterr().out
    assert main(["info", model, "--memory", "much"]) == 2


def test_bench_says_what_is_read(paths, capsys, monkeypatch):
    monkeypatch.setattr("pyengine.evaluation.bench.read_bandwidth", lambda threads: 1.0)
    low = str(least(paths["next"]))
    command = ["bench", "-m", str(paths["next"]), "-p", "8", "-n", "4", "-r", "1", "-t", "1"]
    assert main([*command, "--memory", low]) == 0
    assert "missed MB/token" in capsys.readouterr().out
    assert main(command) == 0
    assert "missed MB/token" not in capsys.readouterr().out
