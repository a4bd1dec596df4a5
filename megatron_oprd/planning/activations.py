"""Activation memory: what a forward pass saves for the backward pass, and workspaces.

The tensors are those that megatron-core's layers save, one by one, for the implementation in
`Kernels`. Tests compare the sums with tensors saved and allocated on the CPU. The GPU paths
(Transformer Engine and local) are not measured: they are assumed to save what fused kernels need (a
norm its input, SwiGLU its input). Workspaces of cuBLAS, cuDNN and NCCL are not counted. Experts are
assumed to get equal shares of the tokens.
"""

from dataclasses import dataclass

from megatron_oprd.config.schema import ParallelConfig
from megatron_oprd.models.architecture import Architecture, MixtureOfExperts
from megatron_oprd.models.softcap import BLOCK
from megatron_oprd.planning.delta_activations import (
    DeltaShape,
    backward_workspace_of_delta_net,
    forward_workspace_of_delta_net,
    saved_by_delta_net,
)

_FP32 = 4
_INT64 = 8


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Implementation of the layers, as far as it determines what they save."""

    # RMSNorm saves its input and one number per vector; otherwise (torch on the CPU) input and
    # normalised input in fp32.
    fused_norm: bool
    # SwiGLU saves only its input; otherwise also SiLU's output and the factor that it is multiplied
    # with.
    fused_swiglu: bool
    # Attention and experts are Transformer Engine's. Otherwise context-parallel ranks gather and
    # save a sequence's keys and values; packed sequences are attended one by one and concatenated;
    # experts run one by one, too.
    transformer_engine: bool


KERNELS = {
    "transformer_engine": Kernels(fused_norm=True, fused_swiglu=True, transformer_engine=True),
    "local": Kernels(fused_norm=True, fused_swiglu=False, transformer_engine=False),
    "cpu": Kernels(fused_norm=False, fused_swiglu=False, transformer_engine=False),
}


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Sizes of one layer's tensors on one rank, for one micro-batch."""

    architecture: Architecture
    has_experts: bool  # in the place of the gated MLP
    has_delta_net: bool  # in the place of attention
    parallel: ParallelConfig
    kernels: Kernels
    num_rows: int  # rows of the micro-batch
    row_tokens: int  # tokens of a row on a context-parallel rank, [s/cp]
    num_sequences: int  # of the micro-batch; more than rows if these are packed
    is_packed: bool  # a row has several sequences
    itemsize: int  # bytes per element of the hidden states

    @property
    def moe(self) -> MixtureOfExperts | None:
        """The layer's experts; None for a layer with a gated MLP."""
        return self.architecture.moe if self.has_experts else None

    @property
    def delta(self) -> DeltaShape | None:
        """The layer's gated DeltaNet; None for a layer with attention."""
        if not self.has_delta_net:
            return None
        assert self.architecture.delta is not None
        return DeltaShape(
            delta=self.architecture.delta,
            tp=self.tp,
            num_sequences=self.num_sequences,
            sequence_tokens=self.sequence_tokens,
            itemsize=self.itemsize,
            is_packed=self.is_packed,
        )

    @property
    def tp(self) -> int:
        """Tensor-parallel size."""
        return self.parallel.tensor_model_parallel_size

    @property
    def groups(self) -> int:
        """Key/value heads on this rank, at least one."""
        return max(self.architecture.num_query_groups // self.tp, 1)

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch on a context-parallel rank."""
        return self.num_rows * self.row_tokens

    @property
    def sequence_tokens(self) -> int:
        """Tokens of a sequence on a context-parallel rank, padding included."""
        return self.tokens // self.num_sequences

    @property
    def sliced_tokens(self) -> int:
        """Tokens whose hidden states this rank holds between parallel regions."""
        return self.tokens // (self.tp if self.parallel.sequence_parallel else 1)

    @property
    def hidden_bytes(self) -> int:
        """Hidden states between layers, [s/tp, b, h]; [s, b, h] without sequence parallelism."""
        return self.sliced_tokens * self.architecture.hidden_size * self.itemsize

    @property
    def gathered_bytes(self) -> int:
        """Hidden states of all tokens of the micro-batch, [s, b, h]."""
        return self.tokens * self.architecture.hidden_size * self.itemsize

    @property
    def mlp_tokens(self) -> int:
        """Tokens of this rank's MLP; a token counts once for each of its experts on this rank."""
        moe = self.moe
        if moe is None:
            return self.tokens
        # Equal shares. Expert-tensor-parallel ranks gather each other's tokens.
        return self.sliced_tokens * moe.num_experts_per_token * self.parallel.expert_tensor_size

    @property
    def mlp_width(self) -> int:
        """This rank's share of a gated MLP's width, f/tp."""
        moe = self.moe
        if moe is None:
            return self.architecture.ffn_hidden_size // self.tp
        return moe.ffn_hidden_size // self.parallel.expert_tensor_size

    @property
    def mlp_bytes(self) -> int:
        """The gated MLP's inner activation, [s, b, f/tp]."""
        return self.mlp_tokens * self.mlp_width * self.itemsize

    @property
    def dispatched_bytes(self) -> int:
        """Hidden states that the router dispatches to this rank's experts."""
        return self.mlp_tokens * self.architecture.hidden_size * self.itemsize

    @property
    def query_bytes(self) -> int:
        """This rank's query heads, [s, b, heads/tp * head_dim]."""
        a = self.architecture
        return self.tokens * a.num_attention_heads * a.head_dim * self.itemsize // self.tp

    @property
    def key_bytes(self) -> int:
        """This rank's key heads, [s, b, groups/tp * head_dim], at least one."""
        return self.tokens * self.groups * self.architecture.head_dim * self.itemsize

    @property
    def softcapped_bytes(self) -> int:
        """Scores of one block of queries, in fp32; 0 without a softcap."""
        a, length = self.architecture, self.sequence_tokens
        if a.score_softcap is None:
            return 0
        # Packed sequences are attended one by one.
        queries = (1 if self.is_packed else self.num_rows) * min(BLOCK, length)
        keys = length * self.parallel.context_parallel_size
        return queries * keys * a.num_attention_heads // self.tp * _FP32

    @property
    def rotary_bytes(self) -> int:
        """Cosines or sines of the rotary embedding, [s, 1, 1, head_dim]."""
        return self.row_tokens * self.architecture.rotary_dim * self.itemsize


def saved_by_layer(shape: LayerShape, *, recompute_attention: bool) -> int:
    """Bytes saved by a layer without taps; ``recompute_attention``: selective recompute."""
    return _saved_by_attention(shape, recompute_attention) + _saved_by_mlp(shape)


def saved_by_norm(shape: LayerShape) -> int:
    """Bytes saved by a norm on hidden states: a layer's norms and the final norm."""
    return _norm(shape, vectors=shape.sliced_tokens, width=shape.architecture.hidden_size)


def saved_by_tap(shape: LayerShape, rows: int) -> int:
    """Bytes of the loss gradient at ``rows`` positions, kept by a tap for the backward pass."""
    return rows * shape.architecture.hidden_size * shape.itemsize


def saved_by_head(shape: LayerShape, rows: int, *, vocab_size: int) -> int:
    """Bytes of an output-space loss's gradients: of ``rows`` hidden states and of the LM head."""
    columns, width = vocab_size // shape.tp, shape.architecture.hidden_size
    return rows * (width * shape.itemsize + _INT64) + columns * width * shape.itemsize


def saved_by_recomputed(shape: LayerShape, *, distribute: bool) -> int:
    """Bytes saved by a recomputed run of layers: its input, split over tp if ``distribute``."""
    return shape.hidden_bytes // (shape.tp if distribute else 1)


def backward_workspace(shape: LayerShape) -> int:
    """Bytes of a layer's backward pass in addition to saved activations.

    The gated MLP comes first and is the largest; later, saved activations have been freed.
    """
    a, f = shape.architecture, shape.mlp_bytes
    linear_fc2 = a.hidden_size * shape.mlp_width * shape.itemsize
    if shape.moe is not None and shape.kernels.transformer_engine:
        # Transformer Engine's grouped GEMM produces the gradients of all local experts at once.
        linear_fc2 *= shape.moe.num_experts // shape.parallel.expert_model_parallel_size
    steps = [
        f + linear_fc2,  # gradients of linear_fc2's input and weight
        f * (2 if shape.kernels.fused_swiglu else 1),  # of gate and up, minus what is freed by then
        2 * linear_fc2 - f,  # of linear_fc1's weight, minus what is freed by then
    ]
    if shape.moe is not None:
        # The dispatched gradient, its copy in the experts' order, and the experts' output.
        of_mlp = max(steps) + 3 * shape.dispatched_bytes + 2 * shape.hidden_bytes
    else:
        # The incoming gradient, gathered; the layer's output, if recomputed; with sequence
        # parallelism, the re-gathered input.
        gathered = shape.gathered_bytes * (2 if shape.parallel.sequence_parallel else 1)
        of_mlp = max(steps) + gathered + shape.hidden_bytes
    of_attention = 0
    if shape.delta is not None:
        of_attention = backward_workspace_of_delta_net(shape.delta)
    elif a.score_softcap is not None:
        # Scores in four steps of the formula or its gradient; gradients of query, key and value,
        # and those of the block before.
        of_attention = 4 * shape.softcapped_bytes + 2 * shape.query_bytes + 4 * shape.key_bytes
    # Of what the MLP saved nothing is left then.
    return max(of_mlp, of_attention + 2 * shape.hidden_bytes - _saved_by_mlp(shape))


def embedding_workspace(shape: LayerShape, *, padded_vocab_size: int) -> int:
    """Bytes of the embedding's dense gradient and of the gradient that reaches it."""
    a = shape.architecture
    return padded_vocab_size * a.hidden_size * shape.itemsize // shape.tp + shape.gathered_bytes


def tap_workspace(shape: LayerShape, rows: int) -> int:
    """Bytes that a tap needs to compare ``rows`` hidden states with their targets."""
    # The rows and their gradient; in fp32 both sides, the difference, and its square or product.
    return rows * shape.architecture.hidden_size * (2 * shape.itemsize + 5 * _FP32)


def head_workspace(
    shape: LayerShape, rows: int, *, chunk_rows: int, teacher_width: int, vocab_size: int
) -> int:
    """Bytes of an output-space loss in addition to the gradients that it saves.

    ``rows`` are compared positions; logits exist for ``chunk_rows`` of them at a time.
    ``vocab_size`` counts a head's rows over all ranks.
    """
    columns, width = vocab_size // shape.tp, shape.architecture.hidden_size
    chunk = min(chunk_rows, rows)
    # All rows, and a chunk of both models' rows.
    of_rows = (rows * width + chunk * (width + teacher_width)) * shape.itemsize
    # The head's gradient, accumulated in fp32 (in fp32 models this is the saved gradient), and a
    # chunk's gradient.
    of_head = columns * width * (shape.itemsize + (_FP32 if shape.itemsize != _FP32 else 0))
    # Both models' logits and log-probabilities, and intermediates of the loss.
    return of_rows + of_head + chunk * columns * (2 * shape.itemsize + 6 * _FP32)


def logprob_workspace(shape: LayerShape, rows: int, *, vocab_size: int) -> int:
    """Bytes for tokens' log-probabilities at the LM head, for ``rows`` positions at a time."""
    columns, width = vocab_size // shape.tp, shape.architecture.hidden_size
    gathered = shape.gathered_bytes if shape.parallel.sequence_parallel else 0
    # Logits, centred logits, and their exponentials.
    of_rows = rows * (width * shape.itemsize + 3 * columns * _FP32)
    return shape.hidden_bytes + gathered + of_rows


def forward_workspace(shape: LayerShape) -> int:
    """Bytes of a forward pass without saved activations, at the end of the gated MLP."""
    a, moe = shape.architecture, shape.moe
    if moe is None:
        # Without a norm before it and without slices, the MLP's input is the residual.
        is_residual = not a.pre_norms and not shape.parallel.sequence_parallel
        entered = 0 if is_residual else shape.gathered_bytes
    else:
        # Input and output of the experts, and the output of the one for all tokens.
        entered = 2 * shape.dispatched_bytes
        entered += 0 if moe.shared_ffn_hidden_size is None else shape.hidden_bytes
    of_mlp = _num_inner(shape) * shape.mlp_bytes + entered + 2 * shape.hidden_bytes
    of_attention = 0
    if shape.delta is not None:
        of_attention = forward_workspace_of_delta_net(shape.delta)
    elif a.score_softcap is not None:
        # Scores in three steps, beside query, key, value and the output.
        of_attention = 3 * shape.softcapped_bytes + 3 * shape.query_bytes + 3 * shape.key_bytes
    return max(of_mlp, of_attention + 2 * shape.hidden_bytes)


def _saved_by_attention(shape: LayerShape, recompute_attention: bool) -> int:
    a = shape.architecture
    if a.latent is not None:
        return _saved_by_latent_attention(shape, recompute_attention)
    if shape.delta is not None:
        # The norm, and the input of two projections.
        return _saved_by_norms(shape) + shape.hidden_bytes + saved_by_delta_net(shape.delta)
    heads = a.num_attention_heads // shape.tp
    saved = _saved_by_norms(shape) + shape.hidden_bytes  # the norms, and linear_qkv's input
    # Query, key and value in one tensor, of which the values are a view; query and key after the
    # rotation; the attention's output, which is linear_proj's input.
    saved += (shape.query_bytes + 2 * shape.key_bytes) + (shape.query_bytes + shape.key_bytes)
    saved += shape.query_bytes
    saved += 4 * shape.rotary_bytes  # cosines and sines, for query and for key
    if a.attention_gate:
        # Gates in the joint tensor; their sigmoids in fp32, and linear_proj's input.
        saved += 2 * shape.query_bytes + shape.query_bytes * _FP32 // shape.itemsize
    cp = shape.parallel.context_parallel_size
    if cp > 1 and not shape.kernels.transformer_engine:
        # Only gathered keys and values are saved. The joint tensor then survives only if a QK norm
        # has a view of it.
        saved += (2 * cp - 1) * shape.key_bytes
        saved -= 0 if a.qk_norm else shape.query_bytes + 2 * shape.key_bytes
        saved += shape.row_tokens * shape.row_tokens * cp  # the mask
    in_blocks = a.sliding_window is not None and cp == 1 and shape.row_tokens > a.sliding_window
    if a.score_softcap is None:
        if (shape.is_packed or in_blocks) and not shape.kernels.transformer_engine:
            saved += shape.query_bytes  # concatenated, for linear_proj
        if not recompute_attention:
            saved += shape.tokens * heads * _FP32  # log-sum-exp of each row
    if a.qk_norm and a.qk_norm_over_all_heads:
        # Plain torch in fp32: the input, the normalised input, and two numbers for each token.
        width = heads * a.head_dim + shape.groups * a.head_dim
        saved += shape.tokens * (2 * width + 4) * _FP32
        if shape.itemsize == _FP32:
            saved -= shape.key_bytes  # the key norm's input is a view of the joint tensor
    elif a.qk_norm:
        for count in (heads, shape.groups):
            saved += _norm(shape, vectors=shape.tokens * count, width=a.head_dim)
        if shape.kernels.fused_norm or shape.itemsize == _FP32:
            saved -= shape.key_bytes  # the key norm's input is a view of the joint tensor
            if shape.groups == 1:
                saved -= shape.query_bytes  # and so is the query norm's
    return saved


def _saved_by_latent_attention(shape: LayerShape, recompute_attention: bool) -> int:
    a, latent = shape.architecture, shape.architecture.latent
    assert latent is not None
    saved = _saved_by_norms(shape) + shape.hidden_bytes  # the norm, and the first matrices' input
    for width in (latent.query_rank, latent.key_value_rank):
        if width is not None:
            # The narrow state's norm, and its output, which the next matrix reads.
            saved += _norm(shape, vectors=shape.sliced_tokens, width=width)
            saved += shape.sliced_tokens * width * shape.itemsize
    heads = a.num_attention_heads // shape.tp
    value_bytes = shape.tokens * heads * latent.value_dim * shape.itemsize
    equal = latent.value_dim == a.head_dim or shape.kernels.transformer_engine
    # Attention through torch has heads as wide as the widest, and a part of its output is copied.
    padded = shape.tokens * heads * max(a.head_dim, latent.value_dim) * shape.itemsize
    cp = shape.parallel.context_parallel_size
    gathered = 1 if shape.kernels.transformer_engine else cp
    query_bytes, of_values = (shape.query_bytes, value_bytes) if equal else (padded, padded)
    # Query and key after the rotation, values, and attention's output.
    saved += query_bytes * (1 + gathered) + of_values * (gathered + 1)
    saved += 4 * shape.rotary_bytes
    if not equal:
        saved += value_bytes
    elif shape.is_packed and not shape.kernels.transformer_engine:
        saved += value_bytes  # concatenated
    if gathered > 1:
        saved += shape.row_tokens * shape.row_tokens * cp  # the mask
    if not recompute_attention:
        saved += shape.tokens * heads * _FP32  # log-sum-exp of each row
    return saved


def _saved_by_norms(shape: LayerShape) -> int:
    """Bytes saved by the norms before and behind attention, or MLP."""
    a = shape.architecture
    return (a.pre_norms + a.post_norms) * saved_by_norm(shape)


def _saved_by_mlp(shape: LayerShape) -> int:
    # The norms, and the input of linear_fc1 or the router.
    saved = _saved_by_norms(shape) + shape.hidden_bytes
    saved += _num_inner(shape) * shape.mlp_bytes
    moe = shape.moe
    if moe is not None:
        saved += shape.dispatched_bytes  # linear_fc1's input
        k, tokens = moe.num_experts_per_token, shape.sliced_tokens
        # Per token: probability and mask of all experts; index, probability and position of the
        # chosen experts.
        saved += tokens * (
            moe.num_experts * (shape.itemsize + 1) + k * (2 * _INT64 + shape.itemsize)
        )
        if moe.shared_ffn_hidden_size is not None:
            # linear_fc1's input is the router's. With a gate also its score and the output.
            inner = shape.tokens * moe.shared_ffn_hidden_size // shape.tp * shape.itemsize
            saved += (3 if shape.kernels.fused_swiglu else 5) * inner
            if moe.shared_expert_gate:
                saved += shape.hidden_bytes + 2 * tokens * shape.itemsize
    return saved


def _num_inner(shape: LayerShape) -> int:
    """Saved tensors of the MLP's inner width: gate, up and intermediates."""
    if shape.kernels.fused_swiglu:
        return 3
    # With experts one more, because outputs are scaled with their probability.
    return 5 if shape.moe is None else 6


def _norm(shape: LayerShape, *, vectors: int, width: int) -> int:
    """Bytes saved by a norm over ``vectors`` vectors of ``width``."""
    if shape.kernels.fused_norm:
        return vectors * (width * shape.itemsize + _FP32)
    return vectors * (2 * width * _FP32 + _FP32)
