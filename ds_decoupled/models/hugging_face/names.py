"""Names and layouts of weights in files, which are not always those in memory.

``transformers`` renames, fuses and splits tensors when it loads a checkpoint, by a mapping that it has for each family, and
undoes it when it saves. Here the same mapping is laid out as a plan, by names alone, so that one layer at a time can be read.

::

    in the file                               in memory
    gpt_neox.layers.0.attention.dense.weight  the same                                     renamed, or as it is
    embed_out.weight                          lm_head.weight
    ...experts.0.w1.weight   ┐
    ...experts.0.w3.weight   ├ group ──────>  ...experts.gate_up_proj                      converted
    ...experts.1.w1.weight   ┘
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Group:
    """Tensors of a file that are read together.

    Attributes:
        first: the name in memory that they lead to, the first one of several.
        stored: their names in the file, each with the mapping's pattern that it matches.
        converter: of ``transformers``; None where one tensor has one name.
    """

    first: str
    stored: list[tuple[str, str]] = field(default_factory=list)
    converter: Any = None

    def made(self) -> list[str]:
        """All names in memory that it gives a tensor for."""
        if self.converter is None:
            return [self.first]
        head, *rest = self.converter.target_patterns
        return [self.first, *(self.first.replace(head, other) for other in rest)]

    def convert(self, tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """From tensors by their names in the file to tensors by their names in memory."""
        if self.converter is None:
            return {self.first: tensors[self.stored[0][0]]}
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.stored:
            converter.add_tensor(self.first, name, pattern, tensors[name])
        made = converter.convert(self.first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class Naming:
    """What the tensors of a file are in memory.

    Args:
        model: of ``transformers``; without weights.
        stored: the names in the file.

    Attributes:
        groups: by every name in memory that the file has.
        unread: by name in the file, the name that it would have in a model that has no such tensor.
    """

    def __init__(self, model: Any, stored: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        known, prefix = model.state_dict(), model.base_model_prefix
        firsts: dict[str, Group] = {}
        self.unread: dict[str, str] = {}
        for name in sorted(stored, key=dot_natural_key):
            there, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if there not in known and name in known:  # a file that was saved with the names in memory
                there, pattern = name, None
            if there not in known:
                self.unread[name] = there
                continue
            converter = None if pattern is None else by_pattern[pattern]
            firsts.setdefault(there, Group(there, converter=converter)).stored.append((name, pattern or name))
        self.groups = {made: group for group in firsts.values() for made in group.made()}


def as_in_files(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """From names in memory to those that ``save_pretrained`` writes. What is fused or split must be there together, as it is in
    one layer."""
    from transformers.core_model_loading import revert_weight_conversion

    return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(model, tensors).items()}
