"""Teaching heads before their stages may learn from them: the object ``head_teaching`` of the ``decoupled`` block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from ds_decoupled.settings.blocks import STRICT, Words

MOST_UPDATES = 1_000_000


def teaching_object(value: Any) -> Any:
    """What is an object, or null, or not one at all."""
    if value is not None and not isinstance(value, Mapping | BaseModel):
        raise ValueError('an object is needed, such as {"updates": 60, "target": "model"}')
    return value


class TeachingSettings(BaseModel):
    """How heads are taught, see :mod:`ds_decoupled.teaching`.

    Attributes:
        updates: of every head, which so many first calls of ``train_batch`` make; no stage learns meanwhile.
        lr: the peak rate of Adam, which is the heads' own meanwhile.
        warmup: the part of these updates over which the rate rises; then it falls by a cosine to 0.
        target: what a head is to say: the ``labels``, by the loss, or the whole ``model``'s own probabilities.
    """

    model_config = STRICT

    updates: Annotated[int, Field(ge=1, le=MOST_UPDATES), Words(
        f"a number of updates, from 1 to {MOST_UPDATES}", "Leave it out for 60.")] = 60
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False), Words(
        "a learning rate, above 0 and finite", "Leave it out for 0.0003.")] = 3e-4
    warmup: Annotated[float, Field(ge=0, le=1), Words(
        "a part of the updates, from 0 to 1", "Leave it out for 0.1.")] = 0.1
    target: Literal["labels", "model"] = "labels"
