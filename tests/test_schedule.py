"""The count of steps follows its buffer, whoever writes to it."""

import copy
import pickle

import torch

from spectral_peft.schedule import Count


def counted(number: int) -> tuple[Count, torch.Tensor]:
    count, buffer = Count(), torch.tensor(number)
    assert count.of(buffer) == number
    return count, buffer


def test_counts():
    count, buffer = counted(3)
    assert (count.add_one_(buffer), count.of(buffer), int(buffer)) == (4, 4, 4)


def test_sees_what_others_write():
    count, buffer = counted(3)
    buffer.copy_(torch.tensor(7))
    assert count.of(buffer) == 7
    assert count.of(torch.tensor(9)) == 9


def test_a_copy_counts_for_itself():
    count, buffer = counted(3)
    for other, own in (copy.deepcopy((count, buffer)), pickle.loads(pickle.dumps((count, buffer)))):
        assert other.add_one_(own) == 4
        assert (count.of(buffer), int(own)) == (3, 4)
