"""How stages' inputs are generated, and what a stage learns from: the object ``auxnet`` of the ``decoupled`` block.

The equations are those of :mod:`ds_decoupled.nn.auxiliary_terms`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationInfo, field_validator

from ds_decoupled.axes import Kappa
from ds_decoupled.errors import ConfigError
from ds_decoupled.settings.blocks import STRICT, Words
from ds_decoupled.settings.table import BLOCK

MOST_SWEEPS = 1_000
MOST_BLOCKS = 1_000
MOST_BATCHES = 10_000

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def auxnet_object(value: Any) -> Any:
    """What is an object, or not one at all."""
    if not isinstance(value, Mapping | BaseModel):
        raise ValueError('an object is needed, such as {"fit": 10.0, "pull": 0.03}')
    return value


class GrowthSettings(BaseModel):
    """A schedule of both betas: they grow geometrically, and stay.

    Attributes:
        factor: by which they have grown in the end; below 1 they shrink.
        updates: of a stage until then.
    """

    model_config = STRICT

    factor: Annotated[Positive, Words("a factor, above 0 and finite", "10 is for ten times the betas in the end.")]
    updates: Annotated[int, Field(ge=1), Words("a number of updates, at least 1", "For example half of all updates.")]


class AuxNetSettings(BaseModel):
    """Layer-parallel training (arXiv 2112.05387), see :mod:`ds_decoupled.stages.auxiliary`.

    Attributes:
        fit: beta of a stage's own gradient: how hard its output is drawn to the next stage's generated input.
        pull: beta of what the AuxNet is to reproduce: how hard its output is drawn to the stage's.
        eta: length of the step from a generated input to what it should have been, in units of ``1 / c_pull``.
        sweeps: of a micro-batch over all stages; the loss is heard ``sweeps - 1`` stages below the last.
        kappa: where multipliers come from: ``zero``, ``kept`` over the sweeps of a micro-batch, or ``predicted`` by a small
            network from the stage's output; null is the preset's.
        growth: a schedule of both betas.
        trust: the most that a sample's input may be moved, in units of the output's root mean square; null for any.
        net: of the user's own, ``"module:callable"`` (:func:`ds_decoupled.nn.auxnet.build_step`).
        share: of the model's multiply-adds that all steps of the AuxNet may have, each by what its stage costs; what predicts
            multipliers may have half as many again.
        width: inner channels of a step, as a part of what it gives; null is as many as ``share`` allows.
        blocks: residual blocks of a step.
        lr: of the AuxNet's Adam; it follows the stage's own schedule.
        serial_from: updates of a stage after which the serial network is trained by backpropagation (1F1B), without any of
            this; null for never.
        norm_batches: micro-batches of training that batch norm's statistics are estimated from anew before an evaluation, on
            the serial network's own activations; 0 for never.
    """

    model_config = STRICT

    fit: Annotated[Positive, Words("beta of a stage's own gradient, above 0 and finite", "Leave it out for 10.")] = 10.0
    pull: Annotated[Positive, Words(
        "beta of what the AuxNet is to reproduce, above 0 and finite", "Leave it out for 0.03.")] = 0.03
    eta: Annotated[Positive, Words("the length of a step, above 0 and finite", "Leave it out for 1.")] = 1.0
    sweeps: Annotated[int, Field(ge=1, le=MOST_SWEEPS), Words(
        f"sweeps of a micro-batch, from 1 to {MOST_SWEEPS}", "Leave it out for 1; as many as there are stages hear the loss "
        "everywhere.")] = 1
    kappa: Annotated[Kappa | None, Words(hint="Leave it out for the preset's.")] = None
    growth: Annotated[GrowthSettings | None, Words(
        'an object such as {"factor": 10, "updates": 1000}, or null', "Leave it out for betas that stay.")] = None
    trust: Annotated[Positive | None, Words(
        "above 0 and finite, or null for any step", "Leave it out for none.")] = None
    net: Annotated[str | None, Words(
        'a callable of your own, "module:callable", or null', "Leave it out for small residual blocks.")] = None
    share: Annotated[float, Field(gt=0, le=1), Words(
        "a part of the model's multiply-adds, above 0 and at most 1", "Leave it out for 0.1.")] = 0.1
    width: Annotated[float | None, Field(gt=0, le=1), Words(
        "a part of the channels that the step gives, above 0 and at most 1, or null for what the share allows",
        "Leave it out, and set the share.")] = None
    blocks: Annotated[int, Field(ge=1, le=MOST_BLOCKS), Words(
        f"residual blocks of a step, from 1 to {MOST_BLOCKS}", "Leave it out for 1.")] = 1
    lr: Annotated[Positive, Words("a learning rate, above 0 and finite", "Leave it out for 0.003.")] = 3e-3
    serial_from: Annotated[int | None, Field(ge=0), Words(
        "a number of updates, from 0, or null for never", "Leave it out to generate inputs to the end.")] = None
    norm_batches: Annotated[int, Field(ge=0, le=MOST_BATCHES), Words(
        f"a number of micro-batches, from 0 to {MOST_BATCHES}", "Leave it out for 10.")] = 10

    @field_validator("net", mode="after")
    @classmethod
    def _is_a_path(cls, value: str | None) -> str | None:
        if value is not None and not all(value.partition(":")):
            raise ConfigError(BLOCK, value, 'a callable of your own is named "module:callable"',
                              "Leave it out for small residual blocks.")
        return value

    @field_validator("width", mode="after")
    @classmethod
    def _instead_of_share(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("share", 0.1) != 0.1:
            raise ConfigError(BLOCK, value, '"share" is there too, and says how wide a step is', "Leave one of the two out.")
        return value

    @field_validator("width", "blocks", mode="after")
    @classmethod
    def _of_our_own(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("net") is not None and value not in (None, 1):
            raise ConfigError(BLOCK, value, '"net" makes the AuxNet, and asks for nothing', "Leave one of the two out.")
        return value


def check_auxnet(settings: AuxNetSettings, kappa: Kappa) -> None:
    """Sweeps and multipliers fit together.

    Args:
        settings: the object.
        kappa: where multipliers come from, by the object or the preset.

    Raises:
        ConfigError: for sweeps in which nothing moves, or multipliers that nobody would see.
    """
    if kappa == "kept" and settings.sweeps == 1:
        raise ConfigError(f"{BLOCK}.auxnet.kappa", kappa, "multipliers that are kept over the sweeps of a micro-batch begin "
                          "with zero, and there is one sweep", 'Set "sweeps" to 2 or more, or take "predicted".')
    if kappa == "predicted" and settings.sweeps > 1:
        raise ConfigError(f"{BLOCK}.auxnet.sweeps", settings.sweeps, "multipliers that are predicted are the same in every "
                          'sweep: with "kappa": "predicted" there is one', 'Leave it out, or take "kappa": "kept".')
