"""Activation memory of a gated DeltaNet: what its plain torch saves, and needs beside it.

The tensors are those of `models.gated_delta_net` and `models.delta_rule`, one by one. Tests compare
the sums with tensors saved and allocated on the CPU.
"""

from dataclasses import dataclass, replace

from megatron_oprd.models.architecture import DeltaNet
from megatron_oprd.models.delta_rule import CHUNK

_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class DeltaShape:
    """Sizes of one layer's tensors on one rank, for one micro-batch."""

    delta: DeltaNet
    tp: int  # tensor-parallel size, which divides the heads
    num_sequences: int  # of equal length
    sequence_tokens: int
    itemsize: int  # bytes per element of the hidden states
    is_packed: bool  # sequences go through one by one

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return min(CHUNK, self.sequence_tokens)

    @property
    def key_heads(self) -> int:
        """This rank's key heads."""
        return self.delta.num_key_heads // self.tp

    @property
    def value_heads(self) -> int:
        """This rank's value heads."""
        return self.key_heads * self.delta.values_per_key

    @property
    def num_chunks(self) -> int:
        """Chunks of all heads and sequences, the last of each filled up."""
        return self.value_heads * self.num_sequences * -(-self.sequence_tokens // self.chunk)

    @property
    def matrix_bytes(self) -> int:
        """One matrix of tokens by tokens for each chunk, in fp32."""
        return self.num_chunks * self.chunk * self.chunk * _FP32

    @property
    def heads_bytes(self) -> int:
        """One number for each token and value head, in fp32, chunks filled up."""
        return self.num_chunks * self.chunk * _FP32

    @property
    def at_once(self) -> "DeltaShape":
        """The shape of what goes through the rule together."""
        return replace(self, num_sequences=1) if self.is_packed else self

    @property
    def input_bytes(self) -> int:
        """Queries, keys and values for each value head, and the channels that they are made of."""
        delta = self.delta
        width = 2 * delta.key_dim + delta.value_dim
        of_heads = self.num_sequences * self.sequence_tokens * self.value_heads * width * _FP32
        # In bf16 the channels are there in both formats.
        rounded = self.channel_bytes * self.itemsize // _FP32 if self.itemsize != _FP32 else 0
        return of_heads + self.channel_bytes + rounded

    @property
    def value_bytes(self) -> int:
        """Values, or gates, of all tokens."""
        heads = self.value_heads * self.delta.value_dim
        return self.num_sequences * self.sequence_tokens * heads * self.itemsize

    @property
    def projected_bytes(self) -> int:
        """The output of the projection of the input: channels and gates."""
        return self.channel_bytes * self.itemsize // _FP32 + self.value_bytes

    @property
    def concatenated_bytes(self) -> int:
        """Outputs of packed sequences, before they are put together."""
        return self.value_bytes if self.is_packed else 0

    @property
    def channel_bytes(self) -> int:
        """Queries, keys and values before the rule, in fp32."""
        channels = self.key_heads * self.delta.channels_per_key
        return self.num_sequences * self.sequence_tokens * channels * _FP32


def saved_by_delta_net(shape: DeltaShape) -> int:
    """Bytes saved behind the projections of the input, up to the last projection's input."""
    delta = shape.delta
    rows = shape.num_sequences * shape.sequence_tokens
    # The convolution's input, with zeros in front, and its output; SiLU's output.
    channels = shape.key_heads * delta.channels_per_key
    in_front = shape.num_sequences * (delta.kernel_size - 1) * channels * shape.itemsize
    saved = in_front + 2 * shape.channel_bytes * shape.itemsize // _FP32 + shape.channel_bytes
    saved += 2 * rows * shape.key_heads * _FP32  # lengths of queries and keys
    # Strengths, and softplus's input and output.
    saved += rows * shape.value_heads * (shape.itemsize + 2 * _FP32)
    saved += _saved_by_rule(shape)
    # The rule's output (in fp32 with its last chunks filled up) and its lengths; SiLU's input and
    # output; the normalised heads, the same times the norm's weight, and what is projected.
    values = rows * shape.value_heads * delta.value_dim
    is_filled_up = shape.itemsize == _FP32
    saved += shape.heads_bytes * delta.value_dim if is_filled_up else values * _FP32
    saved += values * (2 * _FP32 + 3 * shape.itemsize) + rows * shape.value_heads * _FP32
    return saved


def forward_workspace_of_delta_net(shape: DeltaShape) -> int:
    """Bytes of a forward pass that saves nothing, at its largest."""
    one, delta = shape.at_once, shape.delta
    # What goes into the rule, as it is and with chunks filled up.
    entered = one.input_bytes + one.heads_bytes * (2 * delta.key_dim + delta.value_dim)
    # While the system is made, or while chunks read and write the state: the system's solution,
    # what reads and writes, the outputs and these concatenated.
    making = 5 * one.matrix_bytes
    solved = one.heads_bytes * (3 * delta.key_dim + 3 * delta.value_dim)
    reading = 3 * one.matrix_bytes + solved
    return entered + max(making, reading) + shape.projected_bytes + shape.concatenated_bytes


def backward_workspace_of_delta_net(shape: DeltaShape) -> int:
    """Bytes beside what is saved, at the end of the forward pass or in the backward pass."""
    one = shape.at_once
    outputs = 2 * one.heads_bytes * shape.delta.value_dim
    return one.input_bytes + outputs + shape.projected_bytes + shape.concatenated_bytes


def _saved_by_rule(shape: DeltaShape) -> int:
    delta, of_token = shape.delta, shape.heads_bytes
    # What is left between tokens, the same times strengths, products of keys and keys, the system,
    # products of queries and keys, and the same times what is left.
    saved = 6 * shape.matrix_bytes
    # Queries and keys; what reads and what writes the state. The system's right side and solution.
    # Corrections.
    saved += of_token * (4 * delta.key_dim + 2 * (delta.key_dim + delta.value_dim))
    saved += of_token * delta.value_dim
    saved += 4 * of_token  # strengths, and three exponentials of decays
    # The state before each chunk.
    return saved + shape.num_chunks * delta.key_dim * delta.value_dim * _FP32
