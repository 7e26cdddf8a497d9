"""Private names are touched where they may be, all of them are declared, and all of them are still there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.topology import ProcessTopology
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from private_names import Touch, is_there, members_of, resolve, touched

from ds_decoupled import compat
from ds_decoupled.compat import PRIVATE_NAMES

ROOT = Path(__file__).parent.parent
INSIDE = "ds_decoupled/compat/"
LIST = INSIDE + "names.py"

#: Of other packages, which may be touched where they are needed.
OTHERS: dict[str, tuple[str, ...]] = {
    "torch": ("_dynamo", "_functorch", "_inductor"),
    "torch.utils": ("_python_dispatch", "_pytree", "_triton"),
    "torch._dynamo.config": ("recompile_limit",),
    "torch.Tensor": ("_base", "_cdata", "_is_view", "_nnz", "_values", "_version"),
    "torch.distributed.Work": ("wait",),
    "torch.distributed.ProcessGroup": ("send",),
    "torch.nn.Module": ("_buffers",),
    "torch.nn.modules.batchnorm": ("_NormBase",),
    "torch.nn.modules.conv": ("_ConvNd",),
    "torch.nn.Conv2d": ("_conv_forward", "_reversed_padding_repeated_twice"),
    "torch.optim.Optimizer": ("_optimizer_step_post_hooks", "_optimizer_step_pre_hooks"),
    "torch.optim.lr_scheduler.LRScheduler": ("_opt_called", "_wrapped_by_lr_sched"),
    "transformers.PretrainedConfig": ("_attn_implementation",),
    "transformers.PreTrainedModel": ("_from_config", "_init_weights", "_keys_to_ignore_on_load_missing",
                                     "_keys_to_ignore_on_load_unexpected"),
    "huggingface_hub.constants": ("HF_HUB_OFFLINE",),
}

_OWNERS = [owner for owner in PRIVATE_NAMES if isinstance(owner, type)]
_MORE = [FP16_Optimizer, FP16_UnfusedOptimizer, DeepSpeedZeroOptimizer_Stage3, ProcessTopology]
#: Private names of DeepSpeed's objects, whether this package touches them or not.
DEEPSPEED = frozenset[str]().union(*(members_of(owner) for owner in [*_OWNERS, *_MORE]))

DECLARED = {name for names in PRIVATE_NAMES.values() for name in names}
ELSEWHERE = {name for names in OTHERS.values() for name in names}


def sources() -> dict[str, str]:
    files = [path for folder in ("ds_decoupled", "recipes") for path in sorted((ROOT / folder).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): path.read_text() for path in files}


def complaints(texts: dict[str, str], declared: set[str], elsewhere: set[str]) -> list[str]:
    """What is wrong with the lists, or with where names are touched."""
    texts = {path: text for path, text in texts.items() if path != LIST}
    found = touched(texts, DEEPSPEED, INSIDE, known=frozenset(declared | elsewhere))
    here = [touch for touch in found if touch.file.startswith(INSIDE)]
    there = [touch for touch in found if not touch.file.startswith(INSIDE)]
    return [
        *(f"not in PRIVATE_NAMES: {touch}" for touch in here if touch.name not in declared),
        *(f"DeepSpeed's, touched outside {INSIDE}: {touch}" for touch in there
          if touch.name in declared | DEEPSPEED and touch.name not in elsewhere),
        *(f"in no list: {touch}" for touch in there if touch.name not in declared | DEEPSPEED | elsewhere),
        *(f"declared, but not touched: {name}" for name in sorted(declared - {touch.name for touch in here})),
        *(f"listed, but not touched: {name}" for name in sorted(elsewhere - {touch.name for touch in there})),
    ]


def test_lists_are_what_is_touched() -> None:
    assert not complaints(sources(), DECLARED, ELSEWHERE)


MUTATIONS = {
    "a new name inside": (INSIDE + "engine.py", "def more(engine: Any) -> Any:\n    return engine._force_grad_boundary",
                          "not in PRIVATE_NAMES: ds_decoupled/compat/engine.py:"),
    "a new override inside": (INSIDE + "engine.py",
                              "class More(PipelineEngineBase):\n    def _exec_reduce_grads(self) -> None: ...",
                              "not in PRIVATE_NAMES: ds_decoupled/compat/engine.py:"),
    "a new attribute written inside": (INSIDE + "engine.py", "def more(engine: Any) -> None:\n    engine.pipe_buffers = {}",
                                       "not in PRIVATE_NAMES: ds_decoupled/compat/engine.py:"),
    "an attribute outside": ("ds_decoupled/engine.py", "def more(module: Any) -> Any:\n    return module._layer_specs",
                             "DeepSpeed's, touched outside"),
    "by name outside": ("ds_decoupled/engine.py", "def more(module: Any) -> Any:\n    return getattr(module, '_topo')",
                        "DeepSpeed's, touched outside"),
    "by a name that is no argument": ("ds_decoupled/engine.py", "more = ['_topo']", "DeepSpeed's, touched outside"),
    "by a name that is known nowhere": ("ds_decoupled/engine.py", "def more(x: Any) -> Any:\n    return hasattr(x, '_grad_fn')",
                                        "in no list"),
    "an override outside": ("ds_decoupled/engine.py",
                            "class More(DecoupledPipelineEngine):\n    def _exec_reduce_grads(self) -> None: ...",
                            "DeepSpeed's, touched outside"),
    "on self outside": ("ds_decoupled/module.py",
                        "class More(DecoupledPipelineModule):\n    def more(self) -> Any:\n        return self._grid",
                        "DeepSpeed's, touched outside"),
    "a class replaced outside": ("ds_decoupled/entry.py", "deepspeed.PipelineEngine = None", "DeepSpeed's, touched outside"),
    "a class replaced by name": ("ds_decoupled/entry.py", "setattr(deepspeed, 'DeepSpeedEngine', None)", "in no list"),
    "in a recipe": ("recipes/train_resnet.py", "def more(engine: Any) -> Any:\n    return engine._config",
                    "DeepSpeed's, touched outside"),
    "torch's": ("ds_decoupled/tensors.py", "from torch._C import _nn", "in no list"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_is_touched_besides_is_found(mutation: str) -> None:
    file, more, complaint = MUTATIONS[mutation]
    texts = sources()
    texts[file] += f"\n\n{more}\n"
    found = complaints(texts, DECLARED, ELSEWHERE)
    assert found and all(complaint in line for line in found)


def test_what_is_listed_besides_is_found() -> None:
    assert complaints(sources(), DECLARED | {"_force_grad_boundary"}, ELSEWHERE) == [
        "declared, but not touched: _force_grad_boundary"]
    assert complaints(sources(), DECLARED, ELSEWHERE | {"_grad_fn"}) == ["listed, but not touched: _grad_fn"]
    text = sources()
    text[INSIDE + "module.py"] = text[INSIDE + "module.py"].replace("_local_start", "local_start")
    assert complaints(text, DECLARED, ELSEWHERE) == ["declared, but not touched: _local_start"]


def test_pythons_own_names_are_no_touches() -> None:
    text = "import multiprocessing as mp\nmp.current_process()._config['daemon'] = False\nother._config = 1"
    assert touched({"own.py": text}, frozenset({"_config"}), INSIDE) == [Touch("own.py", 3, "_config")]


def test_words_are_no_touches() -> None:
    assert not touched({"own.py": "def of(name):\n    return name.endswith('_lm')"}, frozenset(), INSIDE)


def test_own_names_are_no_touches() -> None:
    own = "class Own:\n    def __init__(self) -> None:\n        self._config = 1\n        self._mine = self._config\n"
    assert not touched({"own.py": own}, frozenset({"_config"}), INSIDE)
    assert touched({"own.py": own + "\ndef of(other):\n    return other._config"}, frozenset({"_config"}), INSIDE) == [
        Touch("own.py", 7, "_config")]


@pytest.mark.parametrize("owner", PRIVATE_NAMES, ids=lambda owner: owner.__name__)
def test_names_are_there(owner: Any) -> None:
    assert [name for name in PRIVATE_NAMES[owner] if not is_there(owner, name)] == []
    assert not is_there(owner, "_a_name_that_is_gone")


@pytest.mark.parametrize("path", OTHERS)
def test_names_of_others_are_there(path: str) -> None:
    owner = resolve(path)
    for name in OTHERS[path]:
        if not is_there(owner, name):
            resolve(f"{path}.{name}")  # a module that is not imported yet


def test_optimizers_have_what_stepping_needs() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    for name in ("get_grads_for_reduction", "update_hp_grads", "clear_lp_grads", "load_state_dict"):
        assert hasattr(BF16_Optimizer, name)
    for name in ("reduce_gradients", "set_gradient_accumulation_boundary", "load_state_dict"):
        assert hasattr(DeepSpeedZeroOptimizer, name)


def test_every_public_name_is_exported() -> None:
    assert all(hasattr(compat, name) for name in compat.__all__)
