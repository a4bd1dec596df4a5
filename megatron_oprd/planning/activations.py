"""What a forward pass keeps for the backward pass, and what a pass needs beside that.

The tensors are those that megatron-core's layers save, one by one, on the path `Kernels` names.
Tests compare the sums with what passes on the CPU really save and allocate. The paths of a GPU have
not been measured, neither Transformer Engine's nor the local one: they are assumed to save what
fused kernels have to (a norm its input, SwiGLU its input), and no workspace of cuBLAS, cuDNN or
NCCL is counted. A mixture of experts is assumed to share tokens out equally.
"""

from dataclasses import dataclass

from megatron_oprd.config.schema import ParallelConfig
from megatron_oprd.models.architecture import Architecture

_FP32 = 4
_INT64 = 8


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Which implementation the layers have, as far as it decides what they save.

    Attributes:
        fused_norm: RMSNorm saves its input and one number a vector. Otherwise (torch on the CPU)
            it saves input and normalised input in fp32.
        fused_swiglu: The gated SiLU saves its input only. Otherwise also SiLU's output and the
            factor it is multiplied with.
        transformer_engine: Attention and experts are Transformer Engine's. Otherwise ranks that
            share a sequence gather all its keys and values, and save them; packed sequences are
            attended one by one and put together; and so are experts run.
    """

    fused_norm: bool
    fused_swiglu: bool
    transformer_engine: bool


KERNELS = {
    "transformer_engine": Kernels(fused_norm=True, fused_swiglu=True, transformer_engine=True),
    "local": Kernels(fused_norm=True, fused_swiglu=False, transformer_engine=False),
    "cpu": Kernels(fused_norm=False, fused_swiglu=False, transformer_engine=False),
}


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One layer on one rank, at work on one micro-batch.

    Attributes:
        architecture: The model's.
        parallel: The layout.
        kernels: The implementation.
        num_rows: Rows of the micro-batch.
        row_tokens: Tokens of a row on a context-parallel rank, [s/cp].
        is_packed: Whether a row has several sequences.
        itemsize: Bytes of an element of the hidden states.
    """

    architecture: Architecture
    parallel: ParallelConfig
    kernels: Kernels
    num_rows: int
    row_tokens: int
    is_packed: bool
    itemsize: int

    @property
    def tp(self) -> int:
        """Tensor-parallel size."""
        return self.parallel.tensor_model_parallel_size

    @property
    def groups(self) -> int:
        """Key/value heads on this rank."""
        return max(self.architecture.num_query_groups // self.tp, 1)

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch on a context-parallel rank."""
        return self.num_rows * self.row_tokens

    @property
    def sliced_tokens(self) -> int:
        """Tokens of which this rank holds the hidden states between parallel regions."""
        return self.tokens // (self.tp if self.parallel.sequence_parallel else 1)

    @property
    def hidden_bytes(self) -> int:
        """A hidden state as it goes from layer to layer, [s/tp, b, h] or [s, b, h]."""
        return self.sliced_tokens * self.architecture.hidden_size * self.itemsize

    @property
    def gathered_bytes(self) -> int:
        """The hidden states of all the micro-batch's tokens, [s, b, h]."""
        return self.tokens * self.architecture.hidden_size * self.itemsize

    @property
    def mlp_tokens(self) -> int:
        """Tokens that this rank's MLP sees; those of a mixture of experts in equal shares.

        A token counts for each expert that it goes through.
        """
        moe = self.architecture.moe
        if moe is None:
            return self.tokens
        return self.sliced_tokens * moe.num_experts_per_token * self.parallel.expert_tensor_size

    @property
    def mlp_width(self) -> int:
        """This rank's share of a gated MLP's width, f/tp."""
        moe = self.architecture.moe
        if moe is None:
            return self.architecture.ffn_hidden_size // self.tp
        return moe.ffn_hidden_size // self.parallel.expert_tensor_size

    @property
    def mlp_bytes(self) -> int:
        """The gated MLP's inner activation, [s, b, f/tp]."""
        return self.mlp_tokens * self.mlp_width * self.itemsize

    @property
    def dispatched_bytes(self) -> int:
        """The hidden states that the router sends to this rank's experts."""
        return self.mlp_tokens * self.architecture.hidden_size * self.itemsize

    @property
    def query_bytes(self) -> int:
        """This rank's query heads, [s, b, heads/tp * head_dim]."""
        a = self.architecture
        return self.tokens * a.num_attention_heads * a.head_dim * self.itemsize // self.tp

    @property
    def key_bytes(self) -> int:
        """This rank's key heads, [s, b, groups/tp * head_dim]; at least one."""
        return self.tokens * self.groups * self.architecture.head_dim * self.itemsize

    @property
    def rotary_bytes(self) -> int:
        """Cosines or sines of the rotation, [s, 1, 1, head_dim]."""
        a = self.architecture
        return self.row_tokens * a.rope.rotary_dim(a.head_dim) * self.itemsize


def saved_by_layer(shape: LayerShape, *, recompute_attention: bool) -> int:
    """Bytes that one layer saves, but for those of a tap.

    Args:
        shape: The layer.
        recompute_attention: Whether the attention core is recomputed (selective recompute).
    """
    return _saved_by_attention(shape, recompute_attention) + _saved_by_mlp(shape)


def saved_by_norm(shape: LayerShape) -> int:
    """Bytes that a norm in front of a layer's halves, or the final norm, saves."""
    return _norm(shape, vectors=shape.sliced_tokens, width=shape.architecture.hidden_size)


def saved_by_tap(shape: LayerShape, rows: int) -> int:
    """Bytes of the loss gradient, at ``rows`` positions, that a tap keeps for the backward pass."""
    return rows * shape.architecture.hidden_size * shape.itemsize


def saved_by_head(shape: LayerShape, rows: int, *, vocab_size: int) -> int:
    """Bytes of an output-space loss's gradients, of ``rows`` hidden states and of the LM head."""
    columns, width = vocab_size // shape.tp, shape.architecture.hidden_size
    return rows * (width * shape.itemsize + _INT64) + columns * width * shape.itemsize


def saved_by_recomputed(shape: LayerShape, *, distribute: bool) -> int:
    """Bytes that a recomputed run of layers saves: its input.

    Args:
        shape: The first of the layers.
        distribute: Whether each tensor-parallel rank keeps its share of it.
    """
    return shape.hidden_bytes // (shape.tp if distribute else 1)


def backward_workspace(shape: LayerShape) -> int:
    """Bytes that a layer's backward pass needs beside what the forward pass saved.

    The gated MLP's comes first and is the largest; as it goes on, what was saved is freed.
    """
    a, f = shape.architecture, shape.mlp_bytes
    linear_fc2 = a.hidden_size * shape.mlp_width * shape.itemsize
    if a.moe is not None and shape.kernels.transformer_engine:
        linear_fc2 *= a.moe.num_experts // shape.parallel.expert_model_parallel_size
    steps = [
        f + linear_fc2,  # gradients of linear_fc2's input and weight
        f * (2 if shape.kernels.fused_swiglu else 1),  # of gate and up, less what is freed by then
        2 * linear_fc2 - f,  # of linear_fc1's weight, likewise
    ]
    if a.moe is not None:
        # The gradient on its way to the experts and into their order, and their output.
        return max(steps) + 3 * shape.dispatched_bytes + 2 * shape.hidden_bytes
    # The gradient that comes in, gathered; the layer's output, if recomputed; under sequence
    # parallelism the input that is gathered again.
    gathered = shape.gathered_bytes * (2 if shape.parallel.sequence_parallel else 1)
    return max(steps) + gathered + shape.hidden_bytes


def embedding_workspace(shape: LayerShape, *, padded_vocab_size: int) -> int:
    """Bytes of the embedding's gradient, which is dense, and of the one that comes back to it."""
    a = shape.architecture
    return padded_vocab_size * a.hidden_size * shape.itemsize // shape.tp + shape.gathered_bytes


def tap_workspace(shape: LayerShape, rows: int) -> int:
    """Bytes that a tap needs while it compares ``rows`` hidden states with their targets."""
    # The rows and their gradient; in fp32 both sides, the difference, and its square or product.
    return rows * shape.architecture.hidden_size * (2 * shape.itemsize + 5 * _FP32)


def head_workspace(
    shape: LayerShape, rows: int, *, chunk_rows: int, teacher_width: int, vocab_size: int
) -> int:
    """Bytes that an output-space loss needs beside the gradients that it saves.

    Args:
        shape: A layer of the student.
        rows: Compared positions.
        chunk_rows: Positions whose logits exist at a time.
        teacher_width: The teacher's hidden size.
        vocab_size: Rows of either head, over all ranks.
    """
    columns, width = vocab_size // shape.tp, shape.architecture.hidden_size
    chunk = min(chunk_rows, rows)
    # The rows, and a chunk of both models' rows.
    of_rows = (rows * width + chunk * (width + teacher_width)) * shape.itemsize
    # The head's gradient, summed in fp32 (which is what is saved if that is its format), and that
    # of a chunk.
    of_head = columns * width * (shape.itemsize + (_FP32 if shape.itemsize != _FP32 else 0))
    # Both models' logits, their log-probabilities, and what a loss makes of them.
    return of_rows + of_head + chunk * columns * (2 * shape.itemsize + 6 * _FP32)


def logprob_workspace(shape: LayerShape, rows: int, *, vocab_size: int) -> int:
    """Bytes that log-probabilities of tokens need at the LM head.

    Args:
        shape: A layer of the model.
        rows: Positions whose logits exist at a time.
        vocab_size: Rows of the head, over all ranks.
    """
    columns, width = vocab_size // shape.tp, shape.architecture.hidden_size
    gathered = shape.gathered_bytes if shape.parallel.sequence_parallel else 0
    # The logits, centred, and their exponentials.
    of_rows = rows * (width * shape.itemsize + 3 * columns * _FP32)
    return shape.hidden_bytes + gathered + of_rows


def forward_workspace(shape: LayerShape) -> int:
    """Bytes that a forward pass that saves nothing needs, at the end of the gated MLP."""
    is_dense = shape.architecture.moe is None
    # The experts' input, and their output.
    entered = shape.gathered_bytes if is_dense else 2 * shape.dispatched_bytes
    return _num_inner(shape) * shape.mlp_bytes + entered + 2 * shape.hidden_bytes


def _saved_by_attention(shape: LayerShape, recompute_attention: bool) -> int:
    a = shape.architecture
    heads = a.num_attention_heads // shape.tp
    saved = saved_by_norm(shape) + shape.hidden_bytes  # the norm; its output, for linear_qkv
    # Query, key and value in one tensor, of which the values are a view. Query and key after the
    # rotation, and the attention's output, which is linear_proj's input.
    saved += (shape.query_bytes + 2 * shape.key_bytes) + (shape.query_bytes + shape.key_bytes)
    saved += shape.query_bytes
    saved += 4 * shape.rotary_bytes  # cosines and sines, for query and for key
    cp = shape.parallel.context_parallel_size
    if cp > 1 and not shape.kernels.transformer_engine:
        # Keys and values are saved gathered only; the one tensor then, if a norm has a view of it.
        saved += (2 * cp - 1) * shape.key_bytes
        saved -= 0 if a.qk_norm else shape.query_bytes + 2 * shape.key_bytes
        saved += shape.row_tokens * shape.row_tokens * cp  # which of them a query may see
    if shape.is_packed and not shape.kernels.transformer_engine:
        saved += shape.query_bytes  # put together, for linear_proj
    if not recompute_attention:
        saved += shape.tokens * heads * _FP32  # log-sum-exp of each row
    if a.qk_norm:
        for count in (heads, shape.groups):
            saved += _norm(shape, vectors=shape.tokens * count, width=a.head_dim)
        if shape.kernels.fused_norm or shape.itemsize == _FP32:
            saved -= shape.key_bytes  # the key norm's input is a view of the one tensor
            if shape.groups == 1:
                saved -= shape.query_bytes  # and so is the query norm's
    return saved


def _saved_by_mlp(shape: LayerShape) -> int:
    # The norm; its output, for linear_fc1 or the router.
    saved = saved_by_norm(shape) + shape.hidden_bytes
    saved += _num_inner(shape) * shape.mlp_bytes
    moe = shape.architecture.moe
    if moe is not None:
        saved += shape.dispatched_bytes  # for linear_fc1
        k, tokens = moe.num_experts_per_token, shape.sliced_tokens
        # Probabilities of all experts and whether each was chosen; which were, with what
        # probability, and where their tokens went.
        saved += tokens * (
            moe.num_experts * (shape.itemsize + 1) + k * (2 * _INT64 + shape.itemsize)
        )
    return saved


def _num_inner(shape: LayerShape) -> int:
    """Tensors of the MLP's inner width: gate and up, and what is computed of them."""
    if shape.kernels.fused_swiglu:
        return 3
    # An expert's output is scaled with its probability.
    return 5 if shape.architecture.moe is None else 6


def _norm(shape: LayerShape, *, vectors: int, width: int) -> int:
    """Bytes saved by a norm over ``vectors`` vectors of ``width``."""
    if shape.kernels.fused_norm:
        return vectors * (width * shape.itemsize + _FP32)
    return vectors * (2 * width * _FP32 + _FP32)
