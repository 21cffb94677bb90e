"""Merges of two trained models, each measured on both parents' kinds of text: prints the table.

    python tools/train/merge_table.py -o OUT                  # trains the mother first: minutes of a core
    python tools/train/merge_table.py -o OUT --mother MOTHER  # a mother that train_mother.py has made

The father is the embedded model, `tests/trained/bf16.gguf`, which has read the King James Bible.  The mother
is the father after it has read the Jargon File too.  The father is the base of every method.  Each merge has
weight 0.5 and, where the method has one, density 0.5, from seed 1729: nothing was tuned.  Three merges are
guided by a census of each parent on a sample of what it was trained on:

    dead experts   dare_ties, with density 0 for the mother's dead experts: those stay the father's
    rare experts   the same for experts below a quarter of the mean: at 5 % the mother may have none
    by use         linear, with weights per layer and expert: a parent's share of the expert's tokens over the
                   sum of both parents' shares

The texts that are scored were held out of both trainings and both censuses.  OUT has the censuses, the
configurations, the merges, and `table.md`.  What is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from jargon_text import entries, jargon_text
from jargon_text import split as split_jargon
from tiny_text import SEED, bible_text, chapters
from tiny_text import split as split_bible

import pyengine
from pyengine.census.census import BELOW, CONTEXT, describe, take_census
from pyengine.census.texts import encode
from pyengine.evaluation.perplexity import Scores, as_chunks, bos_id, evaluate, join, mean, perplexity
from pyengine.merge.merge import merge
from pyengine.tables import markdown_table

ROOT = Path(__file__).parents[2]
FATHER = ROOT / "tests" / "trained" / "bf16.gguf"
BIBLE_HELD_OUT = ROOT / "tests" / "held_out" / "kjv.txt"
SAMPLE = 16  # a census reads every 16th chapter or entry of the training text
WEIGHT = DENSITY = 0.5
RARE = 0.25  # of the mean of a layer
GUIDED = {"census: by use": "linear", "census: rare experts": "dare_ties"}  # and what each differs from


def merge_table(out: Path, mother: Path | None, threads: int | None) -> str:
    """-> the table, as Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    if mother is None:
        mother = out / "mother"
        if not (mother / "held_out.txt").exists():
            trainer = Path(__file__).with_name("train_mother.py")
            subprocess.run([sys.executable, trainer, "-o", mother], check=True)
    mother = mother / "bf16.gguf"
    jargon, jargon_held_out = split_jargon(entries(jargon_text()))
    bible = [chapter.text for chapter in split_bible(chapters(bible_text()))[0]]
    censuses = {
        "father": take(out / "father.json", FATHER, "bible", bible, threads),
        "mother": take(out / "mother.json", mother, "jargon", jargon, threads),
    }
    models = {"father": FATHER, "mother": mother}
    for name, said in configurations(mother, out / "mother.json", censuses).items():
        models[name] = out / "-".join(re.findall("[a-z_]+", name))
        written = models[name].with_suffix(".yaml")
        document = json.dumps(said, indent=1)  # JSON is YAML
        if models[name].exists() and written.read_text() != document:
            raise ValueError(f"{models[name]}: want a merge of this configuration, got another: remove it")
        written.write_text(document)
        if not models[name].exists():
            merge(written, models[name], threads=threads)
    texts = BIBLE_HELD_OUT.read_text().removesuffix("\n"), "".join(jargon_held_out).removesuffix("\n")
    rows = [("model", "Bible", "Jargon File", "geometric mean")]
    scores = {name: [score(path, text, threads) for text in texts] for name, path in models.items()}
    for name, own in scores.items():
        figures = [perplexity(one) for one in own]
        both = math.sqrt(figures[0].value * figures[1].value)
        rows.append((name, *(f"{value:.2f} ± {error:.2f}" for value, error in figures), f"{both:.2f}"))
    lines = [f"{name} against {base}: {gain(scores[name], scores[base])}" for name, base in GUIDED.items()]
    lines += map(below_the_mean, censuses, censuses.values())
    return "\n".join([*markdown_table(rows, "<>>>"), "", *lines])


def gain(own: list[Scores], base: list[Scores]) -> str:
    """The mean difference of two merges over the same tokens, of each text."""
    differences = [mean(one.nll - other.nll) for one, other in zip(own, base, strict=True)]
    figures = " and ".join(f"{value:+.4f} ± {error:.4f}" for value, error in differences)
    return f"{figures} nats per token."


def below_the_mean(name: str, census: dict) -> str:
    """A sentence: how many experts are dead, and how many are rare."""
    use = [e["tokens"] / census["mean_tokens"] for layer in census["layers"] for e in layer["experts"]]
    dead, rare = (sum(one < below for one in use) for below in (BELOW, RARE))
    return f"The {name}: {dead} of {len(use)} experts below {BELOW:g} of the mean, {rare} below {RARE:g}."


def take(path: Path, model: Path, name: str, texts: list[str], threads: int | None) -> dict:
    """The census of a model on a sample of the texts, also written to the path."""
    if not path.exists():
        loaded = pyengine.load(model, threads=threads)
        text = encode(loaded, name, "".join(texts[::SAMPLE]))
        counts = take_census(loaded, [text])
        said = describe(loaded, [text], counts, context=CONTEXT, dead=BELOW)
        path.write_text(json.dumps(said, indent=1))
    return json.loads(path.read_text())


def configurations(mother: Path, census: Path, censuses: dict) -> dict[str, dict]:
    """{name: document}; the father is the base."""

    def of(method: str, **parameters) -> dict:
        more = {"normalize": False} if method == "ties" else {}
        return {
            "merge_method": method,
            "base_model": str(FATHER),
            "models": [{"model": str(mother), "parameters": {"weight": WEIGHT, **parameters}}],
            "parameters": more,
            "seed": SEED,
        }

    return {
        "linear": linear(mother, WEIGHT, WEIGHT),
        "task_arithmetic": of("task_arithmetic"),
        "ties": of("ties", density=DENSITY),
        "dare_linear": of("dare_linear", density=DENSITY),
        "dare_ties": of("dare_ties", density=DENSITY),
        "census: dead experts": of("dare_ties", density=stay_the_fathers(census, BELOW)),
        "census: rare experts": of("dare_ties", density=stay_the_fathers(census, RARE)),
        "census: by use": linear(mother, *by_use(censuses["father"], censuses["mother"])),
    }


def stay_the_fathers(census: Path, below: float) -> list[dict]:
    return [{"census": str(census), "below": below, "dead": 0.0, "living": DENSITY}, {"value": DENSITY}]


def linear(mother: Path, father_weight, mother_weight) -> dict:
    return {
        "merge_method": "linear",
        "models": [
            {"model": str(FATHER), "parameters": {"weight": father_weight}},
            {"model": str(mother), "parameters": {"weight": mother_weight}},
        ],
        "seed": SEED,
    }


def by_use(father: dict, mother: dict) -> tuple[list, list]:
    """The weights of each parent, per layer and expert: its share over the sum of both shares."""
    rules: tuple[list, list] = ([], [])
    for one, other in zip(father["layers"], mother["layers"], strict=True):
        a, b = ([expert["share"] for expert in layer["experts"]] for layer in (one, other))
        for own, x, y in ((rules[0], a, b), (rules[1], b, a)):
            own.append(
                {
                    "filter": ".mlp.experts.",
                    "layers": [one["layer"]],
                    "per_expert": [p / (p + q) if p + q else 0.5 for p, q in zip(x, y, strict=True)],
                }
            )
    return rules[0] + [{"value": WEIGHT}], rules[1] + [{"value": WEIGHT}]


def score(path: Path, text: str, threads: int | None) -> Scores:
    """Of a text's tokens, as `pyengine perplexity -c 512` scores them."""
    model = pyengine.load(path, threads=threads)
    chunks = as_chunks(model.tokenizer.encode_prompt(text), 512)
    return join(evaluate(model, chunks, bos_id(model.checkpoint)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--mother", type=Path, help="what train_mother.py wrote (default: a new one)")
    parser.add_argument("-t", "--threads", type=int)
    options = parser.parse_args()
    table = merge_table(options.out, options.mother, options.threads)
    (options.out / "table.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
