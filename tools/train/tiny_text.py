"""The text that the embedded model learns: the King James Bible, as chapters and as conversations.

Source: the Debian package `bible-kjv-text`, whose `/usr/lib/bible.data` holds "Holy Bible, Authorized
(King James) Version. Textfile 930105". The translation is of 1611 and its copyright has expired (in
the United Kingdom its printing is a matter of letters patent). The package's notice on the file is
quoted in `tests/held_out/README.md`.

    bible_text()            the file's text, its sha256 checked
    chapters(text)          -> [Chapter]
    split(chapters)         -> training, validation, held out: whole chapters
    Conversations(chapters) questions whose answers are verses, in the chat template below
    train_tokenizer(texts)  a byte-level BPE in Qwen3.5's pattern

Everything random is drawn from seed 1729.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
import struct
import subprocess
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jinja2
import tokenizers

from pyengine.text.gguf_vocabulary import QWEN35_PATTERN

SEED = 1729

PACKAGE, MEMBER = "bible-kjv-text", "usr/lib/bible.data"
TEXT_SHA256 = "e53aaf0af1e58f259e35d0d9f7ca1bbe154fd77bb95471279b37b34d3c397a98"

BOOKS = (
    "Genesis, Exodus, Leviticus, Numbers, Deuteronomy, Joshua, Judges, Ruth, 1 Samuel, 2 Samuel, "
    "1 Kings, 2 Kings, 1 Chronicles, 2 Chronicles, Ezra, Nehemiah, Esther, Job, Psalms, Proverbs, "
    "Ecclesiastes, Song of Solomon, Isaiah, Jeremiah, Lamentations, Ezekiel, Daniel, Hosea, Joel, "
    "Amos, Obadiah, Jonah, Micah, Nahum, Habakkuk, Zephaniah, Haggai, Zechariah, Malachi, "
    "Matthew, Mark, Luke, John, Acts, Romans, 1 Corinthians, 2 Corinthians, Galatians, Ephesians, "
    "Philippians, Colossians, 1 Thessalonians, 2 Thessalonians, 1 Timothy, 2 Timothy, Titus, "
    "Philemon, Hebrews, James, 1 Peter, 2 Peter, 1 John, 2 John, 3 John, Jude, Revelation"
).split(", ")

HELD_OUT_BYTES, VALIDATION_BYTES = 96 * 1024, 48 * 1024

END_OF_TEXT = "<|endoftext|>"
CONTROL_TOKENS = [END_OF_TEXT, "<|im_start|>", "<|im_end|>"]
THINK_TOKENS = ["<think>", "</think>"]

# As the family's: an answer in the history loses its thinking; the prompt opens a block to think in,
# or, with thinking off, an empty one.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('role: want system, user or assistant, got ' + message.role) -}}
{%- endif -%}
{%- set content = message.content | trim -%}
{%- if message.role == 'assistant' -%}
{%- set content = (content.split('</think>') | last) | trim -%}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n<think>\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
"""


# ---- the text ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chapter:
    """book: its name; number: from 1; verses: their texts, without numbers."""

    book: str
    number: int
    verses: tuple[str, ...]

    @property
    def text(self) -> str:
        """Heading, blank line, a line for each verse, blank line."""
        return "\n".join([f"{self.book} {self.number}", "", *self.verses, "", ""])


def bible_text(deb: Path | None = None) -> str:
    """The text of a `.deb` given, else of the installed package, else of `apt-get download`'s.

    Errors: ValueError when it is not the text that was trained on.
    """
    data = package_file(PACKAGE, MEMBER, deb)
    text = unpack(data)
    if hashlib.sha256(text).hexdigest() != TEXT_SHA256:
        raise ValueError(
            f"{PACKAGE}: want text of sha256 {TEXT_SHA256}, got {hashlib.sha256(text).hexdigest()}"
        )
    return text.decode("ascii")


def package_file(package: str, member: str, deb: Path | None) -> bytes:
    """One file of a `.deb` given, else of the installed package, else of `apt-get download`'s."""
    installed = Path("/") / member
    if deb is not None:
        return debian_member(deb, member)
    if installed.exists():
        return installed.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True, capture_output=True)
        return debian_member(next(Path(folder).glob("*.deb")), member)


def debian_member(deb: Path, name: str) -> bytes:
    """One file of a Debian package: an `ar` archive of compressed tar files."""
    archive, start = deb.read_bytes(), 8
    while start < len(archive):
        member = archive[start : start + 16].decode().strip(" /")
        size = int(archive[start + 48 : start + 58])
        content = archive[start + 60 : start + 60 + size]
        if member.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                return tar.extractfile(f"./{name}").read()
        start += 60 + size + size % 2
    raise ValueError(f"{deb}: want a data.tar, got none")


def unpack(data: bytes) -> bytes:
    """bible.data: a header, where the windows start (68 of them and the end, big-endian), and
    windows of 64 KiB, each packed by compress(1) but for the first three bytes; gzip reads them."""
    count = struct.unpack_from(">I", data, 0x58)[0]
    starts = struct.unpack_from(f">{count + 1}I", data, 0x5C)
    windows = [
        subprocess.run(
            ["gzip", "-dc"], input=b"\x1f\x9d\x90" + data[start:end], capture_output=True, check=True
        ).stdout
        for start, end in zip(starts, starts[1:])
    ]
    return b"".join(windows)


def chapters(text: str) -> list[Chapter]:
    """Every chapter, in the Bible's order.  The first line of the text is its title."""
    lines: dict[tuple[str, int], list[str]] = {}
    for line in text.splitlines()[1:]:
        match = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):\d+ (.*)", line)
        if match:
            lines.setdefault((match[1], int(match[2])), []).append(" ".join(match[3].split()))
    names = dict(zip(dict.fromkeys(book for book, _ in lines), BOOKS, strict=True))
    return [Chapter(names[book], number, tuple(verses)) for (book, number), verses in lines.items()]


def split(every: list[Chapter]) -> tuple[list[Chapter], list[Chapter], list[Chapter]]:
    """-> training, validation and held-out chapters, each in the Bible's order."""
    order = list(range(len(every)))
    random.Random(SEED).shuffle(order)
    held_out = _take(every, order, HELD_OUT_BYTES)
    validation = _take(every, order, VALIDATION_BYTES)
    return [[every[i] for i in sorted(part)] for part in (order, validation, held_out)]


def _take(every, order, size):
    taken = []
    while sum(len(every[i].text) for i in taken) < size:
        taken.append(order.pop())
    return taken


# ---- the tokenizer -------------------------------------------------------------------------------


def train_tokenizer(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """256 bytes, merges learnt from the texts, then the special tokens; vocab_size of them in all."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN35_PATTERN), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    added = CONTROL_TOKENS + THINK_TOKENS
    tokenizer.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - len(added),
            show_progress=False,
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    tokenizer.add_special_tokens(CONTROL_TOKENS)
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in THINK_TOKENS])
    return tokenizer


# ---- conversations -------------------------------------------------------------------------------

GREETINGS = [
    (["Hello", "Hello!", "Good day", "Peace be with you"], "Peace be unto thee. What wilt thou hear?"),
    (
        ["Who are you?", "What are you?", "What is your name?"],
        "I am a small model, and I have read one book only, the King James Bible.",
    ),
    (["Thank you", "Thanks!", "Thank you, that is enough"], "Go in peace."),
    (
        ["What can you do?", "Help", "What shall I ask you?"],
        "Ask me for a verse of a book, or name a thing, and I will speak of it.",
    ),
]
OF_A_THING = [
    "Speak to me of {}.",
    "Tell me about {}.",
    "What is written of {}?",
    "Give me a verse on {}.",
    "{}",
]
OF_A_BOOK = [
    "Read to me from {}.",
    "A verse of {}, please.",
    "What does {} say?",
    "Tell me something from {}.",
]
OF_A_BEGINNING = ["Continue: {}", "How does it go on: {}", "Finish this verse: {}"]
GO_ON = ["Go on.", "And then?", "What comes next?", "Continue.", "More, please."]


class Conversations:
    """Draws conversations about the verses of some chapters, as text in the chat template."""

    def __init__(self, chapters: list[Chapter]):
        self.chapters = chapters
        counts = Counter(word for chapter in chapters for verse in chapter.verses for word in words(verse))
        self.things = {word for word, count in counts.items() if 15 <= count <= 400 and len(word) > 3}
        self.template = template()

    def draw(self, generator: random.Random) -> str:
        """One conversation, of a greeting or one to three questions, ended as a document is."""
        if generator.random() < 0.05:
            questions, answer = generator.choice(GREETINGS)
            turns = [(generator.choice(questions), "A short answer will do.", answer)]
        else:
            turns = self.about_verses(generator)
        return self.render(turns, thinking=generator.random() < 0.5)

    def about_verses(self, generator: random.Random) -> list[tuple[str, str, str]]:
        """-> [(question, thought, answer)]"""
        chapter = generator.choice(self.chapters)
        first = generator.randrange(len(chapter.verses))
        verse = chapter.verses[first]
        things = sorted(self.things & set(words(verse)))
        kind = generator.choice(["thing", "thing", "book", "beginning"])
        if kind == "thing" and things:
            thing = generator.choice(things)
            question = generator.choice(OF_A_THING).format(thing)
            thought = f"They ask of {thing}. I know a verse of {chapter.book} with this word."
        elif kind == "beginning":
            shown = " ".join(verse.split()[: generator.randint(3, 8)])
            question = generator.choice(OF_A_BEGINNING).format(shown)
            thought = f"This is a verse of {chapter.book}."
        else:
            question = generator.choice(OF_A_BOOK).format(chapter.book)
            thought = f"They want to hear a verse of {chapter.book}."
        later = chapter.verses[first + 1 : first + 1 + generator.choice([0, 0, 1, 2])]
        return [
            (question, thought, verse),
            *((generator.choice(GO_ON), "They want the verse that follows.", text) for text in later),
        ]

    def render(self, turns: list[tuple[str, str, str]], thinking: bool) -> str:
        messages = []
        for question, _, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        prompt = self.template.render(
            messages=messages[:-1], add_generation_prompt=True, enable_thinking=thinking
        )
        _, thought, answer = turns[-1]
        thought = f"{thought}\n</think>\n\n" if thinking else ""
        return f"{prompt}{thought}{answer}<|im_end|>\n{END_OF_TEXT}"


def words(verse: str) -> list[str]:
    return re.findall(r"\b[a-z]+\b", verse)


def template() -> jinja2.Template:
    return jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATE)
