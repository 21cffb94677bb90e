"""The same bytes from a real local Ray cluster: 1, 2 and 3 workers, an actor that is killed, a URI."""

import json
import os
import sys

import pytest

from pyengine.distill import ray_data
from pyengine.distill.documents import Documents
from pyengine.distill.extract import Job
from pyengine.distill.labels import LabelOptions
from pyengine.distill.layout import DESCRIPTION
from pyengine.distill.parquet import Place
from pyengine.errors import InputError

pytest.importorskip("tokenizers", reason="needs the extra text")
pytest.importorskip("jinja2", reason="needs the extra text")
pytest.importorskip("pyarrow", reason="needs the extra ray")
ray = pytest.importorskip("ray", reason="needs the extra ray")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "default"
    ),  # of Ray's own code, and of the processes that it leaves to the system
]

OPTIONS = LabelOptions(top_k=None, draws=9, proposal_temperature=1.1)


@pytest.fixture(scope="module")
def cluster():
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        num_cpus=3,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}},
    )
    yield
    ray.shutdown()


@pytest.fixture
def prepare(model, tmp_path):
    source = tmp_path / "source.jsonl"
    lines = [{"text": f"And God said unto them, the {i} of all " + "things " * (i % 5)} for i in range(40)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def made(output, **named):
        documents = Documents((str(source),), model, model.config.vocab_size, 64)
        return Job.prepare(model, documents, OPTIONS, output=output, part_tokens=90, **named)

    return made


def contents(output, filesystem=None):
    place = Place.open(output, filesystem)
    return {name: place.read(name) for name in (DESCRIPTION, *place.parts())}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers(cluster, model, prepare, tmp_path, gguf, workers):
    prepare(tmp_path / "alone").run(model)
    job = prepare(f"file://{tmp_path}/ray")
    assert len(job.plan.parts) > 4
    assert ray_data.run_on_ray(job, gguf, workers=workers) == job.plan.tokens
    assert contents(tmp_path / "ray") == contents(tmp_path / "alone")


def test_what_is_there_is_not_computed_again(cluster, model, prepare, tmp_path, gguf):
    """Ray goes on where one machine was ended, and one machine where Ray was."""
    job = prepare(tmp_path / "out")
    job.run(model)
    want = contents(tmp_path / "out")
    for index in 1, 3:
        (tmp_path / "out" / "data" / f"train-{index:05d}.parquet").unlink()
    lost = sum(prepare(tmp_path / "out").plan.parts[index].tokens for index in (1, 3))
    assert ray_data.run_on_ray(prepare(tmp_path / "out"), gguf, workers=2) == lost
    assert contents(tmp_path / "out") == want
    assert ray_data.run_on_ray(prepare(tmp_path / "out"), gguf, workers=2) == 0
    assert prepare(tmp_path / "out").run(model) == 0


class Dying(ray_data.LabelParts):
    """The actor that is the first to get part 2 kills its process in the middle of it."""

    def __call__(self, table):
        part = table.column("part")[0].as_py()
        with open(f"{self.place.root}/{part}.calls", "a") as file:
            file.write(".")
        if part == 2 and not os.path.exists(f"{self.place.root}/killed"):
            with open(f"{self.place.root}/killed", "w"):
                pass
            label_many = self.labeller.label_many

            def dies(sequences):
                yield next(label_many(sequences))
                os.kill(os.getpid(), 9)

            self.labeller.label_many = dies
        return super().__call__(table)


def test_an_actor_that_is_killed(cluster, model, prepare, tmp_path, gguf, monkeypatch):
    prepare(tmp_path / "alone").run(model)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a worker cannot import the tests
    monkeypatch.setattr(ray_data, "LabelParts", Dying)
    job = prepare(tmp_path / "ray")
    ray_data.run_on_ray(job, gguf, workers=2)
    assert (tmp_path / "ray" / "killed").exists()
    assert contents(tmp_path / "ray") == contents(tmp_path / "alone")
    calls = {part.index: (tmp_path / "ray" / f"{part.index}.calls").stat().st_size for part in job.plan.parts}
    assert (
        calls[2] == 2 and sum(calls.values()) <= len(calls) + 2
    )  # its part, and one that waited for the actor


def test_a_worker_with_another_model(cluster, model, prepare, tmp_path, gguf):
    other = tmp_path / "other.gguf"
    data = bytearray(gguf.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    with pytest.raises(InputError, match="^Ray: .*other.gguf: want the model with the digest "):
        ray_data.run_on_ray(prepare(tmp_path / "out"), other)
    assert not contents(tmp_path / "out").keys() - {DESCRIPTION}


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:x", "127.0.0.1:99999"])
def test_no_cluster_there(address):
    with pytest.raises(InputError, match=f"^--ray: want the address of a cluster, got {address}: "):
        ray_data._connect(Unconnected, address, 1)


class Unconnected:
    """Ray before `init`, which must not be called."""

    @staticmethod
    def is_initialized():
        return False
