"""How values travel: the objects ``codec`` and ``vq`` of the ``decoupled`` block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Field, ValidationInfo, field_validator

from ds_decoupled.errors import ConfigError
from ds_decoupled.settings.blocks import STRICT, Words
from ds_decoupled.settings.kinds import check_choice
from ds_decoupled.settings.table import BLOCK

MOST_GROUP = 65_536
MOST_CODES = 65_536
MOST_LEVELS = 64

ScalarName = Literal["none", "bf16", "fp8", "int8", "int4", "int4-rotated"]
CodecName = Literal["none", "bf16", "fp8", "int8", "int4", "int4-rotated", "vq"]
CODEC_NAMES: tuple[str, ...] = get_args(CodecName)


def _of_gradients(value: Any) -> Any:
    if value == "vq":
        allowed = ", ".join(map(repr, get_args(ScalarName)))
        raise ConfigError(BLOCK, value, "gradients travel by a codec that keeps their mean, and a codebook does not: allowed "
                          f"are {allowed}", 'Take {"forward": "vq"}, with one of these "backward".')
    return value


def both_ways(value: Any) -> Any:
    """A codec's name is that of both directions."""
    if isinstance(value, str):
        check_choice(BLOCK, value, CODEC_NAMES)
        return {"forward": value, "backward": _of_gradients(value)}
    if not isinstance(value, Mapping | BaseModel):
        raise ValueError('a name in quotes is needed, or an object such as {"forward": "int8", "backward": "bf16"}')
    return value


def vectors(value: Any) -> Any:
    """What is an object, or not one at all."""
    if not isinstance(value, Mapping | BaseModel):
        raise ValueError('an object is needed, such as {"group": 4, "codebook": 256}')
    return value


class CodecSettings(BaseModel):
    """How floating-point payloads travel, see :mod:`ds_decoupled.links.table`.

    Attributes:
        forward: activations, and reconstructions on their way down.
        backward: gradients.
        every_link: whether values between stages of one rank go through the codecs too, so that the numbers are those of any
            number of ranks.
    """

    model_config = STRICT

    forward: CodecName = "none"
    backward: Annotated[ScalarName, BeforeValidator(_of_gradients)] = "none"
    every_link: bool = False

    @field_validator("every_link", mode="after")
    @classmethod
    def _of_codecs(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("forward") == info.data.get("backward") == "none":
            raise ConfigError(BLOCK, value, 'there is no codec: "forward" and "backward" are "none"', "Leave it out.")
        return value


class VectorSettings(BaseModel):
    """Vector quantization, see :mod:`ds_decoupled.links.vector` and :mod:`ds_decoupled.nn.quantize`.

    Attributes:
        group: D, the channels that make a vector.
        codebook: K, the vectors of each group's codebook; an index has log2 K bits.
        levels: L: each further level quantizes what those before it have left.
        decay: of the averages that codes are made of, from micro-batch to micro-batch.
        every: micro-batches after which the codebooks are sent again.
        moved: they are sent before that if they have moved by more than this part of their length.
        revive: whether codes that serve almost nothing start again as a vector of the micro-batch.
    """

    model_config = STRICT

    group: Annotated[int, Field(ge=1, le=MOST_GROUP), Words(
        f"channels of a vector, from 1 to {MOST_GROUP}: a divisor of the channels of what is sent", "Leave it out for 8.")] = 8
    codebook: Annotated[int, Field(ge=2, le=MOST_CODES), Words(
        f"vectors of a codebook, from 2 to {MOST_CODES}", "A power of two fills its bits; leave it out for 256.")] = 256
    levels: Annotated[int, Field(ge=1, le=MOST_LEVELS), Words(
        f"levels, from 1 (plain) to {MOST_LEVELS}: each takes an index of its own", "Leave it out for 1.")] = 1
    decay: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False), Words(
        "above 0 and below 1: the part of the averages that a micro-batch leaves as it was", "Leave it out for 0.99.")] = 0.99
    every: Annotated[int, Field(ge=1), Words("micro-batches, at least 1", "Leave it out for 50.")] = 50
    moved: Annotated[float, Field(ge=0, allow_inf_nan=False), Words(
        "a part of the codebooks' length, at least 0", "Leave it out for 0.1.")] = 0.1
    revive: bool = True
