"""What a model is told of packed sequences."""

import torch

from megatron_oprd.data.batching import collate
from megatron_oprd.taps.schedule import _packed_seq_params


def test_lengths_and_ends() -> None:
    (whole,) = collate(
        [[1, 0]],
        [[5, 6], [7, 8, 9, 4]],
        [torch.ones(2), torch.ones(4)],
        is_packed=True,
        pad_to_multiple_of=4,
        device=torch.device("cpu"),
    )
    found = _packed_seq_params(whole)
    assert found is not None
    assert (found.lengths, found.qkv_format) == ((4, 2, 2), "thd")
    assert (found.max_seqlen_q, found.max_seqlen_kv) == (4, 4)
    for ends in (found.cu_seqlens_q, found.cu_seqlens_kv):
        assert (ends.tolist(), ends.dtype) == ([0, 4, 6, 8], torch.int32)
