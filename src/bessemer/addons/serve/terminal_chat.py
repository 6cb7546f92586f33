"""`bessemer chat`: a conversation with a model in the terminal.

The model directory's own template makes the prompt, so the model sees the format it was trained on: R1's prompt opens
the thinking itself, R1-Zero's leaves that to the model. Ctrl-C ends the answer, never the session. Answers go to
`output`, everything else to `notes`, so that the output of a piped session holds only the answers.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from rich.cells import cell_len

from bessemer.addons.serve.chat_style import template_style
from bessemer.addons.serve.reasoning_parser import StreamDecoder, think_ids
from bessemer.config.units import show_tokens
from bessemer.data.chat import CALL, CALL_END, CALLS, CALLS_END, SEPARATOR, Message, render_ids
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine, load_engine
from bessemer.engine.generation import NEW_TOKENS, Options
from bessemer.errors import UserError
from bessemer.escape import escaped

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
SIGNS = {CALLS: "", CALL: "[calls ", SEPARATOR: " ", CALL_END: "]\n", CALLS_END: ""}
"""What the screen shows for the marks of a call, if they are tokens."""
COMMANDS = {
    "/continue": "continue an answer that was cut off or stopped",
    "/think": "show the last thought",
    "/system TEXT": "set the system message; - for none, no TEXT to show it",
    "/save FILE": "write a line of JSON, as SFT reads it, for the conversation or for each question asked alone",
    "/alone": "answer each question alone, or within the conversation again",
    "/reset": "forget the conversation but keep the system message",
    "/help": "show this; Ctrl-C ends an answer",
    "/exit": "leave, like Ctrl-D",
}
HELP = "\n".join(f"{command:<13} {what}" for command, what in COMMANDS.items())


def chat(
    model_dir: str | Path,
    *,
    temperature: float = 0.6,
    top_p: float = 0.95,
    max_new_tokens: int | None = None,
    seed: int = 0,
    drafts: int = 0,
    system: str = "",
    alone: bool = False,
    input: Callable[[str], str] | None = None,
    output: TextIO | None = None,
    notes: TextIO | None = None,
) -> None:
    """Runs a session until /exit or the end of the input. `max_new_tokens` per answer: None for what the context
    leaves, at most NEW_TOKENS. `drafts` as in `Engine.generate`; with `alone`, the model sees no earlier turn. `input`
    takes the prompt to show and returns a message; without it, lines can be edited in a terminal, and a pipe is read
    line by line."""
    engine = load_engine(model_dir, drafts)
    options: Options = {"temperature": temperature, "top_p": top_p, "drafts": drafts}
    talk = Conversation(engine, output or sys.stdout, options, max_new_tokens, seed, notes or sys.stderr)
    talk.system, talk.alone = system, alone
    context, sizes = engine.model.cfg.max_seq_len, {True: 0, False: 0}
    for name, weight in engine.model.named_parameters():
        sizes[name.startswith("mtp.")] += weight.numel()
    drafting = f" and {show_tokens(sizes[True])} of MTP" if sizes[True] else ""
    talk.note(f"{model_dir}: {show_tokens(sizes[False])} parameters{drafting}, a context of {context} tokens, "
              f"{talk.style or 'its own'} template, temperature {temperature:g}, top-p {top_p:g}")  # fmt: skip
    if max_new_tokens is not None and max_new_tokens >= context:
        talk.note(f"--max-tokens {max_new_tokens} exceeds the context, which ends answers first")
    if alone:
        talk.note("each question is asked alone; /alone keeps the conversation")
    talk.note("/help lists the commands; Ctrl-C ends an answer, Ctrl-D leaves")
    read = input or _reader()
    while True:
        try:
            line = read("\n> ").strip()
            if line == "/exit":
                break
            if line:
                talk.obey(line) if line.startswith("/") else talk.answer(line)
        except EOFError:
            break
        except KeyboardInterrupt:
            talk.note("/exit or Ctrl-D leaves")
        except UnicodeDecodeError:
            talk.note("that was not UTF-8; please type it again")


def _reader() -> Callable[[str], str]:
    """A line editor with a history on a terminal; the lines of a pipe, without a prompt."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter

        words = [command.split()[0] for command in COMMANDS]
        session = PromptSession[str](completer=WordCompleter(words, sentence=True), complete_while_typing=False)

        def edited(prompt: str) -> str:
            # The editor takes Ctrl-C itself. During its setup, Ctrl-C would break its event loop, and there is nothing
            # yet that it could end.
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                return session.prompt(prompt)
            finally:
                signal.signal(signal.SIGINT, handler)

        return edited

    def line(prompt: str) -> str:
        read = sys.stdin.buffer.readline()
        if not read:
            raise EOFError
        return read.decode()

    return line


class Conversation:
    """The turns so far, and the output they are written to."""

    def __init__(
        self, engine: Engine, output: TextIO, options: Options | None = None,
        max_new_tokens: int | None = None, seed: int = 0, notes: TextIO | None = None,
    ):  # fmt: skip
        self.engine = engine
        self.style = template_style(engine.tokenizer)
        self.output, self.notes = output, notes or output
        self.dim = output.isatty()
        self.options: Options = options or {}
        """Sampling options for `Engine.generate`."""
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.system = ""
        self.alone = False
        """Whether a question begins a new conversation."""
        self.messages: list[Message] = []
        """Questions and answers in turn."""
        self.lines: list[list[Message]] = []
        """What /save writes: all conversations since /reset, with their system messages; the last is `messages`."""
        self.thought = ""
        """The last thought, in the form that /think shows."""
        self.unfinished: tuple[list[int], Screen] | None = None
        """The prompt and the answer that /continue continues."""

    def obey(self, line: str) -> None:
        """Runs one command."""
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command == "/continue" and self.unfinished:
            self._generate(*self.unfinished)
        elif command == "/continue":
            self.note("there is no answer to continue")
        elif command == "/think":
            self.note(self.thought or "no thought yet")
        elif command == "/system":
            self.system = "" if argument == "-" else argument or self.system
            self.note(f"system message: {self.system or 'none'}")
        elif command == "/alone":
            self.alone = not self.alone
            self.note("each question alone" if self.alone else "the conversation from here on")
        elif command == "/save":
            self._save(argument)
        elif command == "/reset":
            self.messages, self.lines, self.unfinished = [], [], None
            self.note("forgotten")
        else:
            self.note(HELP if command == "/help" else f"there is no command {command}; /help lists them")

    def answer(self, line: str) -> None:
        """Runs one turn; a turn that fails leaves the conversation unchanged."""
        # A terminal passes bytes that are not UTF-8 as lone surrogates, which no tokenizer accepts.
        line = line.encode("utf-8", "replace").decode()
        earlier, lines = self.messages, self.lines
        self.messages = [*([] if self.alone else earlier), {"role": "user", "content": line}]
        self.lines = [*(lines if self.alone else lines[:-1]), []]
        try:
            prompt = self._prompt()
            self._generate(prompt, Screen(self.engine.tokenizer, self.show, self.dim, prompt))
        except BaseException as error:
            self.messages, self.lines = earlier, lines
            if not isinstance(error, UserError):
                raise
            self.note(f"error: {error}")

    def _generate(self, prompt: list[int], screen: Screen) -> None:
        """Generates an answer, or more of one, and adds it to the conversation."""
        begun = [*prompt, *screen.ids]
        room = self._context - len(begun)
        self.engine.check_prompt(begun)
        self.seed += 1  # a repeated question gets a different answer
        options = self.options | Options(max_new_tokens=min(room, self.max_new_tokens or NEW_TOKENS), seed=self.seed)
        why = ""
        screen.resume()
        try:
            [[answer]] = self.engine.generate([begun], on_tokens=screen.add, **options)
            if answer.finish_reason == "length":
                why = f"cut off at {len(screen.ids)} tokens"
        except KeyboardInterrupt:
            why = "stopped"
        screen.pause(bool(why))
        self.thought = screen.styled_thought()
        answered = [turn for turn in self.messages if turn is not screen.message]
        screen.message = {"role": "assistant", "content": screen.content(self.style)}
        self.messages = [*answered, screen.message]
        self.lines[-1] = [*self._system, *self.messages]
        self.unfinished = (prompt, screen) if why and len(prompt) + len(screen.ids) < self._context else None
        if why:
            full = f"the context of {self._context} tokens is full; /reset starts over"
            self.note(f"[{why}; {'/continue resumes it' if self.unfinished else full}]")

    @property
    def _system(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    @property
    def _context(self) -> int:
        return self.engine.model.cfg.max_seq_len

    def _prompt(self) -> list[int]:
        """The conversation as ids; drops the oldest turns if it leaves too little room for an answer."""
        room = min(self.max_new_tokens or NEW_TOKENS, self._context // 2)
        dropped = 0
        while True:
            ids = render_ids(self.engine.tokenizer, [*self._system, *self.messages], self.style)
            if len(ids) + room <= self._context or len(self.messages) < 3:
                break
            self.messages, dropped = self.messages[2:], dropped + 1
        if dropped:
            turns = f"{dropped} oldest question{'s' * (dropped > 1)}"
            self.note(f"[the context of {self._context} tokens is full: forgot the {turns} and the answers]")
        return ids

    def _save(self, name: str) -> None:
        if not name or not self.lines:
            self.note("name a file: /save chat.jsonl" if self.lines else "there is nothing to save yet")
            return
        try:
            with open(Path(name).expanduser(), "x", encoding="utf-8") as file:
                for messages in self.lines:
                    file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        except FileExistsError:
            self.note(f"{name} exists already; name another file")
        except (OSError, ValueError) as error:
            self.note(f"cannot write {name}: {getattr(error, 'strerror', None) or error}")
        else:
            self.note(f"saved in {name}")

    def show(self, text: str) -> None:
        """Writes and flushes; characters that the output cannot encode are replaced."""
        _write(self.output, text)

    def note(self, text: str) -> None:
        """Writes a line about the conversation."""
        _write(self.notes, text.removesuffix("\n") + "\n")


def _write(file: TextIO, text: str) -> None:
    encoding = getattr(file, "encoding", None) or "utf-8"
    file.write(text.encode(encoding, "replace").decode(encoding))
    file.flush()


class Screen:
    """One answer as it streams in: whole characters only, control characters escaped, thoughts dim and then folded."""

    def __init__(self, tokenizer: Tokenizer, show: Callable[[str], None], dim: bool, prompt: list[int]):
        self.tokenizer = tokenizer
        self.show = show
        self.dim = dim
        """Whether this is a terminal: thoughts are then dim, and folded when they end."""
        self.decoder = StreamDecoder(tokenizer)
        self.ids: list[int] = []
        self.text = ""
        self.message: Message = {}
        """The message of this answer in the conversation, once it is there."""
        self.think, self.think_end = think_ids(tokenizer)
        self.signs = {token: SIGNS[mark] for mark, token in tokenizer.tool_marks.items() if mark in SIGNS}
        marks = [i for i in prompt if i in (self.think, self.think_end)]
        self.thought = ""
        self.thinking = self.foldable = self.folded = False
        self.tokens, self.since = 0, time.monotonic()
        if marks and marks[-1] == self.think:
            self._begin()
        else:
            self._style(False)

    def resume(self) -> None:
        if self.ids:
            self._style(self.thinking)

    def add(self, tokens: list[tuple[int, int, int]]) -> None:
        for _, _, token in tokens:
            self.ids.append(token)
            if token == self.think:
                self._begin()
            self.tokens += self.thinking
            self._put(self.decoder.push(token), self.signs.get(token))
            if token == self.think_end and self.thinking:
                self._put(self.decoder.flush())
                self.thinking = False
                self._fold()

    def pause(self, unfinished: bool) -> None:
        """Ends the answer, or what there is of it so far."""
        if not unfinished:
            self._put(self.decoder.flush())
        self._style(False)
        self.show("\n")
        self.foldable = False  # what has scrolled past a note stays

    def styled_thought(self) -> str:
        """The thought of this answer, to show again; empty if there was none."""
        if not self.thought:
            return ""
        return f"{DIM}{self.thought}{PLAIN}\n" if self.dim else self.thought + "\n"

    def content(self, style: str | None) -> str:
        """The answer as a message. The template adds the space before a plain answer and drops R1's thinking, so
        nothing remains of a thought that never ended."""
        if style == "r1":
            return "" if self.thinking else self.text
        return self.text.removeprefix(" ")

    def _begin(self) -> None:
        self.thinking, self.tokens, self.since, self.thought = True, 0, time.monotonic(), ""
        self.foldable = not self.text.strip()  # nothing precedes it on the screen
        self._style(True)

    def _put(self, text: str, sign: str | None = None) -> None:
        self.text += text
        shown = escaped(text) if sign is None else sign
        if self.thinking:
            self.thought += shown
        elif self.folded:
            shown = shown.lstrip("\n")  # R1 writes a blank line after its thought
            self.folded = not shown
        self.show(shown)

    def _fold(self) -> None:
        """Replaces the thought with one line that gives its length; a thought that has scrolled away stays."""
        self._style(False)
        size = shutil.get_terminal_size()
        rows = sum(max(1, -(-cell_len(line.expandtabs()) // size.columns)) for line in self.thought.split("\n"))
        if not self.dim or not self.foldable or rows >= size.lines:
            return
        up = f"\x1b[{rows - 1}A" if rows > 1 else ""
        summary = f"thought for {self.tokens} tokens, {time.monotonic() - self.since:.1f} s (/think shows it)"
        self.show(f"{up}\r\x1b[J{DIM}{summary}{PLAIN}\n")
        self.folded = True

    def _style(self, thinking: bool) -> None:
        if self.dim:
            self.show(DIM if thinking else PLAIN)
