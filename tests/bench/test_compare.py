"""The comparison itself: peers found, rounds in turn, failures told, the printed table."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from bench import compare
from bench.cases import CASES
from bench.engines import publishers_name, publishers_rows


def test_an_interpreter_is_asked_for_what_it_has_and_named_once():
    peers = compare.find_peers([sys.executable, sys.executable])
    assert len({peer.label for peer in peers}) == len(peers)


def test_a_peer_can_do_what_its_packages_allow():
    prompt, training, product = (
        next(c for c in CASES if c.kind == kind) for kind in ("prompt", "training", "product")
    )
    torch = compare.Peer("torch", "python", {"torch": "2.13.0+cpu", "transformers": "5"})
    assert torch.label == "torch 2.13.0"
    assert [torch.can(c) for c in (prompt, training, product)] == [True, False, True]
    llama = compare.Peer("llama.cpp", "python", {"llama_cpp_python": "0.3"})
    assert llama.label == "llama-cpp-python 0.3"
    assert [llama.can(c) for c in (prompt, training, product)] == [True, False, False]


def test_a_child_answers_once_ready_and_once_a_round():
    case = {"kind": "product", "shape": (8, 32, 16), "threads": 1}
    with compare.started("ours", sys.executable, case) as child:
        answers = [child.first, child.round(), child.round()]
    assert all(answer["seconds"] > 0 for answer in answers)


def test_a_child_that_fails_is_told_by_its_last_line():
    case = {"kind": "product"}
    with (
        pytest.raises(compare.Failed, match="shape"),
        compare.started("ours", sys.executable, case),
    ):
        pass


def test_the_printed_table_has_a_column_a_peer_and_gaps():
    rows = [
        {"what": "a", "threads": 2, "unit": "s", "ours": 1.0, "peers": {}, "of peak": 0.5},
        {
            "what": "long name",
            "threads": 1,
            "unit": "tokens/s",
            "ours": 2000.0,
            "peers": {"torch 2": {"value": 1000.0, "ratio": 2.0}},
            "target": {"value": 4000.0, "ratio": 0.5},
        },
    ]
    assert compare.text_table(rows).splitlines() == [
        "           threads   ours                   torch 2          target  of peak",
        "a                2   1.00  s                                            50 %",
        "long name        1  2,000  tokens/s  1,000 (× 2.00)  4,000 (× 0.50)",
    ]


def test_threads_are_a_list_and_quick_means_one_round():
    options = compare.parse(["--threads", "4,2,4", "--quick", "--rounds", "9"])
    assert options.threads == [4, 2]
    assert options.rounds == 1


def test_names_and_rows_of_the_publishers_form():
    assert publishers_name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert publishers_name("output.weight") == "lm_head.weight"
    # Two heads of four rows: pairs (0, 2), (1, 3) of a head stand together in a GGUF file.
    stored = np.array([0, 2, 1, 3, 4, 6, 5, 7]).reshape(8, 1)
    assert publishers_rows(stored, 2)[:, 0].tolist() == list(range(8))
