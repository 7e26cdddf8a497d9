"""What a watcher is told; a subclass overrides what it wants to hear.

>>> from ds_decoupled.schedules.actions import parse_action
>>> class Trace(Watcher):
...     def __init__(self): self.seen = []
...     def after(self, action): self.seen.append(str(action))
>>> trace = Trace()
>>> trace.after(parse_action("0F3")); trace.seen
['0F3']
"""

from __future__ import annotations

from typing import Any

from ds_decoupled.schedules import Action
from ds_decoupled.stages.outcome import Outcome


class Watcher:
    """Hears of everything that a rank does, and does nothing."""

    def before(self, action: Action) -> None:
        """``action`` follows."""

    def acted(self, action: Action, outcome: Outcome) -> None:
        """A stage has computed ``action``: its messages are posted, its optimizer has not heard of it yet."""

    def after(self, action: Action) -> None:
        """``action`` is done."""

    def after_call(self, through: int) -> None:
        """A call of ``train_batch`` or ``drain`` has done all that was due; every micro-batch before ``through`` is through
        every stage. All ranks are at the same place, so a watcher may make collective calls here."""

    def resumed(self, micro_batch: int) -> None:
        """Training resumes from a checkpoint, with ``micro_batch`` as the next new one."""

    def report(self) -> Any:
        """What :meth:`merge` needs of this rank; it travels between processes. None for nothing."""

    def merge(self, reports: list[Any]) -> dict[str, Any]:
        """Entries for ``decoupled_summary``, from all ranks' reports in the order of ranks."""
        return {}
