"""Running many micro-batches through a block in step: all of them come to a weight before any goes past it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Generic, TypeVar

import torch

from sparsefit.pruning.ranks import from_all
from sparsefit.pruning.watching import Seen, fused_inputs, hooked
from sparsefit.pruning.weights import PrunableWeight

Result = TypeVar("Result")


class _Cancelled(BaseException):
    """Ends a paused task when another one has failed."""


class _Task(Generic[Result]):
    """One computation in a thread of its own, which runs only while the others wait."""

    def __init__(self, compute: Callable[[], Result], surroundings: Callable[[], AbstractContextManager[None]]) -> None:
        self.seen: Seen | None = None  # what it waits before
        self.result: Result | None = None
        self.error: BaseException | None = None
        self.finished = False
        self._compute, self._surroundings = compute, surroundings
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._cancelled = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def resume(self) -> None:
        """Let it run until it pauses or ends.

        Raises:
            BaseException: what it raised.
        """
        self.seen = None
        self._go.release()
        self._back.acquire()
        if self.error is not None:
            raise self.error

    def pause(self, seen: Seen) -> None:
        """Called in its thread: wait before the use of a weight."""
        self.seen = seen
        self._back.release()
        self._wait()

    def cancel(self) -> None:
        """End it wherever it is."""
        if not self.finished:
            self._cancelled = True
            self._go.release()
        self._thread.join()

    def _wait(self) -> None:
        self._go.acquire()
        if self._cancelled:
            raise _Cancelled

    def _run(self) -> None:
        try:
            self._wait()
            with self._surroundings():
                self.result = self._compute()
        except _Cancelled:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.finished = True
            self._back.release()


def run_in_step(
    computations: Sequence[Callable[[], Result]],
    weights: Sequence[PrunableWeight],
    before: Callable[[PrunableWeight, list[tuple[int, Seen]]], None],
) -> list[Result]:
    """Run computations one at a time, in turns: none uses a weight before all have come to it.

    A single pass through a block thus gives each layer inputs that have gone through the pruned layers before it. The
    price is that what each computation holds between two layers is held for all of them at once.

    Args:
        computations: For each micro-batch its pass through a block.
        weights: The weights of the block, in the order in which they are used wherever that is not the same for all.
        before: Called with a weight and (number of the computation, what it is about to multiply) for each one that
            uses it next; it may change the weight. In a distributed run it is called on every rank for the same
            weights in the same order, with an empty list where nothing here waits.

    Returns:
        What the computations return.
    """
    order = {weight.name: position for position, weight in enumerate(weights)}
    current: list[_Task[Result]] = []

    def pause(seen: Seen) -> None:
        current[0].pause(seen)

    surroundings = _surroundings_of_this_thread(weights, pause)
    tasks = [_Task(compute, surroundings) for compute in computations]

    def go_on(task: _Task[Result]) -> None:
        current[:] = [task]
        task.resume()

    try:
        with hooked(weights, pause):
            for task in tasks:
                go_on(task)
            while (turn := _first(order[task.seen.weight.name] for task in tasks if not task.finished)) is not None:
                weight = weights[turn]
                waiting = [(n, t) for n, t in enumerate(tasks) if not t.finished and t.seen.weight is weight]
                before(weight, [(number, task.seen) for number, task in waiting])
                for _, task in waiting:
                    go_on(task)
    finally:
        for task in tasks:
            task.cancel()
    return [task.result for task in tasks]


def _first(positions: Iterator[int]) -> int | None:
    """The lowest position at which anything waits, here or on another rank; None if all is done."""
    lowest = from_all(min(positions, default=None))
    return min((position for position in lowest if position is not None), default=None)


def _surroundings_of_this_thread(
    weights: Sequence[PrunableWeight], record: Callable[[Seen], None]
) -> Callable[[], AbstractContextManager[None]]:
    """What must be entered in another thread to compute there as here: torch keeps these for each thread."""
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    autocast = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    copies = torch.is_autocast_cache_enabled()
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    @contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            for kind, dtype, enabled in autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=copies))
            if device is not None:
                stack.enter_context(torch.cuda.device(device))
            stack.enter_context(fused_inputs(weights, record))
            yield

    return entered
