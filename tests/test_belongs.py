"""Every setting has an effect where it is taken, and is refused with both names where it has none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import settings_cases
import worlds

from ds_decoupled.axes import AXES, PRESETS, resolve
from ds_decoupled.config import DecoupledConfig, parse_block
from ds_decoupled.errors import ConfigError
from ds_decoupled.settings.belongs import EVERY, ROWS, belongs_to, check_belongs

REPO = Path(__file__).parent.parent

#: For each setting a value that is not its default, and what stands beside it.
OTHER: dict[str, Any] = {
    "stages": 2, "partition": "uniform", "hops": [2, 1], "gradient": "local", "recover": "input", "weights": "stashed",
    "update": "flush", "input": "replay", "pace": "clock", "replay": {"size": 3},
    "clock": {"seed": 1}, "threads": {"backward": 3}, "exchange": "average",
    "pass_times": {"forward": [2.0, 1.0]},
    "slow_down": [1.0, 2.0], "window": 3, "losses": "farthest", "head": "linear", "head_refresh": 10, "head_lr": 2.0,
    "head_teaching": {"updates": 5},
    "transport": 0.1, "ensemble": True, "input_shape": [2, 8, 8], "queue": 4, "stage_lr": [1.0, 0.5],
    "stage_schedulers": [None, None],
    "stop_after": [None, 1], "codec": "bf16", "vq": {"group": 4}, "split_backward": True, "compile": True, "lr_by_delay": 10,
    "track_gradients": 2, "timeout": 60, "auxnet": {"fit": 2.0},
}
BESIDE: dict[str, dict[str, Any]] = {"head_refresh": {"head": "shared"}, "clock": {"pace": "clock"},
                                     "pass_times": {"pace": "clock"},
                                     "vq": {"codec": {"forward": "vq"}}}

#: Presets that bring workers, and are another in nothing else.
OF_WORKERS = {"hogwild": "pd_asgd", "lapsgd": "pd_asgd"}

#: x: refused. Of the axes, the value of OTHER, where the preset has another.
TABLE = """
              backprop reversible pipedream delayed dsp petra dgl overlapping dgl_async pd_asgd auxnet_penalty auxnet_lagrangian
stages              .         .          .        .     .    .    .       .          .        .          .                .
partition           .         .          .        .     .    .    .       .          .        .          .                .
hops                x         x          .        .     .    .    .       .          x        x          x                x
gradient            x         x          x        .     x    x    .       .          .        x          x                x
recover             .         .          .        .     .    .    x       x          x        x          x                x
weights             x         x          .        .     .    .    x       x          x        .          x                x
update              .         .          x        .     .    .    x       x          x        .          x                x
input               x         x          x        x     x    x    .       x          .        x          x                x
pace                x         x          x        x     x    x    x       x          .        .          x                x
replay              x         x          x        x     x    x    x       x          .        x          x                x
clock               x         x          x        x     x    x    x       x          .        x          x                x
threads             x         x          x        x     x    x    x       x          x        .          x                x
exchange            x         x          x        x     x    x    x       x          x        .          x                x
pass_times          x         x          x        x     x    x    x       x          x        .          x                x
slow_down           x         x          x        x     x    x    x       x          .        x          x                x
window              x         x          x        x     x    x    .       .          x        x          x                x
losses              x         x          x        x     x    x    .       .          .        x          x                x
head                x         x          x        x     x    x    .       .          .        x          x                x
head_lr             x         x          x        x     x    x    .       .          .        x          x                x
head_teaching       x         x          x        x     x    x    .       .          .        x          x                x
head_refresh        x         x          x        x     x    x    .       .          x        x          x                x
transport           x         x          x        x     x    x    .       .          .        x          x                x
ensemble            x         x          x        x     x    x    .       .          .        x          x                x
input_shape         x         x          x        x     x    x    .       .          .        x          .                .
queue               x         x          x        x     x    x    .       x          .        x          x                x
stage_lr            x         .          .        .     .    .    .       .          .        .          .                .
stage_schedulers    x         .          .        .     .    .    .       .          .        .          .                .
stop_after          x         x          x        x     x    x    .       .          .        x          x                x
codec               x         .          .        .     .    .    .       .          .        x          .                .
vq                  x         .          .        .     .    .    .       .          .        x          .                .
split_backward      x         .          .        .     .    .    x       x          x        x          x                x
compile             x         .          .        .     .    .    .       .          .        x          .                .
lr_by_delay         x         x          .        .     .    .    x       .          x        x          x                x
track_gradients     x         .          .        .     .    .    .       .          x        x          .                .
timeout             x         .          .        .     .    .    .       .          .        .          .                .
auxnet              x         x          x        x     x    x    x       x          x        x          .                .
"""


def table() -> dict[tuple[str, str], bool]:
    """Whether a setting is refused, by setting and preset."""
    head, *lines = TABLE.strip("\n").splitlines()
    found = {(row[0], method): mark == "x" for row in map(str.split, lines) for method, mark in zip(head.split(), row[1:])}
    return found | {(setting, method): found[setting, other] for setting in OTHER for method, other in OF_WORKERS.items()}


def refusal(block: dict[str, Any]) -> ConfigError | None:
    try:
        parse_block({"decoupled": block})
    except ConfigError as error:
        return error
    return None


def test_no_setting_is_in_no_row() -> None:
    fields = set(DecoupledConfig.model_fields)
    assert {row.setting for row in ROWS} == fields
    assert set(OTHER) == fields - {"method"}
    assert set(table()) == {(setting, method) for setting in OTHER for method in PRESETS}


@pytest.mark.parametrize("method", PRESETS)
def test_what_has_no_effect_is_refused(method: str) -> None:
    for setting, value in OTHER.items():
        error = refusal({"method": method, setting: value, **BESIDE.get(setting, {})})
        assert (error is not None) == table()[setting, method], (setting, str(error))
        if error is None:
            continue
        named = error.setting.removeprefix("decoupled.")
        # "gradient": "local" is refused by what the preset has beside it, and what goes beside a setting may be refused first.
        assert named == setting or named in BESIDE.get(setting, {}) or setting in AXES and named in AXES, str(error)
        _, shown, allowed, hint = error.fields
        axis = re.match(r'with "(\w+)": (".*?"|\d+) ', allowed)
        assert axis is not None and axis[1] in (*AXES, "window", "pace") and "it belongs to " in allowed and hint, allowed
        against = getattr(PRESETS[method], axis[1]) if setting not in AXES else OTHER.get(axis[1])
        assert json.loads(axis[2]) == against or setting in AXES, (method, str(error))
        assert shown == value or setting in AXES or setting in BESIDE


def test_what_is_the_default_is_taken_everywhere() -> None:
    """It says what happens anyway."""
    for method in PRESETS:
        for name, field in DecoupledConfig.model_fields.items():
            if name != "method":
                value = False if name == "compile" else field.default
                assert refusal({"method": method, name: value}) is None, (method, name)


@pytest.mark.parametrize(("block", "setting", "words"), [
    ({"method": "delayed", "update": "flush", "timeout": 60}, "timeout", '"update": "flush" and "recover": "graph"'),
    ({"method": "backprop", "recover": "input", "timeout": 60}, None, ""),
    ({"method": "overlapping", "queue": 4}, "queue", '"window": 2'),
    ({"method": "overlapping", "window": 1, "queue": 4}, None, ""),
    ({"method": "dgl", "window": 2, "queue": 4}, "queue", '"window": 2'),
    ({"method": "dgl", "gradient": "global", "head": "mlp"}, "head", '"gradient": "global"'),
    ({"method": "delayed", "gradient": "local", "head": "mlp"}, None, ""),
    ({"method": "dgl", "hops": [0, 2]}, "hops", '"window": 1'),
    ({"method": "dgl", "hops": [1, 1]}, None, ""),
    ({"method": "overlapping", "hops": [0, 2]}, None, ""),
    ({"method": "dgl", "lr_by_delay": 3}, "lr_by_delay", '"window": 1'),
    ({"method": "dgl", "head_refresh": 3}, "head_refresh", '"head": null'),
    ({"method": "dgl", "head": "mlp", "head_refresh": 3}, "head_refresh", '"head": "mlp"'),
    ({"method": "dgl", "head": "shared:2", "head_refresh": 3}, None, ""),
    ({"method": "petra", "codec": "int8", "vq": {"levels": 2}}, "vq", "another codec forward"),
    ({"method": "petra", "codec": {"forward": "vq"}, "vq": {"levels": 2}}, None, ""),
    ({"method": "overlapping", "head": "reconstruct"}, "head", '"window": 2'),
    ({"method": "dgl", "head": "reconstruct", "ensemble": True}, "ensemble", '"head": "reconstruct"'),
    ({"method": "dgl", "head": "reconstruct"}, None, ""),
    ({"method": "overlapping", "head": "auglocal:2", "ensemble": True, "transport": 1}, None, ""),
    ({"method": "petra", "compile": True, "split_backward": True}, "compile", '"split_backward": true'),
    ({"method": "pipedream", "weights": "predicted"}, "weights", '"recover": "graph"'),
    ({"method": "pipedream", "weights": "current"}, None, ""),
    ({"method": "dgl", "input": "replay", "window": 2}, "window", '"input": "replay"'),
    ({"method": "dgl_async", "window": 2}, "window", '"input": "replay"'),
    ({"method": "overlapping", "input": "replay"}, "input", '"window": 2'),
    ({"method": "petra", "input": "replay"}, "input", '"gradient": "global"'),
    ({"method": "dgl_async", "pace": "ticks"}, "input", '"pace": "ticks"'),
    ({"method": "dgl_async", "pace": "clock", "head": "shared"}, None, ""),
    ({"method": "dgl_async", "head": "shared"}, "head", '"pace": "free"'),
    ({"method": "dgl_async", "clock": {"seed": 3}}, "clock", '"pace": "free"'),
    ({"method": "dgl", "pace": "free"}, "pace", '"input": "stream"'),
    ({"method": "dgl", "replay": {"cap": 2}}, "replay", '"input": "stream"'),
    ({"method": "dgl_async", "input": "stream", "replay": {"cap": 2}}, "replay", '"input": "stream"'),
    ({"method": "petra", "update": "flush", "weights": "predicted"}, "weights", '"update": "flush"'),
    ({"method": "delayed", "update": "layerwise"}, None, ""),
    ({"method": "petra", "update": "layerwise"}, "update", '"recover": "reconstruct"'),
    ({"method": "dgl", "update": "layerwise"}, "update", '"gradient": "local"'),
    ({"method": "pd_asgd", "pace": "ticks"}, "update", '"pace": "ticks"'),
    ({"method": "pd_asgd", "weights": "predicted"}, "weights", '"update": "layerwise"'),
    ({"method": "pd_asgd", "pace": "clock", "clock": {"seed": 2}}, "clock", '"input": "stream"'),
    ({"method": "pd_asgd", "pace": "clock", "slow_down": [2.0, 1.0]}, "slow_down", '"input": "stream"'),
    ({"method": "pd_asgd", "pass_times": {"forward": [1.0]}}, "pass_times", '"pace": "free"'),
    ({"method": "pd_asgd", "threads": "auto", "pace": "clock", "pass_times": {"backward": [1.0]}}, None, ""),
])
def test_overrides(block: dict[str, Any], setting: str | None, words: str) -> None:
    error = refusal(block)
    if setting is None:
        assert error is None
    else:
        assert error is not None and error.setting == f"decoupled.{setting}" and f"with {words} " in str(error), str(error)


def test_a_systems_own_settings_would_be_a_row() -> None:
    """As for a nested object: no value but the default where it does not belong."""
    with pytest.raises(ConfigError, match='"decoupled.compile".*belongs to any method but "backprop"'):
        check_belongs(resolve("backprop", {}), {"compile": {"backend": "inductor"}})
    check_belongs(resolve("petra", {}), {"compile": {"backend": "inductor"}})


#: Told by the axes alone.
POINT = {"method", *AXES, "hops", "window", "pace"}


def test_what_is_taken_is_read() -> None:
    """Where a setting is taken, something that builds, trains or evaluates looks at it."""
    cases = [{"method": method, "stages": "blocks", "batches": 2,
              "block": {**({"ensemble": True} if axes.window else {}),
                        **({"head": "shared"} if axes.window and axes.pace == "ticks" else {})}}
             for method, axes in PRESETS.items()]
    alone = [case for case in cases if PRESETS[case["method"]].layerwise]
    cases = [case for case in cases if case not in alone]
    seen = [set.union(*of_ranks) for of_ranks in zip(*worlds.run(2, settings_cases.all_settings_read, cases))]
    seen += worlds.run(1, settings_cases.all_settings_read, alone)[0]
    for case, found in zip(cases + alone, seen):
        read = found | POINT
        unread = {s for s in OTHER if not table()[s, case["method"]]} - read
        # A module that knows a sample input needs no shape of one.
        assert unread <= {"input_shape"}, (case["method"], unread)


# In the documents


def documented() -> dict[str, tuple[str, str]]:
    """By setting: the file that documents it, and where that says it belongs."""
    found: dict[str, tuple[str, str]] = {}
    for path in (REPO / "README.md", *(REPO / "docs" / f"{name}.md" for name in ("local_losses", "replay", "auxnet",
                                                                              "asynchronous"))):
        column = None
        for line in path.read_text().splitlines():
            cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
            if "belongs to" in cells:
                column = cells.index("belongs to")
            elif not cells:
                column = None
            elif column is not None and not set(line) <= set("|- "):
                for name in re.findall(r"`(\w+)`", cells[0]):
                    assert name not in found, f"{name} stands in {found[name][0]} and in {path.name}"
                    found[name] = path.name, cells[column].replace("`", "")
    return found


def test_documents_agree_with_the_table() -> None:
    found = documented()
    assert set(found) == set(DecoupledConfig.model_fields)
    for name, (path, where) in found.items():
        assert where == belongs_to(name), (path, name)
    assert belongs_to("stages") == EVERY
