"""The user's own optimizer instance, where a rank holds several stages.

One optimizer cannot step stage by stage, so every stage gets a twin: the same class and options, the same groups with the
stage's parameters alone. The instance stays in the user's hands as the face of them: what the user, or a scheduler that the
user steps, writes into its groups holds for every stage from its next update on; and its groups show the topmost stage's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ds_decoupled.errors import ConfigError
from ds_decoupled.optim.groups import Group, GroupsView, own_value, same_value, settings_of, write


def twin(optimizer: Optimizer, groups: list[Group]) -> Optimizer:
    """An optimizer of the same class with the same options, of other groups. What it knows of their parameters it keeps.

    Made without its constructor: not every option is among the defaults, nor every default among the arguments.

    Raises:
        ConfigError: if it keeps parameters anywhere else than in its groups.
    """
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, value in vars(optimizer).items():
        inside = value if isinstance(value, (list, tuple, set)) else value.values() if isinstance(value, dict) else [value]
        if name not in ("param_groups", "state") and any(id(item) in known for item in inside):
            raise ConfigError("optimizer", type(optimizer).__name__, f"it keeps parameters in its {name!r} beside its groups, "
                              "and cannot be cut into stages", "Pass a callable that makes one from a stage's parameters.")
    made: Optimizer = object.__new__(type(optimizer))
    made.__dict__.update({name: value.copy() if isinstance(value, dict) else value for name, value in vars(optimizer).items()
                          if name != "step"})  # a scheduler wraps step
    made.param_groups = groups
    made.state = defaultdict(dict, {p: optimizer.state[p] for group in groups for p in group["params"]
                                    if p in optimizer.state})
    return made


class ClientOptimizer:
    """The instance and its twins on one rank.

    Args:
        optimizer: the instance.
        wanted: by stage, the trainable parameters of its layers, and those of its head, which join the instance's groups:
            matrices one that decays most, biases and norms one that decays least.

    Raises:
        ConfigError: if the instance cannot be cut into stages.
    """

    def __init__(self, optimizer: Optimizer, wanted: dict[int, tuple[Sequence[nn.Parameter], Sequence[nn.Parameter]]]) -> None:
        self.optimizer = optimizer
        shares = {stage: self._share(layers, head) for stage, (layers, head) in wanted.items()}
        shares = {stage: share for stage, share in shares.items() if any(share)}
        self.basic: dict[int, Optimizer] = {}
        self._positions: dict[int, list[int | None]] = {}
        self.views: dict[int, GroupsView] = {}
        # With a single stage and no empty group, which DeepSpeed would take away, the instance itself steps, as in DeepSpeed.
        self.direct = len(shares) == 1 and all(next(iter(shares.values())))
        for stage, share in shares.items():
            if self.direct:
                for group, parameters in zip(optimizer.param_groups, share):
                    group["params"] = parameters
                self.basic[stage] = optimizer
            else:
                self.basic[stage] = twin(optimizer, [{**settings_of(group), "params": parameters} for group, parameters
                                                     in zip(optimizer.param_groups, share) if parameters])
            numbers = iter(range(len(share)))
            self._positions[stage] = [next(numbers) if parameters else None for parameters in share]
        # torch's schedulers warn where they are stepped before the optimizer, as is right while the pipeline fills.
        optimizer._opt_called = True  # type: ignore[attr-defined]
        self._see()

    def _share(self, layers: Sequence[nn.Parameter], head: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        """A stage's parameters by group."""
        ids, groups = {id(p) for p in layers}, self.optimizer.param_groups
        share = [[p for p in group["params"] if id(p) in ids] for group in groups]
        # DeepSpeed's Muon keeps matrices that it orthogonalizes in groups of their own; a head's are not among them.
        possible = [i for i, group in enumerate(groups) if not group.get("use_muon")] or list(range(len(groups)))
        decays = [float(group.get("weight_decay", 0.0)) for group in groups]
        for parameter in head:
            choose = max if parameter.ndim > 1 else min
            share[choose(possible, key=decays.__getitem__)].append(parameter)
        return share

    def built(self, stage: int, basic: Any) -> None:
        """DeepSpeed has made the stage's optimizer of its twin."""
        self.basic[stage] = basic
        self.views[stage] = GroupsView(basic, self._positions[stage], self.optimizer.param_groups, self.optimizer.defaults)

    def view(self, stage: int) -> GroupsView:
        """All of the instance's groups, as the stage sees them."""
        return self.views[stage]

    # -- the instance as a face -------------------------------------------------------------------------------------------

    def _see(self) -> None:
        self._seen = [settings_of(group) for group in self.optimizer.param_groups]

    def check(self) -> None:
        """Raises RuntimeError if groups were added, which no stage would step."""
        if len(self.optimizer.param_groups) != len(self._seen):
            raise RuntimeError("the optimizer was given another group of parameters after initialize; stages step only what "
                               "they had then. Give all groups before, with requires_grad as it is to be.")

    def push(self) -> None:
        """What was written into the instance's groups since the last look holds for every stage."""
        if self.direct:
            return
        for i, (group, seen) in enumerate(zip(self.optimizer.param_groups, self._seen)):
            changed = {key: value for key, value in group.items()
                       if key != "params" and not (key in seen and same_value(seen[key], value))}
            if changed:
                for view in self.views.values():
                    write(view.param_groups[i], changed)
                seen.update({key: own_value(value) for key, value in changed.items()})

    def reflect(self) -> None:
        """The instance's groups show what the topmost stage's do."""
        if self.direct or not self.views:
            return
        for group, shown in zip(self.optimizer.param_groups, self.views[max(self.views)].param_groups):
            write(group, settings_of(shown))
        self._see()
