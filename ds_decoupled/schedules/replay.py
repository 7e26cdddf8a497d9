"""Which message of a replay ring is taken: numbers alone, so that an order can be worked out before anything is computed.

The rule (decoupled greedy learning, arXiv 2106.06401, asynchronous form): fewest uses first, the newest among those; a full
ring loses its oldest message to the next one. With a cap no message is used more often, and a stage that finds none idles.

>>> ring = ReplayOrder(Replay(size=2))
>>> [ring.put(0), ring.draw(), ring.put(1), ring.draw(), ring.draw(), ring.put(2), ring.draw()]
[None, 0, None, 1, 1, 0, 2]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Replay:
    """How the input of every stage but the first is replayed.

    Attributes:
        size: M, the messages (whole micro-batches) that a ring holds.
        cap: uses of one message at most; None for any number.
        authors_ring: the oldest among those with the fewest uses, which is what the published code takes from a full ring.
    """

    size: int = 10
    cap: int | None = None
    authors_ring: bool = False


class ReplayOrder:
    """The numbers that one ring holds, and how often each was used.

    Attributes:
        uses: by number, the oldest first.
        used: messages that are gone, by how often they were used.
        newest: number that came; -1 before the first.
        ages: draws, by how many messages newer than the drawn one had come.
        replay: the rule.
    """

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.uses: dict[int, int] = {}
        self.used: Counter[int] = Counter()
        self.ages: Counter[int] = Counter()
        self.newest = -1

    def put(self, number: int) -> int | None:
        """``number`` has come. Returns the one that had to go for it."""
        gone = None
        if len(self.uses) == self.replay.size:
            gone = next(iter(self.uses))
            self.used[self.uses.pop(gone)] += 1
        self.uses[number] = 0
        self.newest = number
        return gone

    def draw(self) -> int | None:
        """The number to be used now; None where there is none."""
        number = self._next()
        if number is not None:
            self.uses[number] += 1
            self.ages[self.newest - number] += 1
        return number

    def _next(self) -> int | None:
        if not self.uses:
            return None
        fewest = min(self.uses.values())
        if self.replay.cap is not None and fewest >= self.replay.cap:
            return None
        equals = (number for number, uses in self.uses.items() if uses == fewest)
        return next(equals) if self.replay.authors_ring else max(equals)

    @property
    def can_draw(self) -> bool:
        """Whether :meth:`draw` would give one."""
        return self._next() is not None

    @property
    def unseen(self) -> int:
        """Messages that were not used yet."""
        return sum(uses == 0 for uses in self.uses.values())

    def report(self, k: int) -> dict[str, Any]:
        """Counts: ``uses`` (of messages here and gone, by number of uses), ``overwritten_unseen``, and the ``age`` of what was
        drawn, in the sender's updates of ``k`` messages: ``mean`` and ``max``."""
        uses = self.used + Counter(self.uses.values())
        drawn = sum(self.ages.values())
        return {"uses": {str(n): uses[n] for n in sorted(uses)}, "overwritten_unseen": self.used[0],
                "age": {"mean": sum(age * n for age, n in self.ages.items()) / drawn / k if drawn else 0.0,
                        "max": max(self.ages, default=0) / k}}

    def state_dict(self) -> dict[str, Any]:
        """Numbers, uses and counts."""
        return {"uses": dict(self.uses), "used": dict(self.used), "ages": dict(self.ages), "newest": self.newest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.uses, self.newest = dict(state["uses"]), state["newest"]
        self.used, self.ages = Counter(state["used"]), Counter(state["ages"])
