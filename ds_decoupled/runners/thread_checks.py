"""What threads that share a model cannot do, told before any has started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deepspeed.pipe import PipelineModule

from ds_decoupled.errors import ConfigError
from ds_decoupled.optim import check_lock_free
from ds_decoupled.optim.sparse import sparse_layers
from ds_decoupled.replica_network import ReplicaNetwork
from ds_decoupled.schedules.asynchronous import OwnPace
from ds_decoupled.stages.worker import Worker
from ds_decoupled.watchers import Breakdown, Watcher


def check_threads(k: int, workers: Mapping[int, Worker], network: ReplicaNetwork, watchers: Sequence[Watcher],
                  pace: OwnPace) -> None:
    """Raises :class:`ConfigError` for what threads cannot do."""
    module = getattr(next(iter(workers.values())).stage.shared.additional_losses, "__self__", None)
    if isinstance(module, PipelineModule) and \
            type(module).get_additional_losses is not PipelineModule.get_additional_losses:
        raise ConfigError("get_additional_losses", type(module).__name__, "the module is asked for the losses of its last "
                          "forward pass, and threads are at several", 'Leave it out, or take "pace": "clock".')
    if any(isinstance(watcher, Breakdown) for watcher in watchers):
        raise ConfigError("wall_clock_breakdown", True, "several threads act at the same time, and one's seconds would be "
                          "those of others", "Leave it out; decoupled_summary() has the busy share of each thread.")
    if any(worker.stage.seeds.own is not None for worker in workers.values()):
        raise ConfigError("seed_layers", True, "threads draw from the same generators, and a seed that one sets another "
                          'overwrites', 'Leave it out, or take "pace": "clock".')
    if not pace.threads.locked:
        if k > 1:
            raise ConfigError("decoupled.threads.lock", "none", f"k = {k} gradients are added up between two "
                              "updates, and not by several threads at once", 'Take "gradient_accumulation_steps": 1, or '
                              '"lock": "layer".')
        for worker in workers.values():
            check_lock_free(worker.optimizer)
    _check_exchange(workers, network, pace)


def _check_exchange(workers: Mapping[int, Worker], network: ReplicaNetwork, pace: OwnPace) -> None:
    kind = pace.exchange.kind
    if network.count == 1:
        if pace.exchange.chosen:
            raise ConfigError("decoupled.exchange", kind, "there is one replica, which has no other to exchange anything with",
                              "Leave it out, or start more processes than the module has num_stages.")
        return
    for worker in workers.values():
        wrapped, basic = worker.optimizer.optimizer, worker.optimizer.basic_optimizer
        if wrapped is not None and wrapped is not basic:
            raise ConfigError("decoupled.exchange", kind, f"{type(wrapped).__name__} keeps float32 copies of the weights, and "
                              "what replicas exchange would not reach them", 'Train in float32 without ZeRO, or take "pace": '
                              '"clock".')
        if kind == "allreduce" and (sparse := sparse_layers(worker.stage.layers)):
            raise ConfigError("decoupled.exchange", kind, f"{sparse[0]}(sparse=True) has a gradient of other rows on every "
                              "replica", 'Leave sparse=True out, or take "gossip" or "average".')
