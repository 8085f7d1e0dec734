"""How a rank's tensors are copied before they are written."""

from __future__ import annotations

import torch

from lbr_dist.checkpoint.saver import _runs


def test_tensors_that_lie_one_behind_the_other_are_copied_at_once() -> None:
    flat, other = torch.arange(10.0), torch.arange(4.0)
    tensors = {"a": flat[:3], "x": other[:2], "b": flat[3:5], "c": flat[6:8], "y": other[2:], "d": flat[8:]}
    assert sorted(_runs(tensors)) == [["a", "b"], ["c", "d"], ["x", "y"]]
