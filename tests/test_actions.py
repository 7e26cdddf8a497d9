"""Actions have a text form that reads back."""

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_decoupled.schedules import KINDS, Action, Kind, format_actions, parse_actions
from ds_decoupled.schedules.actions import parse_action
from ds_decoupled.schedules.kinds import matching

actions = st.builds(Action, st.integers(0, 99), st.sampled_from([*KINDS.values()]), st.integers(0, 10**6))


def test_text_form() -> None:
    assert str(Action(3, Kind.FORWARD, 7)) == "3F7"
    line = "0L0 0F0 0SA0 1RR12 1R12 1SR12 1W12 1U5"
    assert format_actions(parse_actions(line)) == line
    assert parse_actions("") == []


@given(st.lists(actions))
def test_reads_back(some: list[Action]) -> None:
    assert parse_actions(format_actions(some)) == some


@pytest.mark.parametrize("text", ["", "F7", "3F", "3f7", "3F-7", "3F7 ", "33", "3F7x"])
def test_not_an_action(text: str) -> None:
    with pytest.raises(ValueError, match="expected STAGE KIND MICRO-BATCH"):
        parse_action(text)


def test_unknown_kind_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'3Y7': no action kind 'Y'; there are L, F, X, H, G, B, C, R, N, P, Q, T, W, U, SA"):
        parse_action("3Y7")


def test_kinds() -> None:
    assert {k.letter for k in KINDS.values() if k.is_backward} == {"B", "C", "R"}
    assert {k.letter for k in KINDS.values() if k.is_send} == {"SA", "SG", "SR", "SL"}
    assert {k.letter for k in KINDS.values() if k.is_recv} == {"RA", "RG", "RR", "RL"}
    for kind in KINDS.values():
        if kind.moves:
            assert matching(kind).moves not in (None, kind.moves) and matching(matching(kind)) is kind
        assert copy.deepcopy(kind) is kind and pickle.loads(pickle.dumps(kind)) is kind


def test_an_action_is_a_value() -> None:
    assert len({Action(1, Kind.BACKWARD, 2), parse_action("1B2")}) == 1
