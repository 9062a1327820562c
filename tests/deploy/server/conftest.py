"""A server as task=serve runs it, in a thread of the tests' process."""

import threading

import pytest

from smolvlm_exp.deploy.server.app import build_app
from smolvlm_exp.deploy.server.connections import Server, listen


@pytest.fixture(scope="module")
def serve():
    """Serves a session; returns the address."""
    running = []

    def start(session, limits, service):
        listening = listen("127.0.0.1", 0)
        server = Server(build_app(session, limits, service), session)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        running.append((server, thread, listening))
        return f"http://127.0.0.1:{listening.getsockname()[1]}"

    yield start
    for server, thread, listening in running:
        server.should_exit = True
        thread.join()
        listening.close()
