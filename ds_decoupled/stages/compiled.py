"""``"compile"``: a stage's layers by ``torch.compile``, each for itself, at its first use.

Compiled is what a forward pass and a backward pass by recomputation or reconstruction both run: a layer's ``forward``, and of a
coupling its residual function, which its fused ``reverse`` calls too. Random numbers are eager PyTorch's (inductor's
``fallback_random``): a compiled dropout draws eager's mask, and the same one when it is run again.

A graph that is kept over updates (``recover: graph``, ``weights: current``) must not be cut where a compiler likes best. Its
min-cut partitioner computes activations again in the backward pass, from weights that have changed by then, and saves values
made from weights alone, which are stale by then. :func:`cut_by_reference` cuts as eager autograd does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from ds_decoupled.config import BLOCK, Axes, CompileSettings
from ds_decoupled.errors import ConfigError
from ds_decoupled.nn import ReversibleCoupling

#: Layers of one type share a code object, and with it dynamo's limit on recompilations: with and without gradients, for
#: training and evaluation, for every width that does not change while it runs.
_RECOMPILATIONS = 128

_COMPILED = "_ds_decoupled_compiled"


def check_compiler(settings: CompileSettings, device: torch.device) -> None:
    """Refuse at once what would fail at the first micro-batch: inductor without a compiler for ``device``.

    Raises:
        ConfigError: saying which compiler is missing.
    """
    if settings.backend != "inductor":
        return
    instead = 'or leave "compile" out.'
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:
            raise ConfigError(f"{BLOCK}.compile", "inductor", "on CPU TorchInductor writes C++, and no C++ compiler was found",
                              f"Install g++, name a compiler in the environment variable CXX, {instead}") from error
    else:
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ConfigError(f"{BLOCK}.compile", "inductor", f"on {device.type} TorchInductor writes Triton, which is missing "
                              "or does not know this device", f"Install triton, {instead}")


def outlives_updates(axes: Axes) -> bool:
    """Whether a graph is kept while the weights change that it is to find changed."""
    return axes.recover == "graph" and axes.weights == "current" and not axes.flush


def compile_layers(layers: Iterable[Any], settings: CompileSettings, by_reference: bool) -> None:
    """Make the modules among ``layers`` compile themselves at their first call; functions stay as they are.

    Args:
        layers: a stage's layers, changed in place.
        settings: backend, mode, dynamic shapes.
        by_reference: whether their graphs outlive updates and must find the current weights.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILATIONS)
    arguments = _arguments(settings, by_reference)
    for layer in layers:
        if isinstance(layer, nn.Module):
            target = layer.f if isinstance(layer, ReversibleCoupling) else layer
            # Not Module.compile(): it compiles one code object for modules of every type, which would share one cache.
            target.forward = torch.compile(target.forward, dynamic=settings.dynamic, **arguments)
            target.__dict__[_COMPILED] = True


def plain_copy(layer: nn.Module) -> nn.Module:
    """A copy with weights of its own, which is not compiled."""
    copied = copy.deepcopy(layer)
    for part in copied.modules():
        if part.__dict__.pop(_COMPILED, False):
            del part.__dict__["forward"]  # it is bound to the original, and would run with that one's weights
    return copied


def _arguments(settings: CompileSettings, by_reference: bool) -> dict[str, Any]:
    """``torch.compile``'s arguments for the backend; equal ones share compiled code."""
    if settings.backend == "aot_eager":
        return {"backend": _aot_eager_by_reference if by_reference else "aot_eager"}
    options = {**torch._inductor.list_mode_options(settings.mode), "fallback_random": True}
    if by_reference:
        options["custom_partitioner_fn"] = _inductor_partitioner()
    return {"backend": "inductor", "options": options}


# -- graphs that outlive updates --------------------------------------------------------------------------------------------


def cut_by_reference(joint: GraphModule, joint_inputs: Any, *, num_fwd_outputs: int,
                     static_lifetime_input_indices: list[int] | None = None, **_: Any) -> tuple[GraphModule, GraphModule]:
    """Cut a joint graph into forward and backward: AOTAutograd's partition function for graphs that outlive updates.

    Every activation that the backward pass uses is saved, as in eager autograd. Values made from weights alone are not: the
    weights themselves are saved (as references, see :mod:`ds_decoupled.stages.weights`), the rest is computed from them again.

    Raises:
        RuntimeError: if an activation would be computed again all the same.
    """
    from torch._functorch.partitioners import default_partition

    activations = _repeat_weights(joint, set(static_lifetime_input_indices or ()), num_fwd_outputs)
    forward, backward = default_partition(joint, joint_inputs, num_fwd_outputs=num_fwd_outputs,
                                          static_lifetime_input_indices=static_lifetime_input_indices)
    _drop_unused_draws(backward)
    again = [node.name for node in backward.graph.nodes if node.op == "call_function" and node.name in activations]
    if again:
        raise RuntimeError(f"compiling a layer: its backward pass would compute {', '.join(again[:5])} again, with other "
                           'weights than the forward pass. Take "recover": "input" or "reconstruct", or leave "compile" out')
    return forward, backward


def _repeat_weights(joint: GraphModule, weights: set[int], num_fwd_outputs: int) -> set[str]:
    """Give the backward pass copies of its own of the nodes that depend on weights alone.

    Args:
        joint: the joint graph, changed in place.
        weights: the positions of parameters and buffers among the forward pass's inputs.
        num_fwd_outputs: how many of the graph's outputs are the forward pass's.

    Returns:
        The names of the forward pass's nodes that depend on more than weights and whose values are tensors.
    """
    graph = joint.graph
    [output] = graph.find_nodes(op="output")
    forward = _forward_nodes(graph, output.args[0][:num_fwd_outputs])
    primals = [n for n in graph.find_nodes(op="placeholder") if "tangents" not in str(n.target)]
    fixed = {node for i, node in enumerate(primals) if i in weights}
    for node in graph.nodes:
        if node.op == "get_attr" or node.op == "call_function" and not _is_random(node) and all(
                n in fixed or _is_size(n) for n in node.all_input_nodes):
            fixed.add(node)

    copies: dict[Node, Node] = {}

    def copy(node: Node, before: Node) -> Node:
        if node.op != "call_function" or _is_size(node):
            return node
        if node not in copies:
            arguments = {n: copy(n, before) for n in node.all_input_nodes}
            with graph.inserting_before(before):
                copies[node] = graph.node_copy(node, arguments.__getitem__)
            copies[node].meta["partitioner_tag"] = "is_backward"
        return copies[node]

    for user in [n for n in graph.nodes if n.op == "call_function" and n not in forward]:
        for node in user.all_input_nodes:
            if node in fixed and node in forward:
                user.replace_input_with(node, copy(node, user))
    return {n.name for n in forward - fixed if n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor)}


def _forward_nodes(graph: Graph, outputs: Iterable[Any]) -> set[Node]:
    """What the forward pass computes: all that its outputs need, and all up to the last node that is marked as its own."""
    found: set[Node] = set()
    nodes = list(graph.nodes)
    marked = [i for i, n in enumerate(nodes) if n.meta.get("partitioner_tag") == "is_forward"]
    waiting = [n for n in [*outputs, *nodes[:marked[-1] + 1 if marked else 0]] if isinstance(n, Node)]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _drop_unused_draws(module: GraphModule) -> None:
    """A random function of the forward pass, whose mask was saved, is taken for impure and stays behind with all it needs."""
    for node in reversed(module.graph.nodes):
        if node.op == "call_function" and not node.users and _is_random(node):
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt, torch.SymFloat, torch.SymBool))


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _aot_eager_by_reference(module: GraphModule, inputs: list[Any]) -> Any:
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop

    compiler = aot_autograd(fw_compiler=boxed_nop, partition_fn=cut_by_reference, keep_inference_input_mutations=True)
    return compiler(module, inputs)


def _inductor_partitioner() -> Any:
    """:func:`cut_by_reference` in the form that inductor's cache asks for."""
    from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files

    class CutByReference(CustomPartitionerFn):
        def __call__(self, gm: GraphModule, joint_inputs: Any, **kwargs: Any) -> tuple[GraphModule, GraphModule]:
            return cut_by_reference(gm, joint_inputs, **kwargs)

        def uuid(self) -> Any:
            return get_hash_for_files((__file__,))

    return CutByReference()
