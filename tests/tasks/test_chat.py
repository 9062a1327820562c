"""task=chat: what a person types, and what they see."""

import io
import json
import shutil
import sys
import threading

import pytest

from smolvlm_exp.deploy.export.record import RECORD
from smolvlm_exp.deploy.session.session import SmolVLMSession
from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.tasks.chat import ChatLoop, load_session
from smolvlm_exp.tasks.chat import chat as run_chat
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.paths import PACKAGE
from tests.conftest import compose

CAT = PACKAGE / "data" / "sources" / "photos" / "cat.jpg"


@pytest.fixture
def chat(small):
    return ChatLoop(SmolVLMSession.load(small), Sampling(max_new_tokens=8))


def test_a_conversation_of_an_exported_model(graphs, tmp_path, monkeypatch, capsys):
    file = tmp_path / "said.json"
    typed = f"/image {CAT}\nWhat do you see?\n\nIs there a star?\n/history\n/save {file}\nhelp\nQuit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    threads = set(threading.enumerate())
    run_chat(compose("task=chat", f"model.id={graphs}", "session.precision=int8", "session.max_new_tokens=8"), tmp_path)
    assert set(threading.enumerate()) <= threads  # a thread at work when the program exits would abort it
    out = capsys.readouterr().out
    said = json.loads(file.read_text())
    assert [turn["role"] for turn in said] == ["user", "assistant"] * 2
    assert (said[0]["text"], said[0]["images"], said[2]["images"]) == ("What do you see?", [str(CAT)], [])
    for turn in said[1::2]:
        assert turn["text"]
        assert out.count(turn["text"]) >= 2  # when it was said, and in the history
    assert "never read" not in out
    assert out.startswith(f"loading {graphs} ...\nchat with {graphs}; help lists the commands, quit exits\n")
    assert out.count("/save FILE") == 1


def test_images_have_the_limits_of_data(chat, small, capsys):
    """A file's size is checked before it is read, and its pixels before they are decoded."""
    config = compose("task=chat", f"model.id={small}", "quant=none", "data.max_pixels=999", "data.max_image_mib=1")
    chat.session.prompts.limits = load_session(config).prompts.limits
    chat.handle(f"/image {CAT}")
    assert "more than data.max_pixels=999" in capsys.readouterr().out
    chat.handle("/image /dev/zero")
    assert "is not there: /dev/zero" in capsys.readouterr().out
    assert chat.attached == []


def test_commands(chat, capsys, tmp_path):
    (tmp_path / "a cat.jpg").write_bytes(CAT.read_bytes())
    chat.handle(f"/image '{tmp_path / 'a cat.jpg'}' {CAT}")
    assert len(chat.attached) == 2
    chat.handle("Describe the picture.")
    assert chat.attached == []
    assert len(chat.conversation.prompt.images) == 2
    chat.handle("/reset")
    assert (chat.history, chat.conversation.prompt.ids) == ([], [])
    assert "[cut off]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image nowhere.png", "error: "),
        (f"/image {__file__}", "cannot be decoded"),
        ("a \udcff", "lone surrogate"),
        ("/save", "usage: /save FILE"),
        ("/sing", "unknown command /sing"),
    ],
)
def test_an_error_is_printed_and_changes_nothing(chat, capsys, line, message):
    chat.handle("Describe the picture.")
    before = [*chat.history], [*chat.conversation.prompt.ids]
    chat.handle(line)
    assert message in capsys.readouterr().out
    assert ([*chat.history], [*chat.conversation.prompt.ids]) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["session.cache=much"], "session.cache=much is not a size"),
        (["session.precision=int8"], "session.precision=int8 is for ONNX exports"),
        (["session.precision=int8", "model.id={merged}"], "session.precision=int8 is for ONNX exports"),
        (["model.id={graphs}", "model.adapter=some"], "with its adapter merged already"),
        (["model.id={graphs}"], "onnx has a decoder in fp32, int8, int4: set session.precision"),
    ],
)
def test_a_model_that_cannot_chat_is_refused(graphs, small, tmp_path, overrides, message):
    merged = shutil.copytree(small, tmp_path / "merged")
    (merged / RECORD).write_text("{}")
    settings = (override.format(graphs=graphs, merged=merged) for override in overrides)
    with pytest.raises(RequestError, match=message):
        run_chat(compose("task=chat", *settings), tmp_path)


@pytest.mark.slow
def test_chat_as_a_command(command, tmp_path):
    done = command("task=chat", "quant=none", "hydra.run.dir=out", env={"PYTHONUNBUFFERED": "1"})
    assert (done.returncode, "chat with embedded" in done.stdout) == (0, True), done.stderr
