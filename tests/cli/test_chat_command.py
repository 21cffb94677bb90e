"""The chat command: in a pseudo-terminal, and over pipes."""

import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from chat_models import MODEL, user, with_template
from terminal import Terminal

import pyengine
from pyengine.cli import main
from pyengine.cli.chat import CONTROLS

pytest.importorskip("jinja2", reason="needs the extra text")
pytest.importorskip("tokenizers", reason="needs the extra text")


@pytest.fixture
def terminal(tmp_path):
    running = []

    def start(*arguments, **options):
        running.append(Terminal([str(a) for a in arguments], tmp_path, **options))
        return running[-1]

    yield start
    for one in running:
        one.process.kill()
        one.process.wait()
        os.close(one.fd)


def test_a_conversation_in_a_terminal(terminal, tmp_path):
    """Thinking on, off and on again; Ctrl-C; commands; and every answer is what `generate` gives anew."""
    path = with_template(tmp_path / "m.gguf")
    there = terminal(
        "chat",
        "-m",
        path,
        "-t",
        "1",
        "-n",
        "20",
        "--reasoning-budget",
        "5",
        "--verbose",
        "--temp",
        "0.7",
        "-sys",
        "be brief",
    )
    assert "/help" in there.expect(r"> $")
    first = there.say("the end")
    assert "[thinking]" in first and "(0 known)" in first
    assert "(thinking off)" in there.say("/nothink")
    there.say("and \\", until=r"  $")
    second = there.say("the beginning")
    assert "[thinking]" not in second and int(re.search(r"\((\d+) known\)", second)[1]) > 0
    assert "(thinking on)" in there.say("/think")
    assert "[thinking]" in there.say("more")
    assert "is not known" in there.say("/frob") and "/nothink" in there.say("/help")
    assert "7 messages" in there.say("/save talk.json")
    assert "want a file in a directory that exists" in there.say("/save /no/such/f")
    messages = json.loads((tmp_path / "talk.json").read_text())
    assert [m["role"] for m in messages] == ["system"] + ["user", "assistant"] * 3
    assert messages[3]["content"] == "and \nthe beginning"
    model = pyengine.load(path, threads=1)
    for i, reasoning in [(2, "auto"), (4, "off"), (6, "on")]:
        anew = model.generate(messages[:i], 20, reasoning=reasoning, reasoning_budget=5, temperature=0.7)
        assert (messages[i]["content"], messages[i].get("reasoning_content", "")) == (
            anew.text,
            anew.thinking,
        )
    assert "conversation cleared" in there.say("/clear")
    there.say("/save talk.json")
    assert json.loads((tmp_path / "talk.json").read_text()) == messages[:1]
    there.type("\x04")
    assert there.process.wait(20) == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal, tmp_path):
    path = with_template(tmp_path / "m.gguf")
    model = pyengine.load(path, threads=1)
    ends = [f"--logit-bias={i}-inf" for i in model.tokenizer.end_ids]
    there = terminal("chat", "-m", path, "-t", "1", "--reasoning", "off", *ends)
    there.expect(r"> $")
    there.interrupt(r"Ctrl-D or /exit ends\)\n> $")
    there.type("the end\n")
    there.expect("the end\r?\n.{20}")
    there.type("\x03")
    there.expect(r"\(stopped\)\n> $")
    there.say("/save talk.json")
    messages = json.loads((tmp_path / "talk.json").read_text())
    assert [m["role"] for m in messages] == ["user", "assistant"]
    whole = model.generate(
        messages[:1],
        len(messages[1]["content"].encode()) + 8,
        reasoning="off",
        ignore_end=True,
        logit_bias={i: -float("inf") for i in model.tokenizer.end_ids},
    )
    assert len(messages[1]["content"]) >= 10 and whole.text.startswith(
        messages[1]["content"].rstrip("\ufffd")
    )
    there.type("/exit\n")
    assert there.process.wait(20) == 0


def test_without_a_terminal(tmp_path, capsys, monkeypatch):
    path = with_template(tmp_path / "m.gguf")
    monkeypatch.setattr("sys.stdin", io.StringIO("the \\\nend\n/exit\nnever\n"))
    assert main(["chat", "-m", str(path), "-t", "1", "-n", "9", "--reasoning", "off"]) == 0
    want = pyengine.load(path, threads=1).generate([user("the \nend")], 9, reasoning="off")
    assert capsys.readouterr().out == want.text.translate(CONTROLS) + "\n"


def test_a_model_without_a_template(tmp_path, capsys):
    from rewrite import rewrite

    path = rewrite(MODEL, tmp_path / "m.gguf", metadata={"tokenizer.chat_template": None})
    assert main(["chat", "-m", str(path)]) == 2
    assert "want a chat template, got none" in capsys.readouterr().err


def test_what_a_model_writes_does_not_steer_the_terminal():
    assert (
        "a\x1b[31mb\x07\n\tc\x9bd👩\u200d👧".translate(CONTROLS) == "a\ufffd[31mb\ufffd\n\tc\ufffdd👩\u200d👧"
    )


# ---- messages of several lines ---------------------------------------------------------------

PASTE = 'def f(x):\n    """twice"""\n\n    return 2 * x'
BEGIN, END = "\x1b[200~", "\x1b[201~"  # what a terminal puts around a paste


def users(tmp_path, there):
    """The user's messages so far, by /save."""
    there.say("/save talk.json", until=r"written to .*\n[^\n]*> $")
    return [m["content"] for m in json.loads((tmp_path / "talk.json").read_text()) if m["role"] == "user"]


@pytest.mark.parametrize(
    "term, pasted",
    [
        ("xterm-256color", BEGIN + PASTE + END + "\n"),
        ("xterm-256color", BEGIN + PASTE.replace("\n", "\r") + "\r" + END + "\r"),  # as xterm sends it
        ("xterm", PASTE + "\n"),  # a terminal that marks no paste
        ("dumb", PASTE + "\n"),
        ("dumb", BEGIN + PASTE + END + "\n"),
    ],
    ids=["marked", "marked-as-xterm-sends-it", "not-marked", "dumb-terminal", "dumb-but-marked"],
)
def test_a_paste_of_several_lines_is_one_message(terminal, tmp_path, term, pasted):
    there = terminal("chat", "-m", with_template(tmp_path / "m.gguf"), "-t", "1", "-n", "3", term=term)
    there.expect(r"> $")
    there.type(pasted)
    there.expect(r"\n[^\n]*> $")
    assert users(tmp_path, there) == [PASTE]


def test_a_paste_in_a_terminal_without_readline(terminal, tmp_path):
    (tmp_path / "readline.py").write_text("raise ImportError")
    there = terminal("chat", "-m", with_template(tmp_path / "m.gguf"), "-t", "1", "-n", "3", path=tmp_path)
    there.expect(r"> $")
    there.type(PASTE + "\n")
    there.expect(r"\n> $")
    assert users(tmp_path, there) == [PASTE]


def test_commands_that_come_with_other_lines_stay_commands(terminal, tmp_path):
    there = terminal("chat", "-m", with_template(tmp_path / "m.gguf"), "-t", "1", "-n", "3")
    there.expect(r"> $")
    there.type("one\ntwo\n/save talk.json\n/exit\n")
    assert there.process.wait(60) == 0
    messages = json.loads((tmp_path / "talk.json").read_text())
    assert [m["content"] for m in messages if m["role"] == "user"] == ["one\ntwo"]


def test_quotes_begin_and_end_a_message(terminal, tmp_path):
    there = terminal("chat", "-m", with_template(tmp_path / "m.gguf"), "-t", "1", "-n", "3")
    there.expect(r"> $")
    there.say('"""one', until=r"  $")
    there.say("/exit", until=r"  $")
    there.say('three"""')
    there.say('"""/exit"""')
    assert users(tmp_path, there) == ["one\n/exit\nthree", "/exit"]


# ---- commands and texts that begin as they do --------------------------------------------------


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return with_template(tmp_path_factory.mktemp("chat") / "m.gguf")


def piped(model_path, monkeypatch, text, *arguments):
    """-> exit code of a chat over a pipe; thinking off, one thread, three tokens per answer."""
    data = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), "ascii"))
    common = ["chat", "-m", str(model_path), "-t", "1", "-n", "3", "--reasoning", "off"]
    return main([*common, *map(str, arguments)])


def asked(model_path, monkeypatch, tmp_path, text, *arguments):
    """-> the user's messages of a chat over a pipe."""
    saved = tmp_path / "talk.json"
    code = piped(model_path, monkeypatch, f"{text}\n/save {saved}\n", *arguments)
    return code, [m["content"] for m in json.loads(saved.read_text()) if m["role"] == "user"]


@pytest.mark.parametrize(
    "text",
    [
        "/etc/passwd contains what?",
        "//etc/fstab",
        "/* a comment */",
        "/",
        "/ alone",
        "/2 of it",
        "what is /etc",
    ],
)
def test_a_text_that_begins_with_a_slash_is_asked(model_path, monkeypatch, tmp_path, text):
    assert asked(model_path, monkeypatch, tmp_path, text) == (0, [text])


@pytest.mark.parametrize("line", ["/help", "   /help", "\t/help", "/help  ", "  /clear"])
def test_blanks_before_a_command(model_path, monkeypatch, tmp_path, capsys, line):
    assert asked(model_path, monkeypatch, tmp_path, line) == (0, [])
    out, err = capsys.readouterr()
    assert out == "" and ("/nothink" in err or "conversation cleared" in err)


@pytest.mark.parametrize("line", ["/frob", " /frob it", "/hlep"])
def test_a_word_that_is_no_command(model_path, monkeypatch, tmp_path, capsys, line):
    assert asked(model_path, monkeypatch, tmp_path, line) == (2, [])
    err = capsys.readouterr().err
    assert f"pyengine: line 1: {line.split()[0]} is not known; /help shows the commands\n" in err


# ---- over a pipe -----------------------------------------------------------------------------


def test_a_pipe_gives_a_message_per_line(model_path, monkeypatch, tmp_path):
    text = 'one\r\n\n  \ntwo \\\nlines\n"""\nthree\n\n/exit\n"""\n'
    assert asked(model_path, monkeypatch, tmp_path, text) == (0, ["one", "two \nlines", "three\n\n/exit"])


@pytest.mark.parametrize(
    "text, want", [('"""one\ntwo', "one\ntwo"), ("one\\\ntwo\\", "one\ntwo\n"), ("one", "one")]
)
def test_a_pipe_that_ends_inside_a_message(model_path, monkeypatch, capsys, text, want):
    assert piped(model_path, monkeypatch, text) == 0
    answer = pyengine.load(model_path, threads=1).generate([user(want.strip("\n"))], 3, reasoning="off").text
    assert capsys.readouterr().out == answer.translate(CONTROLS) + "\n"


def test_errors_of_a_pipe_go_to_stderr_and_into_the_exit_code(model_path, monkeypatch, capsys):
    """The turns after a failed one are answered all the same."""
    assert piped(model_path, monkeypatch, b"the\ncaf\xe9\nthe\n") == 2
    out, err = capsys.readouterr()
    assert err == "pyengine: line 2: message: want UTF-8, got byte 0xe9\n"
    assert piped(model_path, monkeypatch, "the\nthe\n") == 0
    assert capsys.readouterr() == (out, "")


def test_save_that_fails_is_an_error_of_a_pipe(model_path, monkeypatch, capsys):
    assert piped(model_path, monkeypatch, "/save /no/such/f\n") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("pyengine: line 1: /no/such/f: want a file") and err.count("\n") == 1


def test_a_closed_standard_input(model_path):
    command = f"{sys.executable} -m pyengine chat -m {model_path} <&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("pyengine: standard input: ")
    assert done.stderr.count("\n") == 1


# ---- the context is full -----------------------------------------------------------------------

SYSTEM = ["-sys", "be brief"]


def ends(model_path):
    """Options for an answer that does not end by itself."""
    return [f"--logit-bias={i}-inf" for i in pyengine.load(model_path, threads=1).tokenizer.end_ids]


def test_a_full_context_says_what_to_do(model_path, monkeypatch, capsys):
    arguments = ["-c", "80", "-n", "-1", *ends(model_path), *SYSTEM]
    assert piped(model_path, monkeypatch, "the\nand\n/clear\nthe\n", *arguments) == 2
    out, err = capsys.readouterr()
    cut, full, cleared, again = err.splitlines()
    assert cut == again == "(the answer was cut: the context is full)"
    assert full.startswith("pyengine: line 2: the context is full: the prompt has ")
    assert full.endswith(" tokens, and the context has 80: /clear, or start with --drop-oldest")
    assert cleared == "(conversation cleared)"


def test_a_full_context_in_a_terminal(terminal, tmp_path, model_path):
    there = terminal("chat", "-m", model_path, "-t", "1", "-c", "60", "--reasoning", "off", *ends(model_path))
    there.expect(r"> $")
    assert "\n(the answer was cut: the context is full)\n" in there.say("the")
    assert "(the context is full: " in (said := there.say("and")) and "/clear" in said
    assert "conversation cleared" in there.say("/clear")
    assert "context is full)" in there.say("the")
    there.type("/exit\n")
    assert there.process.wait(20) == 0


@pytest.mark.parametrize("system", [[], SYSTEM])
def test_the_oldest_turns_are_dropped(model_path, monkeypatch, tmp_path, capsys, system):
    """Whole turns, and never the system prompt; each answer is the model's own for what is left."""
    messages = [f"question {i} of the king" for i in range(12)]
    code, questions = asked(
        model_path,
        monkeypatch,
        tmp_path,
        "\n".join(messages),
        "-c",
        "240",
        "-n",
        "9",
        "--drop-oldest",
        *system,
    )
    out, err = capsys.readouterr()
    assert code == 0 and questions == messages  # /save has all of them
    assert 2 <= err.count("(the context is full: the oldest ") < len(messages) - 1
    talk = json.loads((tmp_path / "talk.json").read_text())
    model = pyengine.load(model_path, threads=1)
    first, dropped = len(system) // 2, 0
    for i in range(first, len(talk), 2):
        answers = {
            k: model.generate(talk[:first] + talk[first + k : i + 1], 9, reasoning="off", context=240).text
            for k in range(0, i - first + 1, 2)
            if model_tokens(model, talk[:first] + talk[first + k : i + 1]) <= 231
        }
        kept = [k for k, answer in answers.items() if answer == talk[i + 1]["content"] and k >= dropped]
        assert kept, f"turn {i} is not the model's answer to any run of the last turns"
        dropped = kept[0]
    assert dropped > 0


def model_tokens(model, messages):
    return len(model.chat_template.prompt(model.tokenizer, messages, None, "off", None).ids)


def test_a_message_that_is_too_long_alone(model_path, monkeypatch, capsys):
    """It fails, and the turns before it stay."""
    text = "the end\n" + "the king of the " * 40 + "\nthe end\n"
    for more in ([], ["--drop-oldest"]):
        assert piped(model_path, monkeypatch, text, "-c", "100", *more) == 2
        err = capsys.readouterr().err
        assert (
            err.startswith("pyengine: line 2: ") and "and the context has 100" in err and err.count("\n") == 1
        )
        assert ("the message is too long" in err) == bool(more)


# ---- seeds -----------------------------------------------------------------------------------


def test_a_fresh_seed_is_said_and_gives_the_same_again(model_path, monkeypatch, capsys):
    arguments = ["--temp", "5", "-n", "9"]
    assert piped(model_path, monkeypatch, "the\nand\n", *arguments, "-s", "-1") == 0
    out, err = capsys.readouterr()
    seed = re.fullmatch(r"seed (\d+)\n", err)[1]
    assert piped(model_path, monkeypatch, "the\nand\n", *arguments, "--seed", seed) == 0
    assert capsys.readouterr() == (out, "")
    assert piped(model_path, monkeypatch, "the\nand\n", *arguments, "--seed", "-1") == 0
    assert capsys.readouterr() != (out, err)


def test_ctrl_c_ends_a_chat_over_a_pipe(model_path):
    command = [sys.executable, "-m", "pyengine", "chat", "-m", str(model_path), "-n", "-1", *ends(model_path)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as chat:
        chat.stdin.write(b"the\nthe\nthe\n")
        chat.stdin.close()
        assert chat.stdout.read(9)
        chat.send_signal(signal.SIGINT)
        assert chat.wait(20) == 130 and chat.stderr.read() == b""
