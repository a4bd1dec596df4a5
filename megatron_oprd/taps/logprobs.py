"""Log-probabilities of given tokens at the LM head, on the last pipeline stage."""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_oprd.data.batching import MicroBatch
from megatron_oprd.losses.vocabulary import VocabularyShard, gather, log_softmax

CHUNK_TOKENS = 512


class ResponseLogprobs:
    """Takes the log-probabilities of the step's response tokens by a model's raw logits.

    The vocabulary stays divided over the tensor-parallel ranks, and logits exist for
    ``CHUNK_TOKENS`` positions at a time. Only the ranks of the last stage call `collect`.

    Args:
        head: This rank's rows of the LM head, [padded_vocab_size/tp, h]; None on other stages.
        shard: This rank's columns of the vocabulary.
        is_meaningless: Which of them are left out of the distribution, [v], bool.
        num_tokens: Response tokens of the whole step.
        sequence_parallel: Whether hidden states are split over the shard's group.
    """

    def __init__(
        self,
        head: Tensor | None,
        *,
        shard: VocabularyShard,
        is_meaningless: Tensor,
        num_tokens: int,
        sequence_parallel: bool,
    ) -> None:
        self._head = head
        self._shard = shard
        self._is_meaningless = is_meaningless
        self._sequence_parallel = sequence_parallel
        self._found = torch.zeros(num_tokens, device=is_meaningless.device)

    def collect(self, hidden: Tensor, micro_batch: MicroBatch) -> None:
        """Takes those of a micro-batch. Communicates on the shard's group.

        Args:
            hidden: After the final norm, [s, b, h], or [s/tp, b, h] under sequence parallelism.
            micro_batch: What it is of, with ``response_tokens``.
        """
        assert micro_batch.response_tokens is not None
        assert self._head is not None
        if self._sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self._shard.group)
        # [b, s] --> [s * b]
        numbers = micro_batch.response_tokens.t().flatten()
        index = numbers.nonzero().squeeze(1)
        labels = micro_batch.labels.t().flatten()[index].to(hidden.device)
        numbers, index = (numbers[index] - 1).to(hidden.device), index.to(hidden.device)
        rows, head = hidden.flatten(0, 1), self._head[: self._shard.size]
        for chunk in torch.arange(len(index), device=index.device).split(CHUNK_TOKENS):
            logits = (rows[index[chunk]] @ head.t()).float()
            logits.masked_fill_(self._is_meaningless, -torch.inf)
            logprobs = gather(log_softmax(logits, self._shard), labels[chunk, None], self._shard)
            self._found[numbers[chunk]] = logprobs.squeeze(1)

    def all(self) -> Tensor:
        """Those of all tokens of the step, [num_tokens], fp32, the same on every rank.

        Every rank has to call.
        """
        if self._shard.group.rank() != 0:
            self._found.zero_()  # these ranks have what tensor rank 0 has
        dist.all_reduce(self._found)
        return self._found
