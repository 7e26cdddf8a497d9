"""Replicas of a model whose threads run free: what they exchange, made from the settings and tied to threads and optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from ds_decoupled.links import Message
from ds_decoupled.links.allreduce import AllReduce
from ds_decoupled.links.exchange import Exchange, Pairwise
from ds_decoupled.replica_network import ReplicaNetwork
from ds_decoupled.schedules.layerwise import Exchanged
from ds_decoupled.stages.threaded import ThreadedStage
from ds_decoupled.stages.worker import Worker


def exchange_of(chosen: Exchanged, network: ReplicaNetwork, stages: Mapping[int, ThreadedStage],
                turn: Callable[[int], AbstractContextManager[Any]], use: Callable[[int, int | None, Any], None],
                fail: Callable[[BaseException], None]) -> Exchange | None:
    """What replicas exchange; None where there is one.

    Args:
        chosen: by the settings.
        network: the links.
        stages: of this rank.
        turn, use, fail: see :class:`~ds_decoupled.links.exchange.Exchange`, :class:`~ds_decoupled.links.allreduce.AllReduce`.
    """
    if network.count == 1:
        return None
    shared = network, {s: stage.trainable for s, stage in stages.items()}, turn
    if chosen.kind == "allreduce":
        return AllReduce(*shared, use=use, failed=fail)
    return Pairwise(*shared, every=chosen.every, whole=chosen.kind == "average")


def begin(exchange: Exchange, network: ReplicaNetwork, workers: Mapping[int, Worker],
          fail: Callable[[BaseException], None]) -> None:
    """From now on other replicas are heard, and no optimizer averages gradients over them by itself."""
    for worker in workers.values():
        worker.optimizer.of.average = exchange.average if isinstance(exchange, AllReduce) else lambda parameters: None

    def deliver(replica: int, message: Message) -> None:
        try:
            exchange.deliver(replica, message)
        except Exception as error:
            fail(error)
            with network.changed:
                network.changed.notify_all()

    for worker in workers.values():
        if isinstance(worker.stage, ThreadedStage):
            worker.stage.drifts = exchange.drifts
    network.begin(deliver)
