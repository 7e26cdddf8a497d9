"""What the ranks of a test's world run: a small model of transformers, trained as a pipeline and written back."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from engine_cases import config_of
from nets import token_batches

import ds_decoupled
from ds_decoupled.models import from_hugging_face, next_token_loss, to_hugging_face


def train(case: dict[str, Any], source: str, target: str) -> dict[str, Any]:
    """Train from the folder ``source``, write to ``target``; logits of the pipeline as it then is."""
    config = config_of(case)
    deepspeed.init_distributed()
    torch.manual_seed(17 + torch.distributed.get_rank())  # nothing may depend on it
    peft_config = None
    if "lora" in case:
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, lora_alpha=8, **case["lora"])
    layers = from_hugging_face(source, untie_embeddings=case.get("untie", False), peft_config=peft_config)
    model = ds_decoupled.DecoupledPipelineModule(layers, config=config, loss_fn=next_token_loss)
    trainable = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = ds_decoupled.initialize(model=model, config=config, model_parameters=trainable)
    batches = token_batches(case["batches"], case.get("size", 4))
    if case.get("mask"):
        batches = [((ids, torch.ones_like(ids).index_fill(1, torch.tensor([0, 1]), 0)), labels) for ids, labels in batches]
    ours = hasattr(engine, "stages")
    data = iter(batches) if engine.is_first_stage() or engine.is_last_stage() and not ours else None
    losses = [engine.train_batch(data).item() for _ in range(case["batches"] // case.get("k", 1))]
    if ours:
        engine.drain()
    to_hugging_face(engine, target, **case.get("export", {}))
    if peft_config is not None:
        to_hugging_face(engine, f"{target}-adapters", merge_adapters=False)
    engine.total_loss = None
    logits = engine.eval_batch(iter(batches), compute_loss=False, reduce_output=None, bcast_loss=False, num_micro_batches=1)
    updated = [s for s, stage in getattr(engine, "stage_optimizers", {}).items() if stage.optimizer is not None]
    return {"losses": losses, "logits": None if logits is None else logits[0].detach(), "batch": batches[0], "updated": updated,
            "names": [name for name, p in engine.module.named_parameters() if p.requires_grad]}
