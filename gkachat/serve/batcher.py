"""Batcher: answers the requests of many clients, on one thread that runs every model.

    batcher = Batcher({"d4_gka": engine}, rows=8, max_waiting=128)
    batcher.start(deliver)          # the thread calls deliver([(answer, output), ...])
    batcher.submit([Answer("d4_gka", request)])
    batcher.cancel(answers)
    batcher.close()

Each model has one batch of the engine. Requests join it when a row is free and leave it between two steps. One thread
runs all models in turns, because a CUDA graph cannot be recorded while another thread uses the GPU.
"""

import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from gkachat.attention.cache import Cache
from gkachat.inference.engine import Batch, Engine, Request, TokenOutput

Deliveries = list[tuple["Answer", TokenOutput | Exception]]
"""Outputs in their order. An exception ends its answer."""

# Each delivery wakes the thread that talks to the clients, which takes Python's lock from this one. Ends of answers are
# delivered at once.
SECONDS_BETWEEN_DELIVERIES = 0.02


class QueueFull(Exception):
    """No room for another answer."""


class Stopping(Exception):
    """The server stops: it takes no more requests, and ends those that have not finished in time."""


@dataclass(eq=False)
class Answer:
    """One text that a client waits for."""

    run: str
    """Name of the model."""
    request: Request
    owner: Any = None
    """Where its outputs belong; only `deliver` looks at it."""


@dataclass
class _Lane:
    """Answers of one model: those that wait, those in rows of the batch by their number, and those to be removed."""

    batch: Batch
    waiting: deque[Answer] = field(default_factory=deque)
    running: dict[int, Answer] = field(default_factory=dict)
    cancelled: set[Answer] = field(default_factory=set)


class Batcher:
    """Thread that answers requests. All methods may be called from any thread."""

    def __init__(self, engines: Mapping[str, Engine], rows: int, max_waiting: int):
        """Allocate the caches.

        Args:
            engines: engines by the names of their models, all on one device.
            rows: answers that one model generates at a time.
            max_waiting: answers of one model that may wait for a row.
        """
        self.capacity, self.max_waiting = rows + max_waiting, max_waiting
        self._lanes = {name: _Lane(engine.batch(rows)) for name, engine in engines.items()}
        self._device = next(iter(engines.values())).device
        self._calls: deque[tuple[Future, Callable[[], Any]]] = deque()
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._deadline, self._closed = math.inf, False
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)

    def start(self, deliver: Callable[[Deliveries], None]) -> None:
        """Start the thread, which passes all outputs to `deliver`."""
        self._deliver = deliver
        self._thread.start()

    def submit(self, answers: Sequence[Answer]) -> None:
        """Queue answers of one model, all or none. Raises QueueFull if there is no room, or Stopping."""
        with self._changed:
            lane = self._lanes[answers[0].run]
            self._check(len(lane.waiting) + len(lane.running) + len(answers) > self.capacity)
            lane.waiting.extend(answers)
            self._changed.notify()

    def call(self, function: Callable[[], Any]) -> Future:
        """Run a function that uses a model between two steps. Raises QueueFull or Stopping."""
        with self._changed:
            self._check(len(self._calls) >= self.max_waiting)
            future: Future = Future()
            self._calls.append((future, function))
            self._changed.notify()
        return future

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Drop answers, and free their rows before the next step. Those that have ended are ignored."""
        with self._changed:
            for answer in answers:
                self._lanes[answer.run].cancelled.add(answer)
            self._changed.notify()

    def count(self) -> int:
        """Return the number of answers that wait or have a row."""
        with self._changed:
            return sum(len(x.waiting) + max(len(x.running), len(x.batch)) for x in self._lanes.values())

    def cache(self, run: str) -> Cache:
        """Return the cache of a model's batch."""
        return self._lanes[run].batch.cache

    def drain(self, seconds: float) -> None:
        """Refuse further requests, and end answers that have not finished in time. Signal handlers may call this."""
        self._deadline = time.monotonic() + seconds

    def close(self) -> None:
        """End all answers, and then the thread."""
        self.drain(0)
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _check(self, is_full: bool) -> None:
        if self._deadline < math.inf or not self._thread.is_alive():
            raise Stopping("the server is stopping")
        if is_full:
            raise QueueFull(f"{self.max_waiting} requests are waiting already; try again later")

    def _has_work(self) -> bool:
        lanes = self._lanes.values()
        return bool(self._closed or self._calls or any(x.waiting or x.running or x.cancelled for x in lanes))

    def _work(self) -> None:
        if self._device.type == "cuda":  # a thread starts with the first GPU
            torch.cuda.set_device(self._device)
        outputs: Deliveries = []
        delivered = -math.inf
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                calls = [self._calls.popleft() for _ in range(len(self._calls))]
            for future, function in calls:
                _run(future, function)
            for lane in self._lanes.values():
                outputs += self._advance(lane)
            now = time.monotonic()
            if outputs and (
                now - delivered > SECONDS_BETWEEN_DELIVERIES or any(_is_end(output) for _, output in outputs)
            ):
                self._deliver(outputs)
                outputs, delivered = [], now
            if self._closed:
                return

    def _advance(self, lane: _Lane) -> Deliveries:
        """Remove cancelled answers, read prompts into free rows, and draw a token for each row."""
        with self._changed:
            cancelled, lane.cancelled = lane.cancelled, set()
            if cancelled:
                lane.waiting = deque(answer for answer in lane.waiting if answer not in cancelled)
            for number in [number for number, answer in lane.running.items() if answer in cancelled]:
                lane.batch.cancel(number)
                del lane.running[number]
        if time.monotonic() > self._deadline:
            return self._end(lane, Stopping("the server stopped before the answer was complete"), [*lane.waiting])
        outputs = self._finish(lane, [self._add(lane, number) for number in self._admitted(lane)])
        if lane.running:
            try:
                outputs += self._finish(lane, [(output.request, output) for output in lane.batch.step()])
            except Exception as error:  # the batch serves whoever comes next
                logging.exception("a decode step failed")
                outputs += self._end(lane, error)
        return outputs

    def _admitted(self, lane: _Lane) -> Iterator[int]:
        """Yield numbers for waiting answers, as long as there are free rows."""
        while lane.batch.has_room:
            with self._changed:
                if not lane.waiting:
                    return
                number = next(self._numbers)
                lane.running[number] = lane.waiting.popleft()
            yield number

    def _add(self, lane: _Lane, number: int) -> tuple[int, TokenOutput | Exception]:
        try:
            return number, lane.batch.add(number, lane.running[number].request)
        except Exception as error:
            logging.exception("a prompt could not be read")
            return number, error

    def _finish(self, lane: _Lane, outputs: list[tuple[int, TokenOutput | Exception]]) -> Deliveries:
        """Return the outputs with their answers, and forget answers that have ended."""
        deliveries = []
        for number, output in outputs:
            answer = lane.running.pop(number) if _is_end(output) else lane.running[number]
            deliveries.append((answer, output))
        return deliveries

    def _end(self, lane: _Lane, error: Exception, waiting: Sequence[Answer] = ()) -> Deliveries:
        """End all answers in rows, and some that wait, with an error."""
        with self._changed:
            answers = [*lane.running.values(), *waiting]
            for number in lane.running:
                lane.batch.cancel(number)
            lane.running.clear()
            for answer in waiting:
                lane.waiting.remove(answer)
        return [(answer, error) for answer in answers]


def _is_end(output: TokenOutput | Exception) -> bool:
    return isinstance(output, Exception) or bool(output.finished)


def _run(future: Future, function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        logging.exception("a call failed")
        future.set_exception(error)
