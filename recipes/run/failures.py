"""What one rank ends with, every rank ends with: a sentence on a notice board that all of them watch.

A mistake that one rank alone can see, such as a picture that turns out to be broken in the middle of training, would leave the
others waiting for messages until they run into their time-out, or with nothing to say but that a rank is gone. So::

    the rank that fails                        every other rank
    pins its sentence to the board             a thread looks at the board twice a second, and says that it has read
    waits until all have read                  goes on waiting for a message
    leaves, with the sentence                  its connection breaks: it ends with the sentence that it has read

A rank that no broken connection wakes (one that waits on a device) is ended by its thread.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from ds_decoupled.errors import ConfigError, PeerError, RankError

POLL_SECONDS = 0.5
READING_SECONDS = 3.0
"""A rank that fails waits so long for the others to read."""
WAKING_SECONDS = 5.0
"""So long after reading, a rank that is still waiting for messages is ended."""

_OF_ANOTHER_RANK = (PeerError, RankError)
_SENTENCE, _READ = "sentence", "read"


def program() -> str:
    """What messages begin with."""
    return Path(sys.argv[0]).name


class NoticeBoard:
    """The sentence that the run ends with, if it fails; a store of its own, held by rank 0. Made by all ranks together.

    Attributes:
        sentence: what some rank has failed with, once this one knows.
    """

    def __init__(self) -> None:
        self.sentence: str | None = None
        self._world = dist.get_world_size()
        self._left = threading.Event()
        self._store = self._watcher = None
        if self._world > 1:
            # Not the default store: torch holds it for minutes while groups are made, and its accessor is private.
            self._store = self._open()
            self._watcher = threading.Thread(target=self._watch, name="notice-board", daemon=True)
            self._watcher.start()

    @staticmethod
    def _open() -> dist.TCPStore:
        host, first = os.environ["MASTER_ADDR"], dist.get_rank() == 0
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if first else None
        port = [store.port if store is not None else 0]
        dist.broadcast_object_list(port, src=0)
        if store is None:
            store = dist.TCPStore(host, port[0], is_master=False, wait_for_workers=False)
        store.set_timeout(timedelta(seconds=READING_SECONDS))
        return store

    def _watch(self) -> None:
        assert self._store is not None
        with contextlib.suppress(RuntimeError):  # the rank that holds the store is gone
            while not self._store.check([_SENTENCE]):
                if self._left.wait(POLL_SECONDS):
                    return
            self.sentence = self._store.get(_SENTENCE).decode()
            self._store.add(_READ, 1)
        if self.sentence is not None and not self._left.wait(WAKING_SECONDS):
            print(self.sentence, file=sys.stderr, flush=True)
            os._exit(1)

    def pin(self, sentence: str) -> None:
        """Say why the run ends, unless another rank has, and wait until every rank has read what there is to read."""
        if self._store is None:
            return
        with contextlib.suppress(RuntimeError):  # the rank that holds the store has left
            self._store.compare_set(_SENTENCE, "", sentence)
            until = time.monotonic() + READING_SECONDS
            while self._store.add(_READ, 0) < self._world and time.monotonic() < until:
                time.sleep(POLL_SECONDS / 5)

    def leave(self) -> None:
        """Stop watching."""
        self._left.set()
        if self._watcher is not None:
            self._watcher.join()

    def end(self, error: Exception) -> None:
        """End this rank, which met ``error``; what it and the others say is what came first.

        Raises:
            SystemExit: with a sentence, for a setting that cannot work or for what another rank failed with.
        """
        until = time.monotonic() + READING_SECONDS
        while isinstance(error, _OF_ANOTHER_RANK) and self.sentence is None and time.monotonic() < until and self._store:
            time.sleep(POLL_SECONDS / 5)  # the rank that failed says it better, in a moment
        if self.sentence is not None:
            sentence = self.sentence  # this error may only tell that the rank that failed is gone
            self.pin(sentence)
        elif isinstance(error, (ConfigError, *_OF_ANOTHER_RANK)):
            sentence = f"{program()}: {error}"
            self.pin(sentence)
        else:
            what = (str(error).splitlines() or [""])[0]
            self.pin(f"{program()}: rank {dist.get_rank()} failed: {type(error).__name__}: {what}")
            self.leave()
            return
        self.leave()
        sys.exit(sentence)
