"""Which of a model's own later layers make the head of a stage: AugLocal's rule.

"Scaling supervised local learning with augmented auxiliary networks" (AugLocal, ICLR 2024, arXiv 2402.17318): the auxiliary
network of a layer is made of layers picked evenly from those above it, the last one always among them, and of a classifier;
its depth falls linearly, from d at the lowest to (d + 1) / 2 at the highest (``--pyramid`` of the authors' code, with the
coefficient 1/2 of their runs). Of a model of ``L`` layers whose stage ends before layer ``first``, with U layers between the
stage and the classifier and d to pick::

    stage | first . . . . L-2 | L-1         picked: first - 1 + round(i U / d) for i = 1 .. d, then L-1, the classifier

The paper builds a picked layer anew, for the channels that happen to come in, and halves the picture where channels
double. That needs to know how a layer's width is written, so here a layer is the model's own, and what keeps the chain whole is
another rule: **a layer that gives another shape than it takes is never left out**, and counts among the d (where there are more
of them than d, the head has more). Nothing is projected, every weight is one that the model has, and any model will do: text of
constant width has no such layer but its ends.

Layers that only make sense together (attention, then its MLP) are picked together: a *unit* is the shortest run of kinds of
layers that the model's upper part repeats.

Pure Python: no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from ds_decoupled.errors import ConfigError

AUGLOCAL = "auglocal"
"""The head's name; ``auglocal:n`` for n layers before the model's last one, more only where more change shapes."""

DEPTH = 4
"""Layers that the lowest stage's head has before the model's last one, if not told otherwise."""

PYRAMID = 0.5
"""How far the depth falls from the lowest stage to the highest: 0 is not at all, 1 is to one layer."""

LONGEST_UNIT = 4
"""Layers of a unit: half-blocks come in twos, a decoder layer with attention over an encoder in threes."""


def auglocal_depth(name: object) -> int | None:
    """How many layers the head of the lowest stage copies, beside the model's last one; None for a head of another kind.

    >>> auglocal_depth("auglocal:2"), auglocal_depth("lm")
    (2, None)

    Raises:
        ConfigError: if the number is none, or below 1.
    """
    if not isinstance(name, str) or not name.startswith(AUGLOCAL):
        return None
    kind, colon, count = name.partition(":")
    if kind != AUGLOCAL or colon and (not count.isdigit() or not int(count)):
        raise ConfigError("decoupled.head", name, f"heads of the model's own later layers are named {AUGLOCAL!r}, or "
                          f"'{AUGLOCAL}:n' with n layers before the model's last one, n at least 1",
                          f"For example '{AUGLOCAL}:2'; without layers in between it is 'last-layer'.")
    return int(count) if colon else DEPTH


def depth_of(stage: int, stages: int, most: int) -> int:
    """Layers for the head of ``stage``, of ``stages`` of which the last has none: falling linearly.

    >>> [depth_of(s, 10, 5) for s in range(9)]
    [5, 5, 5, 4, 4, 4, 4, 3, 3]

    Args:
        stage: its number, 0..stages-2.
        stages: J.
        most: of the lowest one.
    """
    fallen = PYRAMID * stage / max(1, stages - 2)
    return max(1, int(most * (1 - fallen) + fallen + 0.5))


def unit_of(kinds: Sequence[object]) -> int:
    """How many layers make up the shortest run that ``kinds`` end with twice.

    >>> unit_of(["embedding", "attention", "mlp", "attention", "mlp"]), unit_of(["stem", "block", "block"]), unit_of(["a", "b"])
    (2, 1, 1)
    """
    for length in range(1, LONGEST_UNIT + 1):
        if 2 * length <= len(kinds) and list(kinds[-length:]) == list(kinds[-2 * length:-length]):
            return length
    return 1


def picked(kinds: Sequence[object], changes: Sequence[bool], first: int, depth: int) -> list[int]:
    """The layers between a stage and the model's last layer that its head copies, in order.

    >>> picked(["embedding", *["block"] * 30], [True, *[False] * 30], first=16, depth=4)        # 30 blocks, a stage of 15
    [19, 23, 26, 30]
    >>> picked(["stem", *["block"] * 8], [True, *[False, False, True] * 2, True, False], first=1, depth=4)
    [3, 6, 7, 8]

    Args:
        kinds: of all layers but the last: what is the same for two layers that do the same work.
        changes: whether each of them gives another shape than it takes.
        first: the first layer above the stage.
        depth: how many layers to pick; those that change shapes come first, all of them, and the last unit.
    """
    length, end = unit_of(kinds), len(kinds)
    # Counted from the top: a stage may end within a unit, whose rest is then left out where whole ones remain.
    units = [range(max(first, stop - length), stop) for stop in range(end, first, -length)][::-1]
    if len(units) > 1 and len(units[0]) < length and not any(changes[i] for i in units[0]):
        del units[0]
    kept = [unit for unit in units if any(changes[i] for i in unit) or unit is units[-1]]
    others = [unit for unit in units if unit not in kept]
    free = min(len(others), max(0, round(depth / length) - len(kept)))
    # Evenly, the last of others + kept[-1:] being the last unit: i (U + 1) / (free + 1), rounded half up.
    even = [(2 * i * (len(others) + 1) + free + 1) // (2 * (free + 1)) - 1 for i in range(1, free + 1)]
    return sorted(index for unit in [*kept, *(others[i] for i in even)] for index in unit)
