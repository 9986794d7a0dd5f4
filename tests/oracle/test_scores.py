"""The stored form: what comes back, and what is refused."""

import numpy as np
import pytest

from tests.oracle.scores import Scores, likeliest
from tests.oracle.sequences import PROMPT_LENGTHS, Sequence, draw_sequences


def scores(**changes) -> Scores:
    fields = {
        "checkpoint": "abc",
        "sequences": [Sequence((5, 6), 1), Sequence((7,), 1)],
        "tokens": np.array([[0, 1], [3, 2], [1, 9]], np.int32),
        "logprobs": np.array([[-1, -2], [-0.5, -3], [-0.25, -8]], np.float32),
        "vocab_size": 10,
        "facts": {"implementation": "by hand"},
    }
    return Scores(**(fields | changes))


def test_what_is_stored_comes_back(tmp_path):
    path = tmp_path / "run.npz"
    scores().save(path)
    found = Scores.load(path)
    assert found.sequences == scores().sequences
    assert (found.checkpoint, found.vocab_size) == ("abc", 10)
    assert found.facts == {"implementation": "by hand"}
    assert np.array_equal(found.tokens, scores().tokens)
    assert np.array_equal(found.logprobs, scores().logprobs)
    assert found.logprobs.dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequences": [Sequence((5, 6), 1)]}, r"tokens: shape \(3, 2\), allowed: \(2, K\)"),
        ({"logprobs": np.zeros((3, 1), np.float32)}, r"logprobs: shape \(3, 1\)"),
        ({"vocab_size": 1}, "tokens: 2 kept of 1"),
        ({"vocab_size": 9}, "tokens: an id outside 0 to 8"),
        ({"tokens": np.array([[0, 1], [2, 2], [1, 9]], np.int32)}, "tokens: an id twice"),
        (
            {"logprobs": np.array([[-1, -2], [np.nan, -3], [0, -8]], np.float32)},
            "logprobs: not finite at position 1",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        scores(**changes)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, tokens=np.zeros(3))
    with pytest.raises(ValueError, match="no stored run"):
        Scores.load(path)
    with pytest.raises(FileNotFoundError):
        Scores.load(tmp_path / "absent.npz")


def test_a_pickle_is_not_read(tmp_path):
    path = tmp_path / "pickled.npz"
    np.savez(path, tokens=np.array([{}], dtype=object), logprobs=np.zeros(1), about=np.array("{}"))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        Scores.load(path)


def test_the_likeliest_are_kept():
    rows = np.array([[-3.0, -1.0, -2.0, -4.0]])
    tokens, logprobs = likeliest(rows, 2)
    assert tokens.tolist() == [[1, 2]]
    assert logprobs.tolist() == [[-1.0, -2.0]]
    tokens, logprobs = likeliest(rows, 4)
    assert tokens.tolist() == [[0, 1, 2, 3]]
    assert logprobs.tolist() == rows.tolist()


def test_the_sequences_cross_what_kernels_divide_at():
    sequences = draw_sequences(1000)
    assert [s.prompt for s in sequences] == list(PROMPT_LENGTHS)
    for boundary in (128, 256, 512, 2048):
        assert any(s.prompt < boundary < len(s.tokens) for s in sequences), boundary
    assert min(s.prompt for s in sequences) == 1
    assert sequences == draw_sequences(1000)
    assert all(2 <= token < 1000 for s in sequences for token in s.tokens)


@pytest.mark.parametrize("arguments", [(2,), (10, ()), (10, (0,)), (10, (4,), -1)])
def test_impossible_sequences_are_refused(arguments):
    with pytest.raises(ValueError, match="allowed"):
        draw_sequences(*arguments)
