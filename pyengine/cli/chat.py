"""chat: a conversation in the terminal, or over a pipe."""

from __future__ import annotations

import bisect
import json
import re
import sys
from pathlib import Path

from ..errors import InputError, PyengineError
from ..files.whole import write_text
from ..text.model import ContextError
from .chat_input import Message, open_input
from .generation import (
    add_generation,
    add_reasoning,
    print_figures,
    print_seed,
    sampling_options,
    show_prompt_progress,
)
from .options import add_arithmetic, add_model, check_output, load_model, new_command

HELP = """\
/think, /nothink   think before the answer, or do not
/clear             forget the conversation
/save FILE         write the conversation, as JSON messages
/help              show this help
/exit, Ctrl-D      end;  Ctrl-C: end the answer
A paste of several lines is one message. A line that ends with \\ goes on in the next line.
\"\"\" begins a message of several lines, and ends it.
A text that begins with / is sent as it is, unless its first word is / and letters, as /etc is:
\"\"\"/etc\"\"\" sends that too."""

COMMAND = re.compile(r"/[a-z]+", re.IGNORECASE)

DIM, PLAIN = "\x1b[2m", "\x1b[0m"

# The terminal must not obey the model.
CONTROLS = {i: "\ufffd" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}


def add_commands(commands):
    parser = new_command(
        commands,
        "chat",
        _chat,
        "Talk to a model. Its own chat template makes the prompts, and earlier turns are cached. /help "
        "shows the commands. Where standard input is not a terminal, each line is a message, and so is "
        'each block that begins and ends with """; the answers go to standard output, all else goes to '
        "standard error, and the exit code is 2 if a turn failed.",
    )
    add_model(parser)
    parser.add_argument(
        "-sys", "--system-prompt", metavar="TEXT", help="instructions for the model (default: none)"
    )
    add_reasoning(parser)
    add_arithmetic(parser)
    parser.add_argument("--verbose", action="store_true", help="counts and tokens/s of each answer")
    parser.add_argument(
        "--drop-oldest",
        action="store_true",
        help="when the context is full, forget the oldest turns until half of the context is free; the "
        "system prompt stays (default: the turn fails, with a message)",
    )
    add_generation(parser, predict=None)


def _chat(options):
    messages = open_input()
    model = load_model(options)
    options.keywords = sampling_options(options)
    sampler = model.new_sampler(**options.keywords)
    model.tokenizer, model.chat_template  # noqa: B018  (errors come before the first message)
    options.keywords["seed"] = sampler.seed  # of all turns
    if options.seed == -1:
        print_seed(sampler)
    if messages.terminal:
        name = Path(options.model).resolve().stem
        print(f"{name}: /help shows the commands, Ctrl-D ends.", flush=True)
    conversation = Conversation(model, options, messages)
    while _turn(conversation, messages):
        pass
    return 2 if conversation.failed and not messages.terminal else 0


def _turn(conversation, messages) -> bool:
    """One message -> whether to go on."""
    try:
        return conversation.take(messages.read())
    except EOFError:
        if messages.terminal:
            print()
        return False
    except PyengineError as error:
        conversation.fail(error)
    except KeyboardInterrupt:
        if not messages.terminal:
            raise
        print("\n(Ctrl-D or /exit ends)", flush=True)
    return True


class Conversation:
    """Messages so far, and the session that has computed them.

    messages    all of them, the system prompt first where there is one
    first       index of the first message behind the system prompt
    forgotten   number of messages from there on that the model no longer gets
    failed      whether a turn has failed
    """

    def __init__(self, model, options, input):
        self.model, self.options, self.input = model, options, input
        self.session = model.new_session()
        self.reasoning = options.reasoning
        self.failed = False
        self.clear()

    def clear(self):
        system = self.options.system_prompt
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.first, self.forgotten = len(self.messages), 0

    def take(self, message: Message) -> bool:
        """Obey or ask -> whether to go on."""
        text = message.text.strip()
        command, _, argument = text.partition(" ")
        if not text:
            return True
        if not (message.may_be_command and COMMAND.fullmatch(command)):
            self.ask(message.text)
        elif command in ("/exit", "/quit", "/bye"):
            return False
        else:
            self.obey(command, argument.strip())
        return True

    # ---- notes and errors ----

    def note(self, text):
        """Print a note.  Over a pipe, standard output gets the answers alone."""
        print(text, file=sys.stdout if self.input.terminal else sys.stderr, flush=True)

    def fail(self, error):
        self.failed = True
        self.note(f"({error})" if self.input.terminal else f"pyengine: line {self.input.line}: {error}")

    # ---- commands ----

    def obey(self, command, argument):
        if command == "/clear":
            self.clear()
            self.note("(conversation cleared)")
        elif command in ("/think", "/nothink"):
            self.reasoning = "on" if command == "/think" else "off"
            switch = self.model.chat_template.thinking_can_be_switched()
            self.note(
                f"(thinking {self.reasoning})" if switch else "(this model's template has no switch for it)"
            )
        elif command == "/save":
            self.save(argument)
        elif command == "/help":
            self.note(HELP)
        else:
            self.fail(InputError(f"{command} is not known; /help shows the commands"))

    def save(self, name):
        """Whole or not at all."""
        try:
            if not name:
                raise InputError("/save: want the name of a file")
            path = check_output(Path(name).expanduser())
            write_text(path, json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n")
            self.note(f"({len(self.messages)} messages written to {path})")
        except (OSError, RuntimeError, InputError) as error:  # RuntimeError: ~ of an unknown user
            self.fail(error)

    # ---- turns ----

    def ask(self, text):
        """Print the answer as it comes.  After an interrupt, the part so far is kept as the answer."""
        question = {"role": "user", "content": text}
        generation = None
        try:
            if self.options.drop_oldest:
                self._make_room(question)
            generation = self._generate(question)
            show_prompt_progress(generation)
            _show(generation)
        except KeyboardInterrupt:
            if not self.input.terminal:
                raise
            print("\n(stopped)", flush=True)
        except ContextError as error:
            self.fail(self._full(error))
        except PyengineError as error:
            self.fail(error)
        if generation is None or not generation.tokens:
            return  # the question has no answer: it is not kept
        answer = {"role": "assistant", "content": generation.text}
        if generation.thinking:
            answer["reasoning_content"] = generation.thinking
        self.messages += [question, answer]
        if generation.finish_reason == "length" and self._has_filled(generation):
            self.note("(the answer was cut: the context is full)")
        if self.options.verbose:
            print_figures(generation)

    def _generate(self, question):
        return self.model.generate(
            self._prompt(question),
            self.options.predict,
            stream=True,
            session=self.session,
            stop=self.options.reverse_prompt,
            context=self.options.ctx_size,
            reasoning=self.reasoning,
            reasoning_budget=self.options.reasoning_budget,
            **self.options.keywords,
        )

    # ---- the context ----

    @property
    def context(self) -> int:
        return self.options.ctx_size or self.model.context

    def _has_filled(self, generation) -> bool:
        return generation.prompt_tokens + generation.completion_tokens >= self.context

    def _prompt(self, question, forgotten=None) -> list[dict]:
        """Messages for the model, without those that are forgotten."""
        forgotten = self.forgotten if forgotten is None else forgotten
        return [*self.messages[: self.first], *self.messages[self.first + forgotten :], question]

    def _tokens(self, question, forgotten=None) -> int:
        prompt = self._prompt(question, forgotten)
        return len(
            self.model.chat_template.prompt(self.model.tokenizer, prompt, None, self.reasoning, None).ids
        )

    def _full(self, error: ContextError) -> InputError:
        """The same error, and a way out of it."""
        sizes = f"the prompt has {error.tokens} tokens, and the context has {error.context}"
        if self.options.drop_oldest or len(self.messages) == self.first:
            return InputError(f"the message is too long: {sizes}")
        return InputError(f"the context is full: {sizes}: /clear, or start with --drop-oldest")

    def _make_room(self, question):
        """Forget the oldest turns when less than a quarter of the context is left for the answer.

        A question and its answer go together.  Half of the context is left free, so that the next turns
        can use what is computed already: without the oldest turn, all others are computed anew.
        """
        quarter = self.context // 4
        wanted = quarter if self.options.predict is None else min(self.options.predict, quarter)
        if self._tokens(question) + wanted <= self.context:
            return
        turns = range(self.forgotten, len(self.messages) - self.first + 1, 2)
        if self._tokens(question, turns[-1]) >= self.context:
            return  # the question alone is too long
        place = bisect.bisect_left(turns, True, key=lambda n: self._tokens(question, n) <= self.context // 2)
        forgotten = turns[min(place, len(turns) - 1)]
        if forgotten > self.forgotten:
            count = (forgotten - self.forgotten) // 2
            self.note(f"(the context is full: the oldest {count} turn{'s' * (count > 1)} dropped)")
        self.forgotten = forgotten


def _show(generation):
    """Print the thinking, dim on a terminal, and then the answer."""
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
