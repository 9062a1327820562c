"""task=chat: a conversation in the terminal, with images, by either backend.

python -m smolvlm_exp task=chat run=last
"""

import contextlib
import shlex
import sys
from pathlib import Path
from typing import Any

from smolvlm_exp.config.schema import Config
from smolvlm_exp.data.images import ImageError, ImageLimits
from smolvlm_exp.deploy.session.answer import Answer, AnswerError
from smolvlm_exp.deploy.session.backends import load_backend
from smolvlm_exp.deploy.session.session import SmolVLMSession
from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.files import write_json
from smolvlm_exp.utils.formatting import printable
from smolvlm_exp.utils.paths import relative_to_cwd
from smolvlm_exp.utils.signals import StopRequest
from smolvlm_exp.utils.units import bytes_of

HELP = """\
/image PATH ...   attach images to your next message (may be repeated)
/reset            start a new conversation
/history          show the conversation
/save FILE        save the conversation as JSON
/help             list the commands; so does help
/quit             exit; so do quit, exit and Ctrl-D; Ctrl-C stops an answer"""
QUIT = ("/quit", "quit", "/exit", "exit")  # alone on a line


def load_session(config: Config, rows: int = 1) -> SmolVLMSession:
    """The session of task=chat and task=serve, which generates `rows` answers at a time."""
    budget = bytes_of("session.cache", config.session.cache)
    backend = load_backend(config.session.precision, config.model, config.quant, config.adapter, config.seed)
    return SmolVLMSession(*backend, budget, config.data.max_edge, ImageLimits.of(config.data), rows)


def describe_model(config: Config) -> str:
    adapter = config.model.adapter
    return config.model.id + (f" with the adapter {relative_to_cwd(Path(adapter))}" if adapter else "")


def chat(config: Config, folder: Path) -> None:
    """Answer line by line, until there are no more."""
    with contextlib.suppress(ImportError):  # line editing and history, where there is a terminal
        import readline  # noqa: F401
    sampling = Sampling(config.session.max_new_tokens, temperature=config.task.temperature, seed=config.seed)
    model = describe_model(config)
    print(f"loading {model} ...", flush=True)
    with contextlib.closing(load_session(config)) as session:  # or its thread may be at work when the program exits
        loop = ChatLoop(session, sampling)
        print(f"chat with {model}; help lists the commands, quit exits")
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line.lower() in QUIT:
                return
            if line:
                loop.handle(line)


class StopAnswer(StopRequest):
    """Ctrl-C ends the answer and not the conversation; a second one exits."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer

    def on_request(self) -> None:
        self.answer.stop()


class ChatLoop:
    """One conversation, and what was typed in it."""

    def __init__(self, session: SmolVLMSession, sampling: Sampling) -> None:
        self.session, self.sampling = session, sampling
        self.attached = list[Path]()  # images of the next message
        self.reset()

    def handle(self, line: str) -> None:
        """A message or a command. An error is printed, and the conversation stays as it was."""
        name, _, rest = line.partition(" ")
        commands = {"/image": self.attach, "/save": self.save}
        try:
            if name in commands:
                commands[name](shlex.split(rest))
            elif line == "/reset":
                self.reset()
            elif line == "/history":
                for turn in self.history:
                    images = "".join(f" [{name}]" for name in turn.get("images", ()))
                    print(printable(f"{turn['role']}:{images} {turn['text']}"))
            elif line.lower() in ("/help", "help"):
                print(HELP)
            elif line.startswith("/"):
                print(f"unknown command {name}\n{HELP}")
            else:
                self.ask(line)
        except (RequestError, ImageError, AnswerError, OSError, ValueError) as error:
            print(f"error: {error}")

    def ask(self, text: str) -> None:
        images = [self.session.prompts.open_image(path) for path in self.attached]
        answer = self.conversation.say(text, images, self.sampling)
        with StopAnswer(answer):
            for number, piece in enumerate(answer):
                print(printable(piece if number else piece.lstrip()), end="", flush=True)
        print({"stopped": " [stopped]", "length": " [cut off]"}.get(answer.ended_by, ""))
        self.history.append({"role": "user", "text": text, "images": [str(path) for path in self.attached]})
        self.history.append({"role": "assistant", "text": answer.text.strip()})
        self.attached = []

    def attach(self, names: list[str]) -> None:
        paths = [Path(name).expanduser() for name in names]
        for path in paths:
            self.session.prompts.open_image(path)  # an error now, not with the message
        self.attached += paths
        print(f"{len(self.attached)} attached to your next message")

    def save(self, names: list[str]) -> None:
        if len(names) != 1:
            raise RequestError("usage: /save FILE")
        path = Path(names[0]).expanduser()
        write_json(path, self.history)
        print(f"saved to {path}")

    def reset(self) -> None:
        self.conversation = self.session.conversation()
        self.history: list[dict[str, Any]] = []
        self.attached = []
