"""Teaching heads before stages may learn from them: the object ``head_teaching`` of the ``decoupled`` block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field

from ds_decoupled.settings.blocks import STRICT, Words

MOST_UPDATES = 1_000_000


def teaching_object(value: Any) -> Any:
    """What is an object, or null, or not one at all."""
    if value is not None and not isinstance(value, Mapping | BaseModel):
        raise ValueError('an object is needed, such as {"updates": 15}')
    return value


class TeachingSettings(BaseModel):
    """How heads are taught, see :mod:`ds_decoupled.stages.lesson`.

    Attributes:
        updates: the first so many, in which heads are taught, and stages that learn from heads hold still.
        lr: the peak of the heads' rate meanwhile, which does not depend on their stages'.
        warmup: the part of these updates over which the rate rises; then it falls by a cosine to 0.
    """

    model_config = STRICT

    updates: Annotated[int, Field(ge=1, le=MOST_UPDATES), Words(
        f"a number of updates, from 1 to {MOST_UPDATES}", "Leave it out for 15.")] = 15
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False), Words(
        "a learning rate, above 0 and finite", "Leave it out for 0.0003.")] = 3e-4
    warmup: Annotated[float, Field(ge=0, le=1), Words(
        "a part of the updates, from 0 to 1", "Leave it out for 0.1.")] = 0.1
