"""vocabulary: what becomes of a teacher's ids in a student's vocabulary.  relabel: of its labels."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import InputError
from ..tables import table
from .options import add_json, new_command, positive, read_text

TOKENIZER = "a GGUF, a Hugging Face directory, a tokenizer.json, or Qwen's ranks (.tiktoken)"
TOKENS = 1024


def add_commands(commands):
    _add_vocabulary(commands)
    _add_relabel(commands)


def _add_vocabulary(commands):
    parser = new_command(
        commands,
        "vocabulary",
        _vocabulary,
        "Compare a teacher's vocabulary with a student's by the bytes of the tokens. It counts the ids that "
        "the student has too (exact), those whose bytes are several of its tokens (projected), and those "
        "that it cannot spell (lost).",
    )
    parser.add_argument("teacher", metavar="TEACHER", help=TOKENIZER)
    parser.add_argument("student", metavar="STUDENT", help="the same, of the student")
    parser.add_argument(
        "-f",
        "--file",
        metavar="TEXT",
        help="count in a text too: tokens of each kind, and rows with a place for labels; -: standard input "
        "(default: no text)",
    )
    parser.add_argument(
        "--probabilities",
        action="store_true",
        help="with -f: run the teacher, a model, over the text, and add the mean probability of each kind",
    )
    parser.add_argument(
        "-n",
        "--tokens",
        type=positive,
        default=TOKENS,
        metavar="N",
        help=f"with --probabilities: over the first N tokens (default: {TOKENS})",
    )
    _add_map(parser)
    add_json(parser)


def _add_relabel(commands):
    parser = new_command(
        commands,
        "relabel",
        _relabel,
        "Turn a data set of `pyengine labels` into a student's vocabulary. The labels are placed where both "
        "tokenizers have a boundary; the others are counted and left out.",
    )
    parser.add_argument(
        "dataset", metavar="DATASET", help="the directory, or URI, that `pyengine labels` wrote"
    )
    parser.add_argument(
        "-m", "--model", required=True, metavar="TEACHER", help=f"the teacher's tokenizer: {TOKENIZER}"
    )
    parser.add_argument("--student", required=True, metavar="STUDENT", help="the student's tokenizer")
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="the new data set: a directory, or URI"
    )
    _add_map(parser)


def _add_map(parser):
    parser.add_argument(
        "--pair",
        action="append",
        default=[],
        metavar="T=S",
        help="the teacher's token of text T means the student's of text S: '<|im_end|>=</s>'; may be given "
        "again (default: none)",
    )
    parser.add_argument(
        "--student-size",
        type=positive,
        metavar="N",
        help="ids of the student's model, where it has more than the tokenizer (default: as the file says)",
    )
    parser.add_argument(
        "--larger-student",
        action="store_true",
        help="allow a student of more tokens than the teacher; those get no probability (default: an error)",
    )


# ---- vocabulary --------------------------------------------------------------------------------


def _vocabulary(options):
    if options.probabilities and not options.file:
        raise InputError("--probabilities: want -f TEXT, which the teacher reads")
    text = read_text(options.file) if options.file else None
    if text == "":
        raise InputError(f"{options.file}: want a text, got an empty one")
    vocabularies = _map(options.teacher, options)
    figures = _figures(options, vocabularies)
    if text is not None:
        figures |= _figures_of_text(options, vocabularies, text)
    print(json.dumps(figures, indent=2) if options.json else "\n".join(_lines(figures)))


def _map(teacher, options):
    from ..distill.vocabulary import VocabularyMap, open_vocabulary

    ours, theirs = open_vocabulary(teacher), open_vocabulary(options.student)
    pairs = dict(_pair(text, ours, theirs) for text in options.pair)
    return VocabularyMap(
        ours, theirs, pairs=pairs, student_size=options.student_size, larger=options.larger_student
    )


def _pair(text, teacher, student):
    left, equals, right = text.partition("=")
    if not equals:
        raise InputError(f"--pair: want T=S, got {text[:200]!r}")
    return _token(teacher, "teacher", left), _token(student, "student", right)


def _token(tokenizer, name, text):
    ids = tokenizer.encode(text, special=True)
    if len(ids) != 1:
        raise InputError(f"--pair: want one token of the {name}, got {len(ids)}: {text[:200]!r}")
    return ids[0]


def _figures(options, vocabularies) -> dict:
    return {
        "teacher": {"name": Path(options.teacher).name, "ids": vocabularies.teacher_size},
        "student": {"name": Path(options.student).name, "ids": vocabularies.student_size},
        "ids": vocabularies.counts,
        "same_ids": vocabularies.same_ids,
        "differing_ids": len(vocabularies.differing_ids),
        "cut_ids": vocabularies.cut_ids,
        "unreached": vocabularies.unreached,
        "one_vocabulary": vocabularies.one_vocabulary,
    }


def _figures_of_text(options, vocabularies, text) -> dict:
    from ..distill.alignment import align

    ids = vocabularies.teacher.encode_prompt(text)
    alignment = align(ids, vocabularies)
    figures = {
        "text": {
            "teacher_tokens": len(ids),
            "student_tokens": len(alignment.student_ids),
            "kinds": vocabularies.count(ids),
            "boundaries_shared": int((alignment.shared >= 0).sum()),
            "same_next_token": int(alignment.exact.sum()),
            "rows": alignment.counts,
        }
    }
    if options.probabilities:
        figures["text"]["probabilities"] = _probabilities(options, vocabularies, ids[: options.tokens])
    return figures


def _probabilities(options, vocabularies, ids) -> dict:
    """Kind -> its mean probability over the text's tokens."""
    from .. import load
    from ..probabilities import softmax

    model = load(options.teacher)
    sums = dict.fromkeys(vocabularies.counts, 0.0)
    for _, _, logits in model.logits_in_pieces([ids], rows=64):
        for name, mass in vocabularies.masses(softmax(logits)).items():
            sums[name] += float(mass.sum())
    return {name: total / len(ids) for name, total in sums.items()}


def _lines(figures) -> list[str]:
    lines = [
        f"{name}  {figures[name]['name']}, {figures[name]['ids']:,} ids" for name in ("teacher", "student")
    ]
    lines += ["", *table(_rows_of_kinds(figures), "<>>>>>")]
    one = "sizes of one vocabulary" if figures["one_vocabulary"] else "two vocabularies"
    lines += [
        "",
        f"{one}: {figures['same_ids']:,} ids mean the same, {figures['differing_ids']:,} of the student's do "
        f"not, {figures['cut_ids']:,} tokens lie behind its last",
        f"{figures['unreached']:,} of the student's tokens are the place of no id",
    ]
    if "text" in figures:
        lines += _lines_of_text(figures["text"])
    return lines


def _rows_of_kinds(figures):
    text = figures.get("text", {})
    head = ["", "teacher's ids", "share"]
    head += ["of the text", "share"] if text else []
    head += ["probability"] if "probabilities" in text else []
    rows = [head]
    for kind, count in figures["ids"].items():
        row = [kind, f"{count:,}", f"{count / figures['teacher']['ids']:.2%}"]
        if text:
            row += [f"{text['kinds'][kind]:,}", f"{text['kinds'][kind] / text['teacher_tokens']:.2%}"]
        if "probabilities" in text:
            row.append(f"{text['probabilities'][kind]:.6f}")
        rows.append(row)
    return rows


def _lines_of_text(text) -> list[str]:
    rows, total = text["rows"], text["student_tokens"]
    return [
        "",
        f"text: {text['teacher_tokens']:,} tokens of the teacher, {total:,} of the student",
        f"boundaries of both: {text['boundaries_shared']:,} ({text['boundaries_shared'] / total:.2%})",
        f"rows with labels: {rows['placed']:,} ({rows['placed'] / total:.2%}); next token is the same in "
        f"{text['same_next_token']:,}",
        f"without: {rows['inside']:,} inside a teacher's token, {rows['other']:,} where the student cuts "
        f"otherwise, {rows['last']:,} at the end",
    ]


# ---- relabel -----------------------------------------------------------------------------------


def _relabel(options):
    from ..distill.relabel import Relabelling

    relabelling = Relabelling.prepare(options.dataset, _map(options.model, options), output=options.output)
    counts = relabelling.run()
    total = sum(counts[name] for name in ("placed", "inside", "other", "last", "lost"))
    if not total:
        print(f"{options.output}: complete already")
        return
    print(
        f"{options.output}: {total:,} tokens of the student, {counts['placed']:,} with labels "
        f"({counts['placed'] / total:.2%}); without: {counts['inside']:,} inside a teacher's token, "
        f"{counts['other']:,} where the student cuts otherwise, {counts['last']:,} at the end of a row, "
        f"{counts['lost']:,} whose labels are lost; {counts['left_out']:,} special tokens left out"
    )
