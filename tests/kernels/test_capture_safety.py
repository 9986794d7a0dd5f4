import pytest
import torch
from capture_safety import operations_of

VALUES = torch.arange(4.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: VALUES.sum().item(),
        lambda: bool(VALUES[0] > 0),
        lambda: VALUES[VALUES > 1],
        lambda: VALUES.masked_select(VALUES > 1),
        lambda: (VALUES > 1).nonzero(),
        lambda: torch.where(VALUES > 1),
        lambda: VALUES.unique(),
        lambda: VALUES.long().bincount(),
        lambda: VALUES.repeat_interleave(torch.tensor([1, 0, 2, 1])),
        lambda: VALUES.clone().index_put_((VALUES > 1,), torch.zeros(2)),
        lambda: torch.tensor([1.0, 2.0]),
    ],
)
def test_what_cannot_be_captured_fails(call):
    with pytest.raises(AssertionError, match="cannot be captured"):
        operations_of(call)


def test_operators_and_their_shapes_are_listed():
    assert operations_of(lambda: (VALUES[:2] + 1).sum()) == [
        ("slice", [(2,)]),
        ("add", [(2,)]),
        ("sum", [()]),
    ]
