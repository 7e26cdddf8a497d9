"""What a run did, over all ranks: everybody reports, and nobody is asked what class he is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ds_decoupled.collectives import gather
from ds_decoupled.network import Network
from ds_decoupled.schedules import Placement, Plan
from ds_decoupled.stages.worker import Worker
from ds_decoupled.watchers import Watcher


def summarize(method: str, plan: Plan, hops: tuple[int, int], flush: bool, workers: Mapping[int, Worker], network: Network,
              watchers: Sequence[Watcher], bytes_beside: int, beside: Mapping[str, Any]) -> dict[str, Any]:
    """``decoupled_summary``'s result. A collective call.

    Args:
        method: its name.
        plan: on its placement.
        hops, flush: of the method.
        workers, network, watchers: of this rank.
        bytes_beside: sent by others than the links.
        beside: further entries, of this rank.
    """
    parts = gather({"workers": {s: worker.report() for s, worker in workers.items()}, "network": network.report(plan.k),
                    "beside": bytes_beside, "watchers": [watcher.report() for watcher in watchers]})
    by_stage = {s: report for part in reversed(parts) for s, report in part["workers"].items()}  # of replicas, the first
    by_stage = {s: by_stage[s] for s in sorted(by_stage)}
    summary = {
        "method": method, "stages": plan.placement.stages, "hops": list(hops),
        "delays": [0 if flush else None if "staleness" in report else plan.ticks.delay(s) for s, report in by_stage.items()],
        "peak_records_in_flight": [report["records"] for report in by_stage.values()],
        "updates": [report["updates"] for report in by_stage.values()],
        "held": [part["network"]["held"] for part in parts],
        "bytes_sent": sum(part["network"]["bytes"] + part["beside"] for part in parts),
        "messages_sent": sum(part["network"]["messages"] for part in parts),
        **_layout(plan.placement), "gradient_tracker": [], **beside}
    if any("staleness" in report for report in by_stage.values()):
        summary["staleness"] = [report["staleness"] for report in by_stage.values()]
    if rings := {s: report for part in parts for s, report in part["network"]["rings"].items()}:
        summary["replay"] = [rings[s] for s in sorted(rings)]
    for watcher, reports in zip(watchers, zip(*(part["watchers"] for part in parts))):
        summary.update(watcher.merge(list(reports)))
    return summary


def _layout(placement: Placement) -> dict[str, Any]:
    return {"stage_layers": [list(placement.layers_of(s)) for s in range(placement.stages)],
            "rank_stages": [list(placement.stages_of(r)) for r in range(placement.ranks)]}


def summarize_flushed(layers: Sequence[int], updates: int, bytes_sent: int, messages_sent: int) -> dict[str, Any]:
    """The same for DeepSpeed's own 1F1B, where every rank is one stage; what nobody counts is None. A collective call.

    Args:
        layers: P+1 layer indices at which ranks begin.
        updates: made so far.
        bytes_sent, messages_sent: by this rank.
    """
    ranks = len(layers) - 1
    sent = gather((bytes_sent, messages_sent))
    return {"method": "backprop", "stages": ranks, "hops": [0, 1], "delays": [0] * ranks,
            "peak_records_in_flight": [None] * ranks, "updates": [updates] * ranks, "held": [None] * ranks,
            "bytes_sent": sum(size for size, _ in sent), "messages_sent": sum(count for _, count in sent),
            **_layout(Placement(tuple(layers), tuple(range(ranks + 1)))), "gradient_tracker": []}
