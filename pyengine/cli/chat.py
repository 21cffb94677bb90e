"""A conversation in the terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ..errors import InputError, PyengineError
from .options import (
    add_arithmetic,
    add_generation,
    add_model,
    add_reasoning,
    check_output,
    load_model,
    new_command,
    print_figures,
    sampling_options,
    show_prompt_progress,
)

HELP = """\
/think, /nothink   think before answering, or do not
/clear             begin anew
/save FILE         write the conversation, as JSON messages
/help              this
/exit, Ctrl-D      end;  Ctrl-C: end the answer
A line that ends with \\ goes on in the next."""

DIM, PLAIN = "\x1b[2m", "\x1b[0m"

# What a model writes must not steer the terminal.
CONTROLS = {i: "\ufffd" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}


def add_commands(commands):
    parser = new_command(commands, "chat", _chat, "Talk to a model: its own chat template, the answer "
                         "as it comes; of a turn only what is new is computed. /help says what else.")
    add_model(parser)
    parser.add_argument("-sys", "--system-prompt", metavar="TEXT", help="what the model is told first")
    add_reasoning(parser)
    add_arithmetic(parser)
    parser.add_argument("--verbose", action="store_true", help="counts and tokens/s of each answer")
    add_generation(parser, predict=None)


def _chat(options):
    model = load_model(options)
    options.keywords = sampling_options(options)
    model.tokenizer, model.chat_template, model.new_sampler(**options.keywords)  # faults come first
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  (line editing and history for input())

        print(f"{Path(options.model).resolve().stem}: /help says what can be done, Ctrl-D ends.")
    conversation = Conversation(model, options)
    while True:
        try:
            text = _read("> " if terminal else "")
            if not conversation.take(text):
                return
        except EOFError:
            if terminal:
                print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit ends)", flush=True)


def _read(prompt) -> str:
    lines = [input(prompt)]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("  " if prompt else ""))
    return "\n".join(lines)


class Conversation:
    """Messages so far, and the session that has computed them."""

    def __init__(self, model, options):
        self.model, self.options = model, options
        self.session = model.new_session()
        self.reasoning = options.reasoning
        self.clear()

    def clear(self):
        system = self.options.system_prompt
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def take(self, text: str) -> bool:
        """Do what a line asks for -> whether to go on."""
        command, _, argument = text.strip().partition(" ")
        if not command:
            return True
        if not text.startswith("/"):
            self.ask(text)
        elif command in ("/exit", "/quit"):
            return False
        else:
            self.obey(command, argument.strip())
        return True

    def obey(self, command, argument):
        if command == "/clear":
            self.clear()
            print("(begun anew)")
        elif command in ("/think", "/nothink"):
            self.reasoning = "on" if command == "/think" else "off"
            switch = self.model.chat_template.thinking_can_be_switched()
            print(f"(thinking {self.reasoning})" if switch
                  else "(this model's template has no switch for it)")
        elif command == "/save":
            self.save(argument)
        else:
            print(HELP if command == "/help" else f"({command} is not known; /help says what is)")

    def save(self, name):
        """Whole or not at all."""
        try:
            if not name:
                raise InputError("/save: want the name of a file")
            path = check_output(Path(name).expanduser())
            partial = path.with_name(path.name + ".partial")
            text = json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n"
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
            print(f"({len(self.messages)} messages written to {path})")
        except (OSError, InputError) as error:
            print(f"({error})")

    def ask(self, text):
        """Answer, as it comes; what an interrupt leaves is kept as the answer."""
        self.messages.append({"role": "user", "content": text})
        generation = None
        try:
            generation = self.model.generate(
                self.messages, self.options.predict, stream=True, session=self.session,
                stop=self.options.reverse_prompt, context=self.options.ctx_size,
                reasoning=self.reasoning, reasoning_budget=self.options.reasoning_budget,
                **self.options.keywords)
            show_prompt_progress(generation)
            _show(generation)
        except KeyboardInterrupt:
            print("\n(stopped)", flush=True)
        except PyengineError as error:
            print(f"({error})", flush=True)
        if generation is None or not generation.tokens:
            self.messages.pop()  # there is no answer to it
            return
        answer = {"role": "assistant", "content": generation.text}
        if generation.thinking:
            answer["reasoning_content"] = generation.thinking
        self.messages.append(answer)
        if self.options.verbose:
            print_figures(generation)


def _show(generation):
    """Thinking in brackets, and dim where there is a terminal; then the answer."""
    dim, plain = (DIM, PLAIN) if sys.stdout.isatty() else ("", "")
    thinking = False
    try:
        for token in generation:
            if token.thinking and not thinking:
                print(f"{dim}[thinking]\n", end="")
                thinking = True
            print(token.thinking.translate(CONTROLS), end="")
            if token.text and thinking:
                print(f"\n[answer]{plain}\n", end="")
                thinking = False
            print(token.text.translate(CONTROLS), end="", flush=True)
    finally:
        print(plain if thinking else "", flush=True)
