"""Serve trained runs over HTTP: OpenAI's completions and chat completions, and a page to talk to them.

python -m scripts.serve d4_gka_chat
python -m scripts.serve d4_softmax_chat d4_gka_conv_chat --port 8080

The page is at http://127.0.0.1:8000/. SIGTERM and Ctrl-C end the server once its answers are complete.
"""

from typing import Annotated

import tyro

from scripts.cli import run


def main(
    run_names: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)")
    ],
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    rows: int = 8,
    queue: int = 128,
    grace: float = 10.0,
    device: str = "auto",
    int8: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    threads: int | None = None,
) -> None:
    """Answer requests until SIGTERM or Ctrl-C.

    Args:
        run_names: Names of runs, or paths of their directories.
        host: Address to listen on. 0.0.0.0 is open to the network: set an API key.
        port: Port to listen on; 0 takes a free one.
        api_key: Key that requests must bear.
        rows: Answers that each model generates at a time.
        queue: Answers of each model that may wait for a row; more are refused with status 429.
        grace: Seconds that answers have to complete when the server stops.
        device: Torch device, or auto.
        int8: Store matrices in int8, which takes less memory.
        threads: CPU threads of the models; by default all.
    """
    from gkachat.machine import check_installed

    for package in ("fastapi", "uvicorn"):
        check_installed(package, "serve")
    import torch

    from gkachat.serve.server import serve

    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads: given {threads}, expected 1 or more")
        torch.set_num_threads(threads)

    serve(
        run_names, host=host, port=port, api_key=api_key, rows=rows, max_waiting=queue, grace=grace, device=device,
        int8=int8,
    )  # fmt: skip


if __name__ == "__main__":
    run(main, __doc__)
