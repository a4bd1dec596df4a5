"""What a model is told of packed sequences."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_oprd.data.batching import collate
from megatron_oprd.models.layers import HostPackedSeqParams, ScaledDotProductAttention
from megatron_oprd.models.schedule import packed_seq_params


def test_lengths_and_ends() -> None:
    (whole,) = collate(
        [[1, 0]],
        [[5, 6], [7, 8, 9, 4]],
        is_packed=True,
        pad_to_multiple_of=4,
        device=torch.device("cpu"),
    )
    found = packed_seq_params(whole.input)
    assert found is not None
    assert (found.lengths, found.qkv_format) == ((4, 2, 2), "thd")
    assert found.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    assert (found.max_seqlen_q, found.max_seqlen_kv) == (4, 4)
    for ends in (found.cu_seqlens_q, found.cu_seqlens_kv):
        assert (ends.tolist(), ends.dtype) == ([0, 4, 6, 8], torch.int32)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, (1, 0)])
def test_attention_asks_the_device_for_nothing(
    window: tuple[int, int] | None, softcap: float | None
) -> None:
    """On the meta device there are no values: whoever asks for one gets an error."""
    alone = SimpleNamespace(size=lambda: 1)
    groups: Any = SimpleNamespace(cp=alone, tp=alone)
    config: Any = SimpleNamespace(
        attention_dropout=0.0,
        window_size=window,
        window_attn_skip_freq=None,
        softmax_type="vanilla",
        score_softcap=softcap,
    )
    attention = ScaledDotProductAttention(
        config, 1, AttnMaskType.causal, "self", pg_collection=groups
    )
    ends = torch.empty(4, dtype=torch.int32, device="meta")
    packed = HostPackedSeqParams(
        lengths=(4, 2, 2), positions=ends, cu_seqlens_q=ends, cu_seqlens_kv=ends
    )
    query, key = torch.empty(8, 4, 16, device="meta"), torch.empty(8, 2, 16, device="meta")
    out = attention(query, key, key, None, packed_seq_params=packed)
    assert out.shape == (8, 64)
