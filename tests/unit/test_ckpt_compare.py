"""Differences of a checkpoint and a model, as messages have them."""

from __future__ import annotations

from deepspeed._core.ckpt.compare import differences, listed


def test_kinds_with_names_and_shapes() -> None:
    saved = {"a": (2, 3), "gone": (4,), "b": (), "extra_state": None}
    wanted = {"a": (3, 2), "b": (), "new": (1, 2), "extra_state": (3,)}
    assert differences(saved, wanted) == [
        "not in the checkpoint: 'new' (1, 2)",
        "in the checkpoint only: 'gone' (4,)",
        "of another shape: 'a' (3, 2) in the model and (2, 3) in the checkpoint",
    ]
    assert differences(saved, wanted, names=False) == [
        "of another shape: 'a' (3, 2) in the model and (2, 3) in the checkpoint"
    ]
    assert differences(saved, dict(saved)) == []


def test_the_first_ten_of_each_kind() -> None:
    many = {f"p{i:02}": (i,) for i in range(25)}
    (clause,) = differences({}, many)
    assert clause.startswith("not in the checkpoint: 'p00' (0,), 'p01' (1,)")
    assert clause.endswith("'p09' (9,) and 15 more")
    assert len(differences({**many, "q": ()}, {**{n: (99,) for n in many}, "r": ()})) == 3
    assert listed([f"{i}" for i in range(10)]).endswith("'9'")
