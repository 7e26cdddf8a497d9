"""What can be checked of the ``decoupled`` block only once the layers are cut: settings that count stages."""

from __future__ import annotations

from operator import attrgetter

from ds_decoupled.config import BLOCK, AuxNetSettings, DecoupledConfig
from ds_decoupled.errors import ConfigError
from ds_decoupled.nn.heads import shared_blocks
from ds_decoupled.schedules import Placement


def check_local(config: DecoupledConfig, placement: Placement) -> None:
    """What can be checked only once J is known.

    Raises:
        ConfigError: for a window of more stages than there are, or lists of another length.
    """
    axes, stages = config.axes(), placement.stages
    if axes.window > stages:
        raise ConfigError(f"{BLOCK}.window", axes.window, f"at most the number of stages, which is {stages}",
                          "Take a smaller window or more stages.")
    for name in ("stage_lr", "stage_schedulers", "stop_after", "slow_down", "clock.durations", "pass_times.forward",
                 "pass_times.backward"):
        value = attrgetter(name)(config)
        if value is not None and len(value) != stages:
            raise ConfigError(f"{BLOCK}.{name}", value, f"one value for each of the {stages} stages",
                              f"Give a list of {stages}, or leave it out.")
    if config.head_teaching is not None and (axes.window if config.losses == "farthest" else 1) >= stages:
        given = config.head_teaching.model_dump(exclude_defaults=True)
        raise ConfigError(f"{BLOCK}.head_teaching", given, "no stage has a head: all learn from the last one's loss",
                          "Take more stages, or leave it out.")
    if axes.layerwise and placement.ranks > 1:
        raise ConfigError(f"{BLOCK}.update", axes.update, "forward and backward threads share the whole model, and here it "
                          f"lies on {placement.ranks} pipe ranks", 'Build the module with num_stages=1, or take "method": '
                          '"delayed", where each stage steps after its own backward pass.')
    auxnet = config.auxnet
    if axes.input == "auxnet" and stages == 1 and auxnet != AuxNetSettings():
        raise ConfigError(f"{BLOCK}.auxnet", auxnet.model_dump(exclude_defaults=True), "there is one stage, whose input "
                          "is the data", "Take more stages, or leave it out: one stage is plain training.")
    if axes.input == "auxnet" and auxnet.sweeps > stages:
        raise ConfigError(f"{BLOCK}.auxnet.sweeps", auxnet.sweeps, f"at most the number of stages, which is {stages}: by then "
                          "the loss has been heard everywhere", "Take fewer sweeps, or more stages.")
    if axes.window and shared_blocks(config.head) is not None and axes.hops[0]:
        raise ConfigError(f"{BLOCK}.head", config.head, "a shared head is refreshed when all stages are at the same "
                          f"micro-batch, and with hops {list(axes.hops)} they never are", 'Leave "hops" out.')
