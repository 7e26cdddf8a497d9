"""The learning rate by delay: PipeMare's technique T1 (arXiv 1910.05124, section 3.1).

A stage whose gradients are old takes smaller steps while training is young and weights move fast::

    rate of update u  =  scheduled rate / tau^p        p = 1 - min(u / K, 1)

tau is the stage's delay in updates (at least 1), K the updates over which the damping fades. The last stage is never damped.
"""

from __future__ import annotations


def lr_divisor(delay: float, updates: int, fade: int) -> float:
    """What a stage's scheduled rate is divided by.

    Args:
        delay: of the stage, in updates: ticks between a micro-batch's forward and backward, over k.
        updates: that the stage has made so far.
        fade: K, updates; 0 is no damping.

    >>> [lr_divisor(16, updates, fade=4) for updates in range(5)]
    [16.0, 8.0, 4.0, 2.0, 1.0]
    """
    if updates >= fade:
        return 1.0
    return float(max(delay, 1.0) ** (1 - updates / fade))
