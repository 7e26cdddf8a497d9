"""What the benchmark compares: methods, the worlds they run in, and the laws their speeds should follow. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        label: its name there.
        runner: what runs it: ``engine`` (ours), ``deepspeed`` (its own), ``dualpipev`` (its own), or a bare loop.
        block: the JSON's ``decoupled`` block, where ours runs it.
        cost: what a layer costs in the balance: a value of the ``recover`` axis, or ``local``: with its stage's head.
        one_rank: whether it can run on a single rank.
        ranks: whether it can run on several.
        copies: on several ranks, each runs the whole of it for itself: as much as the machine's cores can do side by side.
        extra: runs only where it is asked for.
        all_cores: its threads run on all of the machine's cores, where a rank of others has one.
        split_operations: those threads are torch's own, which share every operation; else each thread has whole ones.
    """

    label: str
    runner: str
    block: dict[str, Any] = field(default_factory=dict)
    cost: str = "graph"
    one_rank: bool = True
    ranks: bool = True
    copies: bool = False
    extra: bool = False
    all_cores: bool = False
    split_operations: bool = False


def _ours(label: str, cost: str, method: str, extra: bool = False, **block: Any) -> Method:
    return Method(label, "engine", {"method": method, "stages": "blocks", **block}, cost, extra=extra)


def _threads(label: str, stages: int | str = "blocks", **threads: Any) -> Method:
    """Threads that share a model on one rank."""
    return Method(label, "engine", {"method": "pd_asgd", "stages": stages, "threads": threads}, ranks=False, extra=True,
                  all_cores=True)


METHODS: dict[str, Method] = {
    "bare-backprop": Method("backpropagation, bare loop", "bare-backprop", ranks=False),
    "bare-petra": Method("PETRA, bare loop", "bare-petra", cost="reconstruct", ranks=False),
    "bare-backprop-copies": Method("backpropagation, a bare loop on each core", "bare-backprop", one_rank=False, copies=True),
    "bare-petra-copies": Method("PETRA, a bare loop on each core", "bare-petra", cost="reconstruct", one_rank=False,
                                copies=True),
    "bare-backprop-threads": Method("backpropagation, a bare loop whose operations have all cores", "bare-backprop",
                                    ranks=False, extra=True, all_cores=True, split_operations=True),
    "bare-ddp": Method("backpropagation, data parallel (torch's DDP)", "bare-ddp", one_rank=False, copies=True, extra=True),
    "petra": _ours("petra", "reconstruct", "petra"),
    "petra-01": _ours("petra, hops (0, 1)", "reconstruct", "petra", hops=[0, 1]),
    "petra-split": _ours("petra, split backward", "reconstruct", "petra", split_backward=True),
    "dsp": _ours("dsp", "input", "dsp"),
    "delayed": _ours("delayed", "graph", "delayed"),
    "delayed-chunked": Method("delayed, one stage a rank", "engine", {"method": "delayed", "stages": "ranks"}),
    "pipedream": _ours("pipedream", "graph", "pipedream"),
    "reversible": _ours("reversible", "reconstruct", "reversible"),
    "dgl": _ours("dgl", "local", "dgl"),
    "dgl-chunked": Method("dgl, one stage a rank", "engine", {"method": "dgl", "stages": "ranks"}, one_rank=False),
    "dgl_async": _ours("dgl_async, ranks run free", "local", "dgl_async", extra=True),
    "pd_asgd": _threads("pd_asgd, 1 forward and 2 backward threads", forward=1, backward=2),
    "pd_asgd-11": _threads("pd_asgd, 1 forward and 1 backward thread", forward=1, backward=1),
    "pd_asgd-21": _threads("pd_asgd, 2 forward and 1 backward thread", forward=2, backward=1),
    "pd_asgd-whole": _threads("pd_asgd 1:2, updates of the whole model", 1, forward=1, backward=2),
    "hogwild-2": _threads("hogwild, 2 workers", 1, workers=2, lock="none"),
    "hogwild-2-layers": _threads("hogwild, 2 workers, layer by layer", workers=2, lock="none"),
    "hogwild-3": _threads("hogwild, 3 workers", 1, workers=3, lock="none"),
    "hogwild-3-layers": _threads("hogwild, 3 workers, layer by layer", workers=3, lock="none"),
    "overlapping": _ours("overlapping, window 2", "local", "overlapping", extra=True),
    **{name: Method(f"{name}, one stage a rank", "engine", {"method": name, "stages": "ranks"}, one_rank=False, extra=True)
       for name in ("auxnet_penalty", "auxnet_lagrangian")},
    "petra-compiled": _ours("petra, compiled", "reconstruct", "petra", extra=True, compile=True),
    "dsp-compiled": _ours("dsp, compiled", "input", "dsp", extra=True, compile=True),
    "delayed-compiled": _ours("delayed, compiled", "graph", "delayed", extra=True, compile=True),
    "1f1b": Method("DeepSpeed 1F1B", "deepspeed"),
    "1f1b-checkpoint": Method("DeepSpeed 1F1B, checkpointed", "deepspeed", cost="input", one_rank=False),
    "dualpipev": Method("DeepSpeed DualPipeV", "dualpipev", one_rank=False),
}
"""By the name that ``--methods`` takes."""

SHARING = ("bare-backprop", "bare-backprop-threads", "bare-backprop-copies", "bare-ddp", "pd_asgd-11", "pd_asgd",
           "pd_asgd-21", "pd_asgd-whole", "hogwild-2", "hogwild-2-layers", "hogwild-3", "hogwild-3-layers")
"""Ways to give one model all cores."""

ONE_RANK_LABELS = {"1f1b": "DeepSpeed", "delayed-chunked": "delayed, one stage"}
"""What a method is called where there is no pipeline."""

ONLY_ACROSS_RANKS = {"petra-split"}
"""Variants of how ranks talk: on one rank they are the method itself."""


@dataclass(frozen=True)
class Configuration:
    """One world of the benchmark: a method on P ranks with k micro-batches an update, and the codec of its links."""

    method: str
    ranks: int
    k: int
    codec: str = "none"

    @property
    def label(self) -> str:
        name = METHODS[self.method].label
        name = ONE_RANK_LABELS.get(self.method, name) if self.ranks == 1 else name
        return name if self.codec == "none" else f"{name}, {self.codec}"

    @property
    def links(self) -> dict[str, Any]:
        """Settings of the ``decoupled`` block for its codec; ``vq`` is one of activations alone."""
        if self.codec == "none":
            return {}
        return {"codec": {"forward": "vq"} if self.codec == "vq" else self.codec}

    def __str__(self) -> str:
        return f"{self.label}, P={self.ranks}, k={self.k}"


def configurations(methods: Sequence[str], ranks: Sequence[int], k: int, layers: int) -> list[Configuration]:
    """All that can run with this k on a model of so many layers, in the order of the tables."""
    found = []
    for p in ranks:
        for name in methods:
            method = METHODS[name]
            fits = method.one_rank and name not in ONLY_ACROSS_RANKS if p == 1 else method.ranks
            if method.runner == "dualpipev" and 2 * p > min(k, layers):  # 2P stages, and as many micro-batches to fill them
                fits = False
            if fits:
                found.append(Configuration(name, p, k))
    return found



@dataclass(frozen=True)
class Law:
    """A ratio of two speeds in samples/s, and what it should be.

    Attributes:
        name: what it says.
        fast, slow: numerator and denominator.
        value: the law.
        target: the share of the law that is asked for.
    """

    name: str
    fast: Configuration
    slow: Configuration
    value: float
    target: float


def laws(ranks: int, k: int) -> list[Law]:
    """The laws for P = ``ranks`` at one k, with forward 1, backward 2, and a re-run forward 1.

    ::

        P = 1   petra / bare loop              1               engine overhead
                petra / backpropagation        3/4             the re-forward
        P > 1   P bare loops / one             P               cores that do not disturb one another
                any decoupled, P / one rank    P               no bubble
                petra / 1F1B                   3(1+(P-1)/k)/4
                delayed / 1F1B                 1+(P-1)/k
                petra / checkpointed 1F1B      1+(P-1)/k
                dgl / 1F1B                     1+(P-1)/k       less what its heads cost
                auxnet / backpropagation       P/(1+(P-1)/10)  the AuxNet, a tenth of the model, up and down
    """
    def at(method: str, p: int = ranks) -> Configuration:
        return Configuration(method, p, k)

    if ranks == 1:
        return [
            Law("engine, petra / bare PETRA loop", at("petra"), at("bare-petra"), 1.0, 1 / 1.05),
            Law("petra / bare backpropagation", at("petra"), at("bare-backprop"), 3 / 4, 4 / 3 / 1.40),
            Law("engine, delayed / bare backpropagation", at("delayed"), at("bare-backprop"), 1.0, 1 / 1.05),
            Law("dgl / delayed (what heads cost)", at("dgl"), at("delayed"), 1.0, 0.0),
            *(Law(f"{METHODS[m].label}, compiled / not", at(f"{m}-compiled"), at(m), 1.0, 0.0)
              for m in ("petra", "dsp", "delayed")),
            Law("DeepSpeed / bare backpropagation", at("1f1b"), at("bare-backprop"), 1.0, 0.0),
        ]
    bubble = 1 + (ranks - 1) / k
    generating = 1 + (ranks - 1) / 10
    return [
        *(Law(f"{METHODS[m].label}, {ranks} at once / one alone", at(f"{m}-copies"), at(m, 1), ranks, 0.0)
          for m in ("bare-backprop", "bare-petra")),
        *(Law(f"{METHODS[m].label}, P={ranks} / P=1", at(m), at(m, 1), ranks, 0.9)
          for m in ("petra", "petra-01", "dsp", "delayed", "delayed-chunked", "pipedream", "dgl", "overlapping")),
        Law("petra / 1F1B", at("petra"), at("1f1b"), 0.75 * bubble, 0.95),
        Law("petra (0, 1) / 1F1B", at("petra-01"), at("1f1b"), 0.75 * bubble, 0.95),
        *(Law(f"{METHODS[m].label} / 1F1B", at(m), at("1f1b"), bubble, 0.95) for m in ("delayed", "delayed-chunked")),
        Law("petra / checkpointed 1F1B", at("petra"), at("1f1b-checkpoint"), bubble, 0.95),
        *(Law(f"{METHODS[m].label} / 1F1B (law without heads)", at(m), at("1f1b"), bubble, 0.0)
          for m in ("dgl", "dgl-chunked", "overlapping")),
        *(Law(f"{METHODS[m].label} / bare backpropagation", at(m), at("bare-backprop", 1),
              ranks / generating, 0.0) for m in ("auxnet_penalty", "auxnet_lagrangian")),
        *(Law(f"{METHODS[m].label} / 1F1B", at(m), at("1f1b"), bubble / generating, 0.0)
          for m in ("auxnet_penalty", "auxnet_lagrangian")),
        Law("1F1B, P / P=1 (its own law)", at("1f1b"), at("1f1b", 1), ranks / bubble, 0.0),
        Law("split backward / petra", at("petra-split"), at("petra"), 1.0, 0.0),
        Law("petra / DualPipeV", at("petra"), at("dualpipev"), 0.75, 0.0),
    ]
