"""RMSNorm over all heads of the queries, or of the keys, at once."""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class WideNorm(MegatronModule):
    """``q_norm`` and ``k_norm`` of transformers' OLMo-2, for heads split over ``tp_group``.

    Every rank holds the whole weight and uses its heads' part. Megatron sums the gradients of
    q_layernorm and k_layernorm over the group, which makes them those of the whole weight.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,  # of one head: what Megatron's norms of queries and keys span
        eps: float,
        *,
        width: int,  # of all heads on all ranks
        tp_group: dist.ProcessGroup,
    ) -> None:
        super().__init__(config)
        assert width % hidden_size == 0
        self._eps = eps
        self._group = tp_group
        self.weight = torch.nn.Parameter(
            torch.ones(width, device=torch.cuda.current_device(), dtype=config.params_dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Normalises this rank's heads, [s, b, heads, dim]. Communicates on ``tp_group``."""
        in_fp32 = x.float()
        squares = in_fp32.pow(2).sum((2, 3), keepdim=True)
        size, local = self._group.size(), x.shape[2] * x.shape[3]
        if size > 1:
            # The sum is used on every rank, so its gradient is summed over them as well: that is
            # what the outer function does.
            squares = copy_to_tensor_model_parallel_region(
                reduce_from_tensor_model_parallel_region(squares, group=self._group),
                group=self._group,
            )
        # With fewer key heads than ranks several ranks have the same head: it counts as often in
        # the sum as in the divisor.
        scale = torch.rsqrt(squares / (size * local) + self._eps)
        first = self._group.rank() * self.weight.numel() // size // local * local
        weight = self.weight[first : first + local].view(x.shape[2:])
        return (weight * (in_fp32 * scale)).to(x.dtype)
