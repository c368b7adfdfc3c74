"""``evermini chat``: a conversation on the terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evermini.cli.options import MODEL_SETTINGS, with_settings
from evermini.config import LoadedSettings
from evermini.errors import EverminiError

if TYPE_CHECKING:
    from evermini.cli.talk import Talker

HELP = """\
/reset         forget the conversation
/system TEXT   set the system message (empty: none) and forget the conversation
/save FILE     append the conversation to FILE as one line of JSON: {"messages": [...]}
/exit          leave (Ctrl-D too)
Ctrl-C stops an answer; Alt-Enter starts a new line."""


@with_settings(*MODEL_SETTINGS, "api_key")
def chat(
    loaded: LoadedSettings,
    url: Annotated[
        str | None,
        typer.Option(
            help="Talk to a running server, e.g. http://127.0.0.1:8000/v1.",
            show_default="a model in this process",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System message.", metavar="TEXT", show_default=False)
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="0: always the likeliest words. Up to 2.")
    ] = 0.7,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens per answer at most.", show_default="what fits")
    ] = None,
) -> None:
    """Talk to a model.

    Input that is not a terminal is read line by line, one message each.
    """
    settings = loaded.settings
    with contextlib.closing(_open_talker(loaded, url)) as talker:
        conversation = Conversation(
            talker, system, {"temperature": temperature, "max_completion_tokens": max_tokens}
        )
        if sys.stdin.isatty():
            print(f"{talker.name}. /help lists the commands.")
            conversation.run(_terminal_lines(settings.home))
        else:
            conversation.run(line.rstrip("\n") for line in sys.stdin)


def _open_talker(loaded: LoadedSettings, url: str | None) -> Talker:
    from evermini.cli.talk import InProcess, Remote

    settings = loaded.settings
    if url is None:
        return InProcess(settings)
    key = settings.api_keys[0] if settings.api_keys else None
    return Remote(url, key, None if loaded.sources["model"] == "default" else settings.models[0])


class Conversation:
    """The messages so far, and the commands that change them.

    Args:
        talker: Who answers.
        system: System message.
        params: Request parameters of every answer.
    """

    def __init__(self, talker: Talker, system: str | None, params: dict[str, Any]) -> None:
        self.messages: list[dict[str, str]] = []
        self._talker = talker
        self._params = {name: value for name, value in params.items() if value is not None}
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: print(HELP),
            "/reset": self._reset,
            "/system": self._set_system,
            "/save": self._save,
        }
        self._system = system
        self._reset("")

    def run(self, lines: Iterator[str]) -> None:
        """Handle lines until they end or say ``/exit``."""
        for line in lines:
            command, _, argument = line.strip().partition(" ")
            if command in ("/exit", "/quit"):
                return
            try:
                if command in self._commands:
                    self._commands[command](argument.strip())
                elif command.startswith("/") and command[1:].isalpha():
                    print(f"No command {command}. /help lists them.", file=sys.stderr)
                elif line.strip():
                    self._say(line)
            except (EverminiError, OSError) as error:
                print(f"Error: {error}", file=sys.stderr)

    def _say(self, text: str) -> None:
        """Send a message and print the answer; what fails leaves the conversation as it was."""
        from evermini.cli.talk import warn_if_cut

        asked = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        reply = self._talker.reply(asked, self._params)
        try:
            with contextlib.closing(reply):
                for piece in reply:
                    pieces.append(piece)
                    print(piece, end="", flush=True)
            print()
            warn_if_cut(self._talker.finish_reason, self._params.get("max_completion_tokens"))
        except KeyboardInterrupt:
            print(" [stopped]")
        except EverminiError:
            if pieces:
                print()
            raise
        if pieces:
            self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def _reset(self, _: str) -> None:
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def _set_system(self, text: str) -> None:
        self._system = text
        self._reset("")

    def _save(self, path: str) -> None:
        if not path:
            print("Say where: /save FILE", file=sys.stderr)
            return
        target = Path(path).expanduser()
        with target.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        print(f"{len(self.messages)} messages appended to {target}")


def _terminal_lines(home: Path) -> Iterator[str]:
    """Yield what is typed: with line editing, and history kept in the home folder. Ctrl-C drops the line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    home.mkdir(parents=True, exist_ok=True)
    session: PromptSession[str] = PromptSession(
        history=FileHistory(home / "chat_history"), key_bindings=bindings
    )
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
