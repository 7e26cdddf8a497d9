"""The private names of DeepSpeed that compat.py touches are still there, and nothing else touches any."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ds_decoupled import compat

PACKAGE = Path(compat.__file__).parent


@pytest.mark.parametrize("owner", compat.PRIVATE_NAMES, ids=lambda owner: owner.__name__)
def test_names_are_there(owner: type) -> None:
    missing = [name for name in compat.PRIVATE_NAMES[owner] if not hasattr(owner, name)]
    assert not missing


def test_optimizers_have_what_stepping_needs() -> None:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    for name in ("get_grads_for_reduction", "update_hp_grads", "clear_lp_grads", "load_state_dict"):
        assert hasattr(BF16_Optimizer, name)
    for name in ("reduce_gradients", "set_gradient_accumulation_boundary", "load_state_dict"):
        assert hasattr(DeepSpeedZeroOptimizer, name)


def test_no_other_file_touches_them() -> None:
    names = {name for owned in compat.PRIVATE_NAMES.values() for name in owned} | {"_layer_specs", "_num_layers", "_topo"}
    pattern = re.compile(r"\.(" + "|".join(map(re.escape, sorted(names))) + r")\b")
    for path in PACKAGE.rglob("*.py"):
        if path.name != "compat.py":
            assert not pattern.search(path.read_text()), path
