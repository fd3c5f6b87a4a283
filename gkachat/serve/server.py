"""The process: loads runs, listens, and stops gracefully.

serve(["d4_gka_chat"], host="127.0.0.1", port=8000)
"""

import ipaddress
import math
import signal
import socket
from collections.abc import Mapping, Sequence
from types import FrameType

import uvicorn

from gkachat.inference.chat import ChatSession
from gkachat.serve.api import create_app
from gkachat.serve.batcher import Batcher


class Server(uvicorn.Server):
    """HTTP server of some models. `run(sockets=[...])` returns after `handle_exit`, which signals call.

    Raises ValueError for options out of range.
    """

    def __init__(
        self,
        sessions: Mapping[str, ChatSession],
        *,
        api_key: str | None = None,
        only_local: bool = False,
        rows: int = 8,
        max_waiting: int = 128,
        grace: float = 10.0,
    ):
        if rows < 1 or max_waiting < 0 or not 0 <= grace < math.inf:
            raise ValueError(f"given rows {rows}, queue {max_waiting}, grace {grace}; expected 1, 0 and 0 or more")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
            raise ValueError("api_key: expected printable ASCII characters, not only spaces")
        self.batcher = Batcher({name: session.engine for name, session in sessions.items()}, rows, max_waiting)
        self.grace = grace
        app = create_app(sessions, self.batcher, api_key, only_local)
        # Answers end by themselves within `grace`; what is left after that is a client that does not read.
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=int(grace) + 5))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop: running answers have `grace` seconds; a second signal ends them now."""
        self.batcher.drain(0 if self.should_exit else self.grace)
        super().handle_exit(sig, frame)


def serve(runs: Sequence[str], *, host: str, port: int, device: str = "auto", int8: bool = False, **options) -> None:
    """Load the last checkpoint of each run and serve them until SIGTERM or SIGINT; the options are those of Server.

    Without an API key, a server that listens on a loopback address answers no page of another host.

    Raises FileNotFoundError, OSError or ValueError if a run or the address cannot be used.
    """
    if not runs:
        raise ValueError("given no run, expected at least one")
    with listen(host, port) as listener:
        sessions = {}
        for run in runs:
            session = ChatSession.from_run(run, device=device, int8=int8)
            if session.name in sessions:
                raise ValueError(f"given two runs of the name {session.name!r}, expected different names")
            sessions[session.name] = session
        is_loopback = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
        server = Server(sessions, only_local=is_loopback and not options.get("api_key"), **options)
        for sig in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises the signal once more after it has stopped
            signal.signal(sig, lambda *_: None)
        where, actual_port = (f"[{host}]" if ":" in host else host), listener.getsockname()[1]
        print(f"{', '.join(sessions)} at http://{where}:{actual_port}/", flush=True)
        server.run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises OSError that names the address."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error}") from None
