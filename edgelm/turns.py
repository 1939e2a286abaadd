"""Who may use the engine: one stream at a time, in the order of asking, and who was stopped.

Knows threads and time, nothing of tokens.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edgelm.engine.generate import FinishReason
from edgelm.errors import Cancelled, ConfigError


class Turn:
    """One stream, from the moment it is asked for to its end. `stopped` says why it was ended early."""

    __slots__ = ("__weakref__", "owner", "paused", "stopped")

    def __init__(self) -> None:
        self.stopped: FinishReason | None = None
        self.owner: int | None = None
        self.paused = False


class Turns:
    """The queue of one model. `abort(on)` breaks off, or allows again, what the engine computes.

    The rule of `cancel`: whatever was asked for before is stopped, whether it has begun or not. The lock may be taken
    twice by a thread, so that a signal handler can cancel at any moment.
    """

    def __init__(self, abort: Callable[[bool], None]) -> None:
        self._abort = abort
        self._state = threading.Condition(threading.RLock())
        self._asked: weakref.WeakSet[Turn] = weakref.WeakSet()
        self._waiting: list[Turn] = []
        self._current: Turn | None = None
        self._n_visitors = 0
        self._closed = self._released = False
        self._process = os.getpid()

    def ask(self) -> Turn:
        """Return a turn that can be cancelled from now on. Raises `ConfigError` once the model is closed."""
        if os.getpid() != self._process:  # threads that read and compute did not come along: nothing would ever end
            raise ConfigError("the model was loaded before this process was forked off; load it here, after the fork")
        with self._state:
            if self._closed:
                raise ConfigError("the model is closed; load it again")
            turn = Turn()
            self._asked.add(turn)
            return turn

    def cancel(self, turn: Turn | None = None, why: FinishReason = "cancelled") -> None:
        """Stop a turn, or every one that was asked for."""
        with self._state:
            for one in list(self._asked) if turn is None else [turn]:
                one.stopped = one.stopped or why
            if self._current is not None and self._current.stopped and not self._released:
                self._abort(True)
            self._state.notify_all()

    @contextmanager
    def held(self, turn: Turn, timeout_s: float | None) -> Iterator[None]:
        """Wait until it is the turn's turn, and hold the engine; a timeout counts from there.

        Raises `Cancelled` for a turn that was stopped meanwhile, `ConfigError` where the wait could never end.
        """
        self._wait(turn)
        timer = threading.Timer(timeout_s, self.cancel, (turn, "timeout")) if timeout_s else None
        try:
            if timer is not None:
                timer.daemon = True
                timer.start()
            yield
        finally:
            if timer is not None:
                timer.cancel()
            with self._state:
                self._current = None
                self._asked.discard(turn)
                self._state.notify_all()

    @contextmanager
    def pause(self, turn: Turn) -> Iterator[None]:
        """While inside, the turn keeps its place but computes nothing: its caller has the word."""
        with self._state:
            turn.paused = True
            self._state.notify_all()
        try:
            yield
        finally:
            with self._state:
                self._state.wait_for(lambda: not self._n_visitors)
                turn.paused = False

    def breathe(self, turn: Turn) -> None:
        """Let visitors in, if there are any: a turn calls it between two passes of a long prompt."""
        with self.pause(turn):
            pass

    @contextmanager
    def between(self) -> Iterator[None]:
        """While inside, no turn computes; a running one is met between two passes and goes on afterwards.

        Raises `ConfigError` from inside a computation, or once the model is closed.
        """
        with self._state:
            current = self._current
            if current is not None and not current.paused and current.owner == threading.get_ident():
                raise ConfigError("this cannot be done from inside a pass; do it between two chunks of a stream")
            self._n_visitors += 1
            try:
                self._state.wait_for(lambda: self._current is None or self._current.paused)
                if self._closed:
                    raise ConfigError("the model is closed; load it again")
                yield
            finally:
                self._n_visitors -= 1
                self._state.notify_all()

    def close(self, release: Callable[[], None]) -> None:
        """Stop every turn, wait until none computes, and call `release`. Later calls do nothing."""
        with self._state:
            self._closed = True
            self.cancel()
            current = self._current
            if current is not None and not current.paused and current.owner == threading.get_ident():
                raise ConfigError("the model cannot be closed from inside a generation; cancel that first")
            self._state.wait_for(lambda: self._current is None or self._current.paused)
            if not self._released:
                self._released = True
                release()

    def _wait(self, turn: Turn) -> None:
        with self._state:
            turn.owner = threading.get_ident()
            if self._current is not None and self._current.owner == turn.owner:
                raise ConfigError(
                    "this thread is still reading another stream of the model; finish or close that first"
                )
            self._waiting.append(turn)
            try:
                self._state.wait_for(lambda: turn.stopped or (self._current is None and self._waiting[0] is turn))
            finally:
                self._waiting.remove(turn)
                self._state.notify_all()
            if turn.stopped:
                self._asked.discard(turn)
                raise Cancelled("the generation was stopped before it began")
            self._abort(False)
            self._current = turn
