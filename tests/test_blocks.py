"""A pydantic error is told as a setting's: its name with dots, its value as it was written, the words that stand beside its
type."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, model_validator

from ds_decoupled.errors import ConfigError
from ds_decoupled.settings.blocks import STRICT, Words, read_model


class Delays(BaseModel):
    """As in a system to come: an object within an object."""

    model_config = STRICT

    mean: Annotated[float, Field(gt=0, allow_inf_nan=False), Words("a time above 0", "For example 1.")]
    seeds: Annotated[list[int], Field(min_length=1)] | None = None


class Replay(BaseModel):
    model_config = STRICT

    size: Annotated[int, Field(ge=1, le=9), Words("micro-batches kept, from 1 to 9", "Leave it out for 8.")] = 8
    order: Literal["newest", "oldest"] | Annotated[int, Field(ge=0)] = "newest"
    delays: Delays | None = None

    @model_validator(mode="after")
    def _together(self) -> Replay:
        if self.delays is not None and self.size == 9:
            raise ConfigError("decoupled.replay.size", self.size, "delays need room", "Take 8.")
        return self


@pytest.mark.parametrize(("given", "told"), [
    ({"size": 0}, '"decoupled.replay.size": 0 cannot be used: micro-batches kept, from 1 to 9. Leave it out for 8.'),
    ({"size": "8"}, "\"decoupled.replay.size\": '8' cannot be used: needed is a valid integer: micro-batches kept, from 1 to 9."
                    " In JSON, numbers, true and false stand without quotes."),
    ({"size": "auto"}, 'Hugging Face\'s Trainer alone'),
    ({"sise": 3}, '"decoupled.replay.sise": 3 cannot be used: there is no such setting; decoupled.replay takes delays, order, '
                  "size. Did you mean 'size'?"),
    ({"order": "newst"}, "\"decoupled.replay.order\": 'newst' cannot be used: allowed are 'newest', 'oldest'. "
                         "Did you mean 'newest'?"),
    ({"order": -1}, '"decoupled.replay.order": -1 cannot be used: needed is greater than or equal to 0. Give such a number'),
    ({"order": 1.5}, '"decoupled.replay.order": 1.5 cannot be used: needed is a string in quotes, one of \'newest\', \'oldest\''
                     " or a valid integer. In JSON"),
    ({"delays": {}}, '"decoupled.replay.delays.mean": None cannot be used: a time above 0. For example 1.'),
    ({"delays": {"mean": 0}}, '"decoupled.replay.delays.mean": 0 cannot be used: a time above 0. For example 1.'),
    ({"delays": {"mean": float("inf")}}, '"decoupled.replay.delays.mean": inf cannot be used: a time above 0'),
    ({"delays": {"mean": 1, "seed": 3}}, '"decoupled.replay.delays.seed": 3 cannot be used: there is no such setting'),
    ({"delays": {"mean": 1, "seeds": []}}, '"decoupled.replay.delays.seeds": [] cannot be used: List should have at least 1'),
    ({"delays": {"mean": 1, "seeds": [1, "2"]}}, "\"decoupled.replay.delays.seeds\": [1, '2'] cannot be used: needed is a"),
    ({"delays": 3}, '"decoupled.replay.delays": 3 cannot be used: needed is a valid dictionary'),
    ({"delays": {"mean": 1}, "size": 9}, '"decoupled.replay.size": 9 cannot be used: delays need room. Take 8.'),
])
def test_told(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_model(Replay, given, "decoupled.replay")
    assert told in str(error.value), error.value
    assert error.value.__cause__ is not None


def test_read() -> None:
    read = read_model(Replay, {"size": 3, "delays": {"mean": 2}}, "decoupled.replay")
    assert (read.size, read.order) == (3, "newest") and read.delays == Delays(mean=2.0)
