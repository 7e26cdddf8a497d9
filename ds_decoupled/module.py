"""A DeepSpeed ``PipelineModule`` whose layers are cut into J stages on P ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn

from ds_decoupled.collectives import agreed, from_rank
from ds_decoupled.compat import PipelineModuleBase, layer_parameters, layer_specs
from ds_decoupled.config import BLOCK, DecoupledConfig, block_of, check_bounds, read_json
from ds_decoupled.errors import ConfigError
from ds_decoupled.nn.blocks import block_starts
from ds_decoupled.profile import HeadMaker, layer_times
from ds_decoupled.schedules import Placement, balanced_bounds, uniform_bounds
from ds_decoupled.settings.check import check_settings, comparable
from ds_decoupled.settings.reading import Source
from ds_decoupled.settings.unsupported import check_checkpoint_interval
from ds_decoupled.shared_memory import release_names
from ds_decoupled.stages.heads import WholeModel, make_head, own_layers
from ds_decoupled.stages.randomness import mix, seeded
from ds_decoupled.tensors import Form, Tensors

#: What the head of a stage weighs, from the stage's number, J, and the layer that the stage ends before; as layers do.
HeadWeight = Callable[[int, int, int], float]

#: PipelineModule's own default.
_DEEPSPEED_SEED = 1234


class SeededLayerSpec(LayerSpec):
    """A ``LayerSpec`` whose parameters depend on the seed and the layer's index alone, wherever and whenever it is built."""

    def __init__(self, spec: LayerSpec, seed: int) -> None:
        super().__init__(spec.typename, *spec.module_args, **spec.module_kwargs)
        self.seed = seed

    def build(self, log: bool = False) -> nn.Module:
        with seeded(self.seed):
            return super().build(log)


class SeededTiedLayerSpec(TiedLayerSpec):
    """The same for a ``TiedLayerSpec``; its seed is that of the key, because the layer is shared."""

    def __init__(self, spec: TiedLayerSpec, seed: int) -> None:
        super().__init__(spec.key, spec.typename, *spec.module_args, forward_fn=spec.forward_fn,
                         tied_weight_attr=spec.tied_weight_attr, **spec.module_kwargs)
        self.seed = seed

    def build(self, log: bool = False) -> nn.Module:
        with seeded(self.seed):
            return super().build(log)


def _with_seed(layer: Any, index: int, base_seed: int) -> Any:
    if isinstance(layer, TiedLayerSpec):
        return SeededTiedLayerSpec(layer, mix(base_seed, *layer.key.encode()))
    if isinstance(layer, LayerSpec):
        return SeededLayerSpec(layer, mix(base_seed, index))
    return layer


def _read(config: Source | None, arguments: dict[str, Any]) -> tuple[DecoupledConfig, dict[str, Any]]:
    """The block of ``config``, checked, and what must be the same on every rank."""
    settings = {} if config is None else read_json(config)
    block = block_of(settings)
    given = block or DecoupledConfig(method="backprop")
    decoupled = not given.is_plain_backprop
    if config is not None:
        check_settings(settings, decoupled)
    if decoupled:
        check_checkpoint_interval(arguments["activation_checkpoint_interval"])
    ranks, world = arguments["num_stages"], torch.distributed.get_world_size()
    if ranks is not None and (isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1 or world % ranks):
        raise ConfigError("num_stages", ranks, "the number of pipe ranks (P) divides the number of processes, which is "
                          f"{world}",
                          "Leave it out for one pipe rank a process.")
    return given, arguments | comparable(settings, block)


class DecoupledPipelineModule(PipelineModuleBase):
    """A ``PipelineModule`` with stages smaller than ranks.

    >>> model = DecoupledPipelineModule(layers, config="ds_configs/petra.json", loss_fn=loss)     # doctest: +SKIP

    Args:
        layers: as for ``PipelineModule``: ``LayerSpec``s, modules or functions; each takes and returns a tensor or a
            tuple of tensors. Layers from a ``LayerSpec`` get the same initial weights for every number of ranks.
        num_stages: P, the ranks of the pipe axis (DeepSpeed's name); by default the world size.
        config: the DeepSpeed configuration (a path, a dictionary, or what else DeepSpeed takes); its ``decoupled`` block says
            ``stages`` and ``partition``.
        stages: overrides the block's ``stages``.
        partition: overrides the block's ``partition``; ``partition_method`` is its name in DeepSpeed and works too.
        sample_input: an input of the first layer, needed by ``"partition": "profile"``.
        base_seed: seed of the layers' weights and of dropout; by default drawn from torch's generator on the first rank, so
            that ``torch.manual_seed`` decides.
        seed_layers: seed layers in DeepSpeed's way, with ``seed_fn(number)`` if there is one: before a layer is built with
            ``base_seed`` (1234 if not given) plus its index, and before it runs.
        **kwargs: as for ``PipelineModule`` (``loss_fn``, ``topology``, ...).

    Raises:
        ConfigError: if J is below P or above the number of layers, or bounds do not fit the layers.
    """

    def __init__(self, layers: Sequence[Any], num_stages: int | None = None, *, topology: Any = None,
                 config: Source | None = None, stages: int | str | list[int] | None = None,
                 partition: str | list[int] | None = None, partition_method: str | None = None, sample_input: Any = None,
                 base_seed: int | None = None, seed_layers: bool = False, loss_fn: Callable[..., Any] | None = None,
                 **kwargs: Any) -> None:
        import deepspeed

        deepspeed.init_distributed()
        release_names()
        layers = list(layers)
        given = agreed(partial(_read, config, {
            "layers": len(layers), "num_stages": num_stages, "stages": stages, "partition": partition or partition_method,
            "base_seed": base_seed, "activation_checkpoint_interval": kwargs.get("activation_checkpoint_interval", 0)}),
            "configuration and arguments of DecoupledPipelineModule")
        self._starts = block_starts(layers)
        self._stages_setting = stages if stages is not None else given.stages
        self._partition_setting = partition or partition_method or given.partition
        self.sample_input = sample_input
        axes = given.axes()
        self._recover, self._window, self._head = axes.recover, axes.window, given.head
        self._farthest = given.losses == "farthest"
        self.placement: Placement
        if seed_layers:
            base_seed = _DEEPSPEED_SEED if base_seed is None else base_seed
            specs = layers
        else:
            if base_seed is None:
                base_seed = from_rank(0, int(torch.randint(1 << 62, ()).item()))
            specs = [_with_seed(layer, i, base_seed) for i, layer in enumerate(layers)]
        if topology is None and num_stages is None:
            num_stages = torch.distributed.get_world_size()
        super().__init__(specs, num_stages=num_stages, topology=topology, loss_fn=loss_fn, base_seed=base_seed,
                         seed_layers=seed_layers, partition_method="uniform", **kwargs)

    def rank_layer_bounds(self) -> list[int]:
        """Cut the layers into stages, spread the stages over the ranks."""
        weights, last = self._layer_weights()
        heads = self._head_weights(weights)
        if isinstance(self._partition_setting, list):
            parts = check_partition(self._partition_setting, self.num_stages, len(weights))
            self.placement = place_within(parts, self._stages_setting, weights, self._starts)
        else:
            stage_bounds = stage_bounds_of(self._stages_setting, self.num_stages, weights, self._starts, last, heads)
            self.placement = place(stage_bounds, self.num_stages, weights, last, heads)
        return self.placement.rank_layer_bounds

    def _layer_weights(self) -> tuple[list[float], list[float]]:
        """What each layer weighs in the partition, and what it weighs in the last stage."""
        method = self._partition_setting
        if method == "uniform" or isinstance(method, list):
            return ([1.0] * len(layer_specs(self)),) * 2
        if method == "parameters":
            if self.num_stages == 1 and not isinstance(self._stages_setting, int):  # there is nothing to balance
                return ([1.0] * len(layer_specs(self)),) * 2
            return (layer_parameters(self),) * 2
        if method == "profile":
            if self.sample_input is None:
                raise ConfigError(f"{BLOCK}.partition", "profile", "times the layers on a sample input",
                                  "Give DecoupledPipelineModule a sample_input: one micro-batch of inputs.")
            times = layer_times(layer_specs(self), self.sample_input, *self._heads())
            # The last stage goes forward and back at once and runs nothing again.
            return [t.cost(self._recover != "graph") for t in times], [t.cost(False) for t in times]
        raise ConfigError(f"{BLOCK}.partition", method, "allowed are 'parameters', 'uniform', 'profile' or a list of bounds",
                          "Leave it out for 'parameters'.")

    def _head_weights(self, weights: Sequence[float]) -> HeadWeight | None:
        """What heads weigh that are made of the model's layers; other ones are small."""
        measured = self._partition_setting == "profile" and self._heads()[1]
        if not self._window or measured:
            return None

        def weight(stage: int, stages: int, end: int) -> float:
            above = weights[end:-1]
            own = own_layers(self._head, stage, stages, len(above))
            if own is None or self._farthest and stage < min(self._window, stages) - 1:
                return 0.0
            return min(own.count, len(above)) * sum(above) / max(1, len(above)) + weights[-1]

        return weight

    def _heads(self) -> tuple[HeadMaker | None, list[int]]:
        """How the stages' heads are built, and the ends of stages that have one and are known before the layers are cut."""
        setting = self._starts if self._stages_setting == "blocks" else self._stages_setting
        if not self._window or not isinstance(setting, list):
            return None, []
        device = torch.device(get_accelerator().current_device_name())

        layers = layer_specs(self)
        ends = [start for start in setting if 0 < start < len(layers)]

        def make(stage: int, given: Tensors, outputs: int, forms: Sequence[Form]) -> nn.Module:
            model = WholeModel(layers, [0, *ends, len(layers)], forms)
            return make_head(self._head, given, outputs, 0, stage, None, device, model)

        return make, ends


def stage_bounds_of(setting: int | str | list[int], ranks: int, weights: Sequence[float], starts: list[int],
                    last: Sequence[float] | None = None, heads: HeadWeight | None = None) -> list[int]:
    """Layer indices at which stages begin, and the number of layers.

    Args:
        setting: the ``stages`` setting.
        ranks: P.
        weights: one per layer.
        starts: the layers that begin a block, where the model marks them.
        last: what the layers weigh in the last stage, if not the same.
        heads: what a stage's head weighs.
    """
    name, layers = f"{BLOCK}.stages", len(weights)
    if isinstance(setting, list):
        if setting[-1] != layers:
            raise ConfigError(name, setting, f"the last bound is the number of layers, {layers}", f"Let it end with {layers}.")
        bounds = setting
    elif setting == "blocks":
        if not starts:
            raise ConfigError(name, setting, "this model marks no blocks",
                              "Mark first layers with ds_decoupled.nn.mark_block, or give a number of stages.")
        bounds = [*starts, layers]
    else:
        count = ranks if setting == "ranks" else int(setting)
        if count > layers:
            raise ConfigError(name, setting, f"{count} stages need as many layers, the model has {layers}",
                              f'Take at most {layers}, or "blocks".')
        bounds = _cut(weights, count, last, None if heads is None else lambda stage, end: heads(stage, count, end))
    if len(bounds) - 1 < ranks:
        raise ConfigError(name, setting, f"{len(bounds) - 1} stages (J) cannot fill {ranks} pipe ranks (P): J >= P",
                          "Take more stages or fewer ranks.")
    return bounds


def place(stage_bounds: list[int], ranks: int, weights: Sequence[float], last: Sequence[float] | None = None,
          heads: HeadWeight | None = None) -> Placement:
    """Stages on ranks, balanced by weight."""
    stages = len(stage_bounds) - 1
    stage_weights = [sum(weights[a:b]) + (0.0 if heads is None else heads(s, stages, b))
                     for s, (a, b) in enumerate(zip(stage_bounds, stage_bounds[1:]))]
    stage_weights[-1] = sum((last or weights)[stage_bounds[-2]:])
    return Placement(tuple(stage_bounds), tuple(_cut(stage_weights, ranks)))


def check_partition(partition: list[int], ranks: int, layers: int) -> list[int]:
    """The user's list of the layers at which ranks begin. Raises :class:`ConfigError` if it does not fit."""
    check_bounds(f"{BLOCK}.partition", partition)
    if len(partition) != ranks + 1 or partition[-1] != layers:
        raise ConfigError(f"{BLOCK}.partition", partition, f"{ranks} ranks need {ranks + 1} bounds, the last of them "
                          f"the number of layers, {layers}", 'Leave it out to balance them by their parameters.')
    return partition


def place_within(parts: list[int], setting: int | str | list[int], weights: Sequence[float], starts: list[int]) -> Placement:
    """Stages on ranks that begin at the layers ``parts``: each rank's run is one stage, or is cut further.

    Args:
        parts: P+1 layer indices.
        setting, weights, starts: as for :func:`stage_bounds_of`.
    """
    ranks = len(parts) - 1
    if setting == "ranks":
        return Placement(tuple(parts), tuple(range(ranks + 1)))
    bounds = stage_bounds_of(setting, ranks, weights, starts)
    if isinstance(setting, int):  # in proportion to the runs' layers
        shares = [max(1, round(setting * (b - a) / parts[-1])) for a, b in zip(parts, parts[1:])]
        while sum(shares) != setting:
            step = 1 if sum(shares) < setting else -1
            room = [(b - a - share if step > 0 else share - 1) for a, b, share in zip(parts, parts[1:], shares)]
            shares[room.index(max(room))] += step
        bounds = [0]
        for start, stop, share in zip(parts, parts[1:], shares):
            bounds += [start + cut for cut in _cut(weights[start:stop], share)[1:]]
    missing = [b for b in parts if b not in bounds]
    if missing:
        raise ConfigError(f"{BLOCK}.partition", parts, f"ranks begin where stages begin; no stage begins at {missing}",
                          f"Stages begin at {bounds[:-1]}.")
    return Placement(tuple(bounds), tuple(bounds.index(b) for b in parts))


def _cut(weights: Sequence[float], parts: int, last: Sequence[float] | None = None,
         beside: Callable[[int, int], float] | None = None) -> list[int]:
    return balanced_bounds(weights, parts, last, beside) if any(weights) else uniform_bounds(len(weights), parts)


def tied_keys(module: PipelineModule) -> list[str]:
    """Keys of tied layers that appear more than once."""
    keys = [spec.key for spec in layer_specs(module) if isinstance(spec, TiedLayerSpec)]
    return sorted({key for key in keys if keys.count(key) > 1})


def placement_of(module: PipelineModule, setting: int | str | list[int], weights: Sequence[float]) -> Placement:
    """The placement of any ``PipelineModule``; a plain one keeps its rank boundaries and is cut further within them.

    Raises:
        ConfigError: if the stages asked for do not fit the module's rank boundaries.
    """
    if isinstance(module, DecoupledPipelineModule):
        asked = module.placement.stages
        expected = len(stage_bounds_of(setting, module.num_stages, [1.0] * len(layer_specs(module)), module._starts)) - 1
        if module._stages_setting == setting or asked == expected:
            return module.placement
        if module.num_stages > 1:
            raise ConfigError(f"{BLOCK}.stages", setting, f"the module was built with stages={module._stages_setting!r}",
                              "Pass the same configuration to DecoupledPipelineModule(config=...).")
        starts = module._starts
    else:
        starts = block_starts(layer_specs(module))
    return place_within(list(module.parts), setting, weights, starts)
