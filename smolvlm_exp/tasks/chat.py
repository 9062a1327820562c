"""task=chat: a conversation in the terminal, with pictures; whatever runs the model.

python -m smolvlm_exp task=chat run=last
"""

import contextlib
import shlex
import sys
from pathlib import Path
from typing import Any

from smolvlm_exp.config.schema import Config
from smolvlm_exp.data.images import ImageError
from smolvlm_exp.deploy.session.load import load_session
from smolvlm_exp.deploy.session.session import Answer, Sampling, SmolVLMSession
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.files import write_json
from smolvlm_exp.utils.signals import StopRequest

HELP = """\
/image PATH ...   pictures for your next question; several, or again, add up
/reset            forget the conversation
/history          what was said so far
/save FILE        the conversation as JSON
/quit             leave (or Ctrl-D); Ctrl-C stops an answer"""


def chat(config: Config, folder: Path) -> None:
    """Read lines until they end, and answer them.

    Raises:
        RequestError: there is no such model.
    """
    with contextlib.suppress(ImportError):  # editing and the lines before, where there is a terminal for it
        import readline  # noqa: F401
    chat = ChatLoop(
        load_session(config.session, config.model, config.quant, config.adapter, config.data, config.seed),
        Sampling(config.session.max_new_tokens, config.task.temperature, seed=config.seed),
    )
    print(
        f"chat with {config.model.id}{f' and {config.model.adapter}' if config.model.adapter else ''}; /help tells more"
    )
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        if line:
            chat.handle(line)


class StopAnswer(StopRequest):
    """Ctrl-C ends the answer and not the conversation; a second one leaves."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer

    def heard(self) -> None:
        self.answer.stop()


class ChatLoop:
    """What a person typed, line by line."""

    def __init__(self, session: SmolVLMSession, sampling: Sampling) -> None:
        self.session, self.sampling = session, sampling
        self.waiting: list[Path] = []  # pictures for the next question
        self.reset()

    def handle(self, line: str) -> None:
        """A question, or a command. What is wrong with it is told, and the conversation stays as it was."""
        name, _, rest = line.partition(" ")
        commands = {"/image": self.image, "/save": self.save}
        try:
            if name in commands:
                commands[name](shlex.split(rest))
            elif line in ("/reset", "/history", "/help"):
                getattr(self, line[1:])()
            elif line.startswith("/"):
                print(f"there is no {name}\n{HELP}")
            else:
                self.ask(line)
        except (RequestError, ImageError, OSError, ValueError) as error:
            print(f"! {error}")

    def ask(self, text: str) -> None:
        images = [self.session.writer.open(path) for path in self.waiting]
        answer = self.conversation.say(text, images, self.sampling)
        with StopAnswer(answer):
            for number, piece in enumerate(answer):
                print(piece if number else piece.lstrip(), end="", flush=True)
        print(" [stopped]" if answer.ended_by == "stopped" else " [cut]" if answer.ended_by == "length" else "")
        self.said.append({"role": "user", "text": text, "images": [str(path) for path in self.waiting]})
        self.said.append({"role": "assistant", "text": answer.text.strip()})
        self.waiting = []

    def image(self, names: list[str]) -> None:
        paths = [Path(name).expanduser() for name in names]
        for path in paths:
            self.session.writer.open(path)  # told now, and not with the question
        self.waiting += paths
        print(f"{len(self.waiting)} for your next question")

    def save(self, names: list[str]) -> None:
        if len(names) != 1:
            raise RequestError("/save FILE")
        path = Path(names[0]).expanduser()
        write_json(path, self.said)
        print(path)

    def reset(self) -> None:
        self.conversation = self.session.conversation()
        self.said: list[dict[str, Any]] = []
        self.waiting = []

    def history(self) -> None:
        for turn in self.said:
            pictures = "".join(f" [{name}]" for name in turn.get("images", ()))
            print(f"{turn['role']}:{pictures} {turn['text']}")

    def help(self) -> None:
        print(HELP)
