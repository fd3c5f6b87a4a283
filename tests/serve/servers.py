"""A server in a thread of the tests' process, whose batcher and models the tests can reach.

A test module takes the fixtures of server_fixtures.py with `pytest_plugins = ["server_fixtures"]`.
"""

import contextlib
import threading
import time

from gkachat.inference.engine import Sampling
from gkachat.serve.server import Server, listen

CONTEXT = 128  # tokens


def wait_until(condition, seconds=30):
    """Wait until a condition holds; fail if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not become true in time"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(sessions, **options):
    """Serve the sessions on a free port of 127.0.0.1; yield the server, with its `url`."""
    with listen("127.0.0.1", 0) as listener:
        server = Server(sessions, **options)
        server.url, server.sessions = f"http://127.0.0.1:{listener.getsockname()[1]}", sessions
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield server
        finally:
            server.should_exit = True
            thread.join(timeout=60)
            assert not thread.is_alive()


def answer_of(session, ids, **sampling):
    """Return the text and the ids that the engine alone gives for a prompt, BOS first."""
    outputs = list(session.engine.run([session.request(ids, Sampling(**sampling))], rows=1))
    return "".join(output.text for output in outputs), [o.token for o in outputs if o.token is not None]
