"""Memory goes round, and never while something still looks at it."""

import torch

from c2r.data.buffers import Buffers


def test_a_block_comes_back_when_the_last_view_is_gone() -> None:
    buffers = Buffers(1000)
    first = buffers.take(800)
    address = first.ctypes.data
    tensor = torch.from_numpy(first)[100:200].view(5, 20)
    del first
    other = buffers.take(1000)
    assert other.ctypes.data != address  # the tensor still looks at the first
    tensor.fill_(7)
    other[:] = 1
    assert (tensor == 7).all()
    del tensor
    again = buffers.take(600)
    assert again.ctypes.data == address
    assert len(again) == 600
