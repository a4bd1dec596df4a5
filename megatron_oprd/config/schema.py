"""A run's configuration: its settings, their meaning, allowed values and defaults.

Options that Megatron has carry Megatron's names. The string below a setting is its meaning.
docs/configuration.md is generated from this file (`megatron_oprd.reference`). The settings of the
rollout engines are in `megatron_oprd.config.engines`.
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, get_args

from megatron_oprd.config.engines import EngineConfig
from megatron_oprd.config.setting import group, setting, when


@dataclass(kw_only=True)
class ModelConfig:
    """The two models and their number format."""

    student: str = setting("???", not_empty="a folder")
    """The student, which is trained: a Hugging Face folder, a Megatron checkpoint (torch_dist), or
    the folder of a run with Megatron checkpoints."""

    teacher: str = setting("???", not_empty="a folder")
    """The frozen teacher, from the same kinds of folders."""

    student_hf_config: str | None = setting(None)
    """A folder with config.json, tokenizer and the like, for a student in a Megatron checkpoint
    that carries no Hugging Face configuration."""

    teacher_hf_config: str | None = setting(None)
    """The same kind of folder for the teacher."""

    params_dtype: Literal["fp32", "bf16"] = setting("bf16")
    """Format of weights and activations. With ``bf16`` the optimizer trains fp32 main
    parameters."""

    make_vocab_size_divisible_by: int = setting(128, ge=1)
    """The embedding's rows are padded to a multiple of this number (and of the tensor-parallel
    size)."""

    apply_rope_fusion: bool = setting(True)
    """With Transformer Engine, whether query and key are rotated by its kernel. Latent attention,
    and rotations with a factor (YaRN, longrope), which the kernel lacks, go without it."""


FP8Recipe = Literal[
    "per_channel_log", "per_channel", "block_128", "tensorwise", "blockwise", "mxfp8", "delayed"
]
Precision = Literal["bf16", "fp8"]
Offload = Literal["none", "cpu"]
_FP8 = when("teacher.precision", "fp8")


@dataclass(kw_only=True)
class TeacherConfig:
    """The teacher's precision, memory and ranks, and how it follows the student, if it does."""

    precision: Precision = setting("bf16")
    """``fp8`` keeps the weights of the layers' matrices in FP8, and everything else (norms, biases,
    embedding, routers) in ``model.params_dtype``. ``bf16`` means no FP8: all weights are in
    ``model.params_dtype``."""

    fp8_recipe: FP8Recipe = setting("per_channel_log", only_with=_FP8)
    """The way that weights become FP8. ``per_channel_log``, ``per_channel`` and ``block_128`` run
    on any device, without Transformer Engine. Their FP8 weights have scales for each output channel
    or each 128 x 128 block, and are decoded when they are used. The steps of ``per_channel_log``
    are even on the weights' own axis, which makes it three times as exact. ``tensorwise``,
    ``blockwise`` and ``mxfp8`` are Transformer Engine's. Their activations are in FP8 as well, and
    they are faster where the GPU supports them. ``delayed`` is refused."""

    num_layers_at_start_in_bf16: int = setting(0, ge=0, only_with=_FP8)
    """First layers that stay in ``model.params_dtype``."""

    num_layers_at_end_in_bf16: int = setting(0, ge=0, only_with=_FP8)
    """Last layers that stay in ``model.params_dtype``, counted back from the deepest mapped
    layer."""

    offload: Offload = setting("none")
    """``cpu`` keeps the teacher's weights in (pinned) host memory, and has them on the device
    during the teacher pass only. ``none`` leaves them on the device."""

    target_memory_gb: float | None = setting(None, gt=0)
    """Most memory (10^9 bytes, on each rank) that the teacher's targets of a step may take. If all
    targets of a step need more, teacher and student take turns on groups of micro-batches. A
    micro-batch is never divided. Without this setting all targets are kept."""

    max_tokens: int | None = setting(None, ge=1)
    """Tokens in a micro-batch of the teachers' passes, padding included; at least
    ``batch.max_tokens``. Up to this, whole micro-batches of the student are put together, since a
    pass without gradients needs less memory. A larger one stays by itself. By default the teachers'
    micro-batches are the student's."""

    expert_model_parallel_size: int | None = setting(None, ge=1)
    """Ranks that share out the teacher's experts; by default
    ``parallel.expert_model_parallel_size``. The teacher's other parallel sizes are the student's,
    because the two layers of a pair lie on the same stage, and replicas have the same sequences."""

    expert_tensor_parallel_size: int | None = setting(None, ge=1)
    """Ranks that share each of the teacher's experts; by default
    ``parallel.expert_tensor_parallel_size``."""

    prompt_share: float | None = setting(None, gt=0, only_with=when("extra_teachers"))
    """Share of the prompts that this teacher teaches; by default all. The shares of all teachers
    are at most 1 together."""

    refresh_interval: int | None = setting(None, ge=1)
    """Steps between two refreshes of the teacher, at which it takes over the student's weights. For
    a teacher that starts as the student (self-distillation). By default there are no refreshes.
    Needs ``teacher.precision = bf16`` and ``teacher.offload = none``."""

    ema_decay: float = setting(0.0, ge=0, lt=1, only_with=when("teacher.refresh_interval"))
    """Share of its own weights that the teacher keeps at a refresh, which makes it an exponential
    moving average; 0 takes the student's weights as they are."""

    # The last field: behind it, its name hides the function `when` in this class.
    when: dict[str, Any] = setting({}, only_with=when("extra_teachers"))
    """Columns of the prompt files (``data_source``, or a field such as ``extra_info.domain``) with
    the value, or a list of the values, of the prompts that this teacher teaches; by default all.
    Not with ``prompt_share``."""


# The conditions of `TeacherPromptConfig.is_own`.
_OWN_PROMPT = (
    when("teacher_prompt.privileged_key"),
    when("teacher_prompt.tokenizer", "own"),
    when("teacher_prompt.chat_template_kwargs"),
    when("teacher_prompt.suffix"),
)


@dataclass(kw_only=True)
class TeacherPromptConfig:
    """The teacher's prompts and tokens, if they are not the student's."""

    privileged_key: str | None = setting(None)
    """Column of the prompt files, or a field inside a column (``reward_model.ground_truth``), with
    text that only the teacher sees, such as a reference solution. By default the teacher's prompts
    are the student's."""

    template: str = setting("{prompt}\n\nReference solution:\n{privileged}", only_with=_OWN_PROMPT)
    """The teacher's prompt, or the last chat message of it: a text with {prompt} and
    {privileged}."""

    max_tokens: int | None = setting(None, ge=1, only_with=_OWN_PROMPT)
    """Prompts that are longer for the teacher are left out; by default
    ``data.max_prompt_tokens``."""

    tokenizer: Literal["same", "own"] = setting("same")
    """``same``: the teacher reads the student's tokens, and both models have the same tokenizer.
    ``own``: the teacher reads the rollout's text in its own tokens, after its own chat template;
    positions at which both models have read the same text are compared."""

    chat_template_kwargs: dict[str, Any] | None = setting(None)
    """Values for the teacher's chat template; by default ``data.chat_template_kwargs``."""

    suffix: str = setting("")
    """Text after the teacher's prompt, such as the start of its thinking."""

    @property
    def is_own(self) -> bool:
        """Whether the teacher reads something else than the student."""
        return (
            self.tokenizer == "own"
            or self.privileged_key is not None
            or self.chat_template_kwargs is not None
            or bool(self.suffix)
        )


LayerSet = Literal["all", "last", "last_n", "even", "odd", "none"]
Positions = Literal["all", "last", "last_k", "first_k"]
Alignment = Literal["token", "predictor"]


@dataclass(kw_only=True)
class ExtraTeacherConfig:
    """An entry of the list of additional teachers.

    Such a teacher reads the student's sequences, and its loss on hidden states is added to the
    first teacher's. What it has no setting for is as in ``teacher``, ``taps`` and ``loss``. With
    ``offload = cpu`` for all teachers only one of them is on the device at a time.
    """

    model: str = setting("???")
    """See ``model.teacher``."""

    hf_config: str | None = setting(None)
    """See ``model.teacher_hf_config``."""

    layers: LayerSet | list[int] = setting("all")
    """The student's layers that this teacher teaches; see ``taps.layers``."""

    n: int | None = setting(None, ge=1)
    """See ``taps.n``."""

    layer_map: Literal["proportional"] | list[int] = setting("proportional")
    """See ``taps.layer_map``."""

    layer_weights: list[float] | None = setting(None, ge=0)
    """See ``loss.layer_weights``."""

    coefficient: float = setting(1.0)
    """See ``loss.coefficient``. It may be negative, which leads the student away from this teacher,
    if all coefficients of each student layer are above 0 together. That needs plain MSE without
    bridges, and teachers of all prompts."""

    when: dict[str, Any] = setting({})
    """See ``teacher.when``."""

    precision: Precision | None = setting(None)
    """See ``teacher.precision``; by default that of ``teacher``."""

    fp8_recipe: FP8Recipe | None = setting(None)
    """See ``teacher.fp8_recipe``; by default that of ``teacher``."""

    offload: Offload | None = setting(None)
    """See ``teacher.offload``; by default that of ``teacher``."""

    prompt_share: float | None = setting(None, gt=0)
    """See ``teacher.prompt_share``."""

    bridge: str | None = setting(None)
    """See ``bridge.path``. All directions of the bridge are used."""

    def as_teacher(self, first: TeacherConfig) -> TeacherConfig:
        """The group ``teacher`` of the run in which this teacher, not ``first``, is the first."""
        return replace(
            first,
            precision=self.precision or first.precision,
            fp8_recipe=self.fp8_recipe or first.fp8_recipe,
            offload=self.offload or first.offload,
            prompt_share=self.prompt_share,
            when=self.when,
            refresh_interval=None,
        )


@dataclass(kw_only=True)
class ParallelConfig:
    """The model-parallel layout; data parallelism takes the ranks that are left."""

    tensor_model_parallel_size: int = setting(1, ge=1)
    """Ranks that share each layer's matrices."""

    pipeline_model_parallel_size: int = setting(1, ge=1)
    """Ranks that share the layers."""

    virtual_pipeline_model_parallel_size: int | None = setting(None, ge=2)
    """Model chunks of each pipeline rank (interleaved schedule). Needs
    ``pipeline_model_parallel_size`` of at least 2."""

    expert_model_parallel_size: int = setting(1, ge=1)
    """Ranks that share out the experts of each layer with a mixture of experts; they may belong to
    several data-parallel replicas."""

    expert_tensor_parallel_size: int | None = setting(None, ge=1)
    """Ranks that share each expert's matrices; by default ``tensor_model_parallel_size``."""

    sequence_parallel: bool = setting(False)
    """Whether activations between a layer's parallel regions are split over the tensor-parallel
    ranks. Needs ``tensor_model_parallel_size`` above 1. A student with a mixture of experts and a
    ``tensor_model_parallel_size`` above 1 needs it."""

    context_parallel_size: int = setting(1, ge=1)
    """Ranks that share each sequence. Attention over a shared sequence is Transformer Engine's.
    Without Transformer Engine every rank gathers all keys and values, which saves memory in the
    rest of the layer only."""

    num_layers_per_stage: list[int] | None = setting(None, ge=1)
    """The student's layers on each pipeline stage (of each chunk in turn under virtual stages). By
    default the layers that run are divided as evenly as possible."""

    distributed_timeout_minutes: int = setting(30, ge=1)
    """A collective that takes longer ends the run."""

    @property
    def replica_size(self) -> int:
        """Ranks of one data-parallel replica."""
        return (
            self.tensor_model_parallel_size
            * self.context_parallel_size
            * self.pipeline_model_parallel_size
        )

    @property
    def expert_tensor_size(self) -> int:
        """``expert_tensor_parallel_size``, its default filled in."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size


@dataclass(kw_only=True)
class TapConfig:
    """The hidden states that are compared (the method's layer set, map and position set)."""

    layers: LayerSet | list[int] = setting("all")
    """Student layers that are tapped: ``all``, ``last``, the last ``n`` (``last_n``), ``even``
    (0-based 0, 2, ...), ``odd``, or a list of 0-based layers. ``none`` taps no layer, for a run
    with an output-space loss alone."""

    n: int | None = setting(None, ge=1, only_with=when("taps.layers", "last_n"))
    """Number of last layers; ``last_n`` needs it."""

    layer_map: Literal["proportional"] | list[int] = setting("proportional")
    """Teacher layer of each tapped student layer: ``proportional`` (eq. 11), or a list of 0-based
    teacher layers with an entry for each tapped layer."""

    positions: Positions = setting("all")
    """Response tokens whose positions are supervised: all, the last, or the last or first ``k``."""

    k: int | None = setting(None, ge=1, only_with=when("taps.positions", "last_k", "first_k"))
    """Number of tokens of each response; ``last_k`` and ``first_k`` need it."""

    alignment: Alignment = setting("predictor")
    """Position of a response token's state. ``predictor`` takes the position before the token,
    which predicts it (as the paper writes); for the first token this is the prompt's last position.
    ``token`` takes the position that holds the token (as the reference implementation does), and so
    leaves out the position that predicts the first token."""

    last_layer: Literal["post_norm", "pre_norm"] = setting("post_norm")
    """``post_norm`` takes a model's last layer after the final norm (Hugging Face's
    hidden_states[-1]), ``pre_norm`` the raw output of the block."""

    compile: bool = setting(False)
    """On a GPU, whether torch.compile makes one kernel of the comparison of two layers' states. It
    needs a C compiler on every node, and some seconds in the first step."""


@dataclass(kw_only=True)
class RideConfig:
    """Extrapolation from a checkpoint before the teacher's last training (RIDE, arXiv:2609.36484).

    The target is h_T + (lambda - 1) (h_T - h_B), with the states of teacher and base. For plain MSE
    that is the same as two teachers: ``model.teacher`` with lambda times ``loss.coefficient``, and
    the base with -(lambda - 1) times it. The run is configured so: this group is a name for an
    entry of ``extra_teachers``.
    """

    base: str | None = setting(None)
    """The checkpoint before: the same kinds of folders as ``model.teacher``."""

    base_hf_config: str | None = setting(None, only_with=when("ride.base"))
    """See ``model.teacher_hf_config``."""

    lambda_: float = setting(1.0, gt=0, only_with=when("ride.base"))
    """The strength: above 1 goes past the teacher, below 1 stops before it; 1 is the teacher. The
    paper has 1.25, with a ``loss.coefficient`` of 1 / lambda^2."""


Normalize = Literal["none", "l2"]
Aggregation = Literal["token_mean", "sequence_mean"]
Interpolation = Literal["linear", "cosine", "piecewise"]


@dataclass(kw_only=True)
class LossConfig:
    """The loss on hidden states. The output-space loss, if there is one, is added to it."""

    normalize: Normalize = setting("none")
    """``none`` compares hidden states as they are. ``l2`` makes them unit vectors first; the loss
    is then about 1/d as large and wants a coefficient of 100 to 1000."""

    coefficient: float = setting(1.0, ge=0)
    """Factor on the loss (the paper's mu). 0 leaves the loss out of the gradient; the layers'
    losses and cosines are still measured."""

    coefficient_points: list[list[float]] = setting([])
    """Points of a schedule: pairs [step, factor] by rising step. The coefficient of a step is
    ``coefficient`` times the schedule's factor, for the losses of all teachers. Before the first
    point the factor is the first one's, after the last point the last one's. By default the factor
    is always 1."""

    coefficient_schedule: Interpolation = setting(
        "linear", only_with=when("loss.coefficient_points")
    )
    """Factors between two points. ``linear`` and ``cosine`` go from one to the next, ``piecewise``
    keeps a point's factor until the next point."""

    layer_weights: list[float] | None = setting(None, ge=0)
    """Factor on the loss of each tapped layer; by default 1 for each. The loss is the sum of the
    layers' weighted losses, divided by the number of tapped layers."""

    aggregation: Aggregation = setting("token_mean")
    """``token_mean`` averages over all supervised tokens of the global batch. ``sequence_mean``
    averages over each response's tokens, then over responses (eq. 6). It holds for both losses."""


OutputLoss = Literal["none", "sampled_token", "top_k", "reverse_kl", "forward_kl", "jsd"]
Support = Literal["only_stu", "only_tch", "intersection", "union"]
SupportWeights = Literal["student_p", "teacher_p", "none"]
TopKVariant = Literal["renormalised", "reference"]
_TOP_K = when("output_loss.kind", "top_k")


@dataclass(kw_only=True)
class OutputLossConfig:
    """The loss on next-token distributions (OPD): p is the student's, q the teacher's."""

    kind: OutputLoss = setting("none")
    """``sampled_token``: policy gradient with the detached log q - log p of the sampled token as
    its advantage. ``top_k``: reverse KL of both distributions, renormalised on a few tokens.
    ``reverse_kl``, KL(p || q), ``forward_kl``, KL(q || p), and ``jsd``, the generalised
    Jensen-Shannon divergence, are computed over the whole vocabulary."""

    coefficient: float = setting(1.0, ge=0)
    """Factor on the loss."""

    coefficient_points: list[list[float]] = setting([])
    """Points of a schedule; see ``loss.coefficient_points``. At a factor of 0 the loss is still
    computed, for its metric."""

    coefficient_schedule: Interpolation = setting(
        "linear", only_with=when("output_loss.coefficient_points")
    )
    """See ``loss.coefficient_schedule``."""

    k: int = setting(16, ge=1, only_with=_TOP_K)
    """Number of tokens that are taken of a model."""

    support: Support = setting("only_stu", only_with=_TOP_K)
    """Tokens on which distributions are compared: the student's k most likely tokens
    (``only_stu``), the teacher's (``only_tch``), those in both sets, or those in either."""

    support_weights: SupportWeights = setting("student_p", only_with=_TOP_K)
    """Weight of each token's log-ratio: the renormalised p (the exact KL), the renormalised q, or
    the same for all tokens."""

    top_k_variant: TopKVariant = setting("renormalised", only_with=_TOP_K)
    """``renormalised`` compares p and q renormalised on the support. ``reference`` is the reference
    implementation's, of which the paper's numbers are: the weights are renormalised, but the
    log-ratios are of p and q over the whole vocabulary, and so is the log p that each token's
    advantage multiplies."""

    beta: float = setting(
        0.5,
        gt=0,
        lt=1,
        because="the limits are output_loss.kind = forward_kl (0) and reverse_kl (1)",
        only_with=when("output_loss.kind", "jsd"),
    )
    """The teacher's share of the mixture m = beta * q + (1 - beta) * p, and the weight of
    KL(q || m). The weight of KL(p || m) is 1 - beta."""

    positions: Positions = setting("all")
    """Response tokens whose distributions are compared; see ``taps.positions``."""

    positions_k: int | None = setting(
        None, ge=1, only_with=when("output_loss.positions", "last_k", "first_k")
    )
    """Number of tokens of each response; ``last_k`` and ``first_k`` need it."""

    student_temperature: float = setting(1.0, gt=0)
    """The student's logits are divided by this number."""

    teacher_temperature: float = setting(1.0, gt=0)
    """The teacher's logits are divided by this number."""

    chunk_tokens: int = setting(512, ge=1)
    """Number of positions whose logits exist at a time."""


TrainableProjector = Literal["none", "linear", "mlp"]


@dataclass(kw_only=True)
class BridgeConfig:
    """Projectors between the models' hidden states: frozen ones (OPRD-Bridge), or trained ones.

    Behind frozen ones unit vectors are compared: ``loss.normalize = l2``. The reference
    implementation's ``loss.coefficient`` is 10.
    """

    path: str | None = setting(None, no_effect_with=when("taps.layers", "none"))
    """A folder that ``megatron_oprd.build_bridge`` wrote for these two models, or the reference
    implementation's ps_bank.pt. By default the states are compared as they are."""

    rank: int | None = setting(
        None,
        ge=2,
        because="as a unit vector a single number is only a sign, which has no gradient",
        only_with=when("bridge.path"),
    )
    """Number of leading directions that are used; by default all of them."""

    trainable: TrainableProjector = setting(
        "none",
        no_effect_with=(
            when("taps.layers", "none"),
            when("loss.coefficient", 0.0, instead="a projector would not train; give it a factor"),
        ),
    )
    """A projector for each tapped layer that maps the student's states to the teacher's width and
    trains with the student: one linear layer (``linear``), or two with a GELU between them
    (``mlp``). Not with ``path``. It belongs to ``model.teacher``; ``extra_teachers`` have none. It
    can meet the loss while the student does not learn: see docs/bridge.md."""

    hidden_size: int | None = setting(None, ge=1, only_with=when("bridge.trainable", "mlp"))
    """Inner width of ``mlp``; by default the teacher's hidden size."""

    lr_mult: float = setting(1.0, gt=0, only_with=when("bridge.trainable", "linear", "mlp"))
    """The projectors' learning rate, as a multiple of the student's in every step."""


@dataclass(kw_only=True)
class DataConfig:
    """Prompts."""

    prompts: list[str] = setting([], not_empty="at least one JSONL or parquet file")
    """JSONL or parquet files."""

    prompt_key: str = setting("prompt")
    """Column with the prompt: text or chat messages."""

    chat_template: bool | None = setting(None)
    """By default chat messages are rendered and text is left as it is. ``true`` wraps text as a
    user's message. ``false`` refuses chat messages."""

    chat_template_kwargs: dict[str, Any] = setting({})
    """Values for chat templates in addition to the messages, in training and in its evaluation:
    enable_thinking, date_string and the like."""

    continue_final_message: bool = setting(False)
    """Whether a conversation that ends with the assistant's message is continued after that
    message; otherwise it is refused."""

    max_prompt_tokens: int = setting(1024, ge=1)
    """Longer prompts are dropped or cut, and counted."""

    long_prompts: Literal["drop", "cut"] = setting("drop")
    """``drop`` leaves long prompts out. ``cut`` takes their last ``max_prompt_tokens`` tokens."""

    shuffle: bool = setting(True)
    """Whether each epoch is a seeded permutation."""

    group_by: str | None = setting(None)
    """Column of the prompt files (or a field, as in ``extra_info.domain``) by which prompts are
    grouped: all prompts of a step have the same value, and values take turns in proportion to their
    prompts. By default a step mixes all prompts."""


@dataclass(kw_only=True)
class RolloutConfig(EngineConfig):
    """On-policy generation."""

    prompts_per_step: int = setting(8, ge=1)
    """Prompts of one training step, over all data-parallel replicas."""

    samples_per_prompt: int = setting(2, ge=1)
    """Responses for each prompt."""

    max_new_tokens: int = setting(1024, ge=1)
    """A response is cut after this number of tokens."""

    temperature: float = setting(1.0, ge=0)
    """Softmax temperature; 0 is greedy. An engine may have a highest temperature."""

    top_p: float = setting(1.0, gt=0, le=1)
    """Nucleus sampling; 1.0 is off."""

    top_k: int = setting(0, ge=0)
    """Number of most likely tokens to choose from; 0 is off."""

    stop: list[str] = setting([])
    """A response ends after the first of these texts that it contains."""

    stop_token_ids: list[int] = setting([])
    """A response ends with any of these tokens, and with the model's own end-of-sequence tokens."""

    max_batch_size: int | None = setting(None, ge=1)
    """Sequences that an engine generates at once; by default its whole share, or as many as
    the engine chooses."""

    max_staleness: int = setting(
        0,
        ge=0,
        no_effect_with=when(
            "checkpoint.save_interval",
            1,
            instead="save less often: the step after a checkpoint has rollouts of its own weights",
        ),
    )
    """Most updates between the weights that generate a rollout and those that are trained on it; 0
    is on-policy. With 1 or more, an engine in processes of its own generates while steps are
    computed: on the trainer's GPUs one step ahead at most, and without sleep; on servers so many
    steps ahead, and new weights reach responses in the middle. An engine in the trainer's process
    generates the rollouts of so many steps and one at once. The first step and the step after each
    checkpoint have rollouts of their own weights."""

    oversample: float = setting(0.0, ge=0)
    """Prompts that a step starts in addition, as a share of ``prompts_per_step``; 0.25 starts 10
    for 8. The step uses the first ``prompts_per_step`` prompts of which all responses are complete.
    The others are stopped, and come first in the next step: with their tokens as far as
    ``max_staleness`` allows, else from their beginning. No engine then generates ahead of a step.
    Where tokens are dropped, a step's responses are shorter than the student's on average."""

    oversample_interval: int = setting(256, ge=1, only_with=when("rollout.oversample"))
    """Tokens that each response grows by between two looks at which prompts are complete. Fewer
    stop sooner; each look waits for all engines and lets them read the sequences again."""

    function: str | None = setting(None)
    """A function of your own that makes the responses with the run's engine, as
    ``package.module:name``: several turns, tools, environments. Tokens that it inserts are not
    supervised. ``megatron_oprd.rollout.function.RolloutFunction`` describes it. By default the
    engine alone generates. Evaluations during the run never use it."""

    function_columns: list[str] = setting([], only_with=when("rollout.function"))
    """Columns of the prompt files that the function gets, such as the right answer."""

    logprob_check_interval: int | None = setting(None, ge=1)
    """Steps between two comparisons of the engine's log-probabilities with the student's; the first
    is in step 0. Compared are the rollouts' tokens and, if the step sent weights, tokens after
    fixed prompts by these weights, before the update. The whole student runs forward once more for
    that. By default they are never compared."""

    logprob_check_prompts: int = setting(4, ge=1, only_with=when("rollout.logprob_check_interval"))
    """The fixed prompts, which are the first of the data."""

    logprob_check_tokens: int = setting(32, ge=1, only_with=when("rollout.logprob_check_interval"))
    """Tokens of the response to each, at most ``max_new_tokens``."""

    logprob_warning_threshold: float = setting(
        0.1, gt=0, only_with=when("rollout.logprob_check_interval")
    )
    """A mean absolute difference above this number, in nats for each token, gives a warning. bf16
    alone makes a difference of 0.04 in a model of 135M parameters."""

    @property
    def started_prompts(self) -> int:
        """Prompts that a step starts."""
        # As a decimal: 1.1 x 10 would be more than 11 in binary.
        extra = Fraction(str(self.oversample)) * self.prompts_per_step
        return self.prompts_per_step + math.ceil(extra)

    @property
    def steps_ahead(self) -> int:
        """Steps that engines may generate ahead; ``oversample`` has another use of staleness."""
        return 0 if self.oversample else self.max_staleness

    @property
    def keeps_surplus(self) -> bool:
        """Whether responses that a step has stopped go on in the next one."""
        return self.oversample > 0 and self.max_staleness > 0


@dataclass(kw_only=True)
class BatchConfig:
    """The micro-batches that a step's sequences become, after sorting by length."""

    max_tokens: int = setting(16384, ge=1)
    """Tokens in a micro-batch, padding included. A longer sequence is a micro-batch by itself."""

    micro_batch_size: int | None = setting(None, ge=1)
    """Most sequences in a micro-batch; by default only ``max_tokens`` limits them."""

    sequence_packing: bool = setting(False)
    """Whether sequences follow each other in one row, each attended by itself, instead of being
    padded to one length. Padding then costs only the few tokens that fill up the row. Not with
    context parallelism."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW, its schedule and gradient reduction."""

    lr: float = setting(1e-5, ge=0)
    """Peak learning rate."""

    min_lr: float = setting(0.0, ge=0)
    """Learning rate at the end of the decay; at most ``lr``."""

    lr_decay_iters: int | None = setting(None, ge=1)
    """Updates over which the learning rate is decayed, from the first update on; later updates have
    ``min_lr``. By default ``train_iters``. A resumed run keeps the length that it began with, also
    if its ``train_iters`` are others."""

    lr_warmup_fraction: float = setting(0.03, ge=0, lt=1)
    """Share of ``lr_decay_iters`` with a linear warm-up."""

    lr_decay_style: Literal["cosine", "linear", "constant"] = setting("cosine")
    """Shape of the decay after the warm-up."""

    weight_decay: float = setting(0.01, ge=0)
    """Decoupled weight decay; norms and biases are not decayed."""

    adam_beta1: float = setting(0.9, ge=0, lt=1)
    """Decay of the first moment."""

    adam_beta2: float = setting(0.999, ge=0, lt=1)
    """Decay of the second moment."""

    adam_eps: float = setting(1e-8, gt=0)
    """Number that is added to the root of the second moment."""

    clip_grad: float = setting(1.0, ge=0)
    """Largest global gradient norm; 0 is off."""

    use_distributed_optimizer: bool = setting(True)
    """Whether data-parallel ranks share the optimizer's states."""

    gradient_accumulation_fusion: bool = setting(True)
    """With Transformer Engine, whether the multiplication that computes a matrix's gradient adds it
    to the gradient buffer, instead of an addition of its own."""

    overlap_grad_reduce: bool = setting(False)
    """Whether gradients are reduced during the backward pass."""

    overlap_param_gather: bool = setting(False)
    """Whether the distributed optimizer's ranks gather updated parameters while the next forward
    pass runs. The weight sync to the rollout engine waits for all of them, so it helps only if a
    step runs the student before the sync. Needs ``use_distributed_optimizer`` and
    ``overlap_grad_reduce``."""

    offload_states: bool = setting(False)
    """Whether the optimizer's states and the gradient buffers leave the device while they are not
    used: states from an update to the next, buffers during rollout and teacher pass. Needs
    ``model.params_dtype = bf16``."""

    max_skipped_in_a_row: int = setting(5, ge=1)
    """This number of steps in a row with a non-finite loss or gradient ends the run."""


@dataclass(kw_only=True)
class RecomputeConfig:
    """Activation recompute, as Megatron names it."""

    recompute_granularity: Literal["selective", "full"] | None = setting(None)
    """By default all activations are kept. ``selective`` recomputes the attention core, ``full``
    whole layers."""

    recompute_method: Literal["uniform", "block"] | None = setting(
        None, only_with=when("recompute.recompute_granularity", "full")
    )
    """Megatron's choice of the recomputed layers; ``full`` needs it."""

    recompute_num_layers: int | None = setting(
        None, ge=1, only_with=when("recompute.recompute_granularity", "full")
    )
    """Layers of a recomputed chunk (``uniform``), or recomputed layers of a stage (``block``);
    ``full`` needs it."""

    distribute_saved_activations: bool = setting(False)
    """Whether each tensor-parallel rank keeps only its share of a layer's saved input. Needs
    ``full``, and tensor parallelism without sequence parallelism."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """Training checkpoints.

    A run without ``save_interval``, ``save_interval_minutes`` and ``exit_after_minutes`` writes no
    checkpoint and cannot be resumed. The exported student does not depend on them.
    """

    save_interval: int | None = setting(50, ge=1)
    """Steps between checkpoints; there is another checkpoint at the end."""

    save_interval_minutes: float | None = setting(None, gt=0)
    """Minutes after a checkpoint, whatever its cause, at which another is written. Both intervals
    can be set."""

    exit_after_minutes: float | None = setting(None, gt=0)
    """Minutes after its start at which the run saves and ends, with exit code 75. It ends at the
    end of a step, as it does on SIGTERM and SIGUSR1."""

    keep: int = setting(2, ge=1)
    """Number of newest checkpoints that stay."""

    resume: Literal["auto", "never"] = setting("auto")
    """``auto`` continues from the newest whole checkpoint of ``output_dir``. ``never`` refuses an
    ``output_dir`` that has a checkpoint."""

    @property
    def is_on(self) -> bool:
        """Whether checkpoints are written at all."""
        causes = (self.save_interval, self.save_interval_minutes, self.exit_after_minutes)
        return any(cause is not None for cause in causes)


@dataclass(kw_only=True)
class EvaluationConfig:
    """Evaluation on benchmarks during the run, as `megatron_oprd.evaluate` does it by itself."""

    interval: int | None = setting(None, ge=1)
    """Steps between evaluations; there is another evaluation at the end. By default there is none.
    Needs ``data``."""

    data: list[str] = setting([])
    """Parquet or JSONL files with the columns ``prompt`` and ``reward_model.ground_truth``. Needs
    ``interval``."""

    limit: int | None = setting(None, ge=1)
    """Number of problems that are taken of each file, from its start; by default all."""

    instruction: str | None = setting(None)
    """Text that is put after each problem; by default none."""

    n: int = setting(16, ge=1)
    """Responses for each problem."""

    max_new_tokens: int = setting(1024, ge=1)
    """A response is cut after this number of tokens."""

    temperature: float = setting(0.7, ge=0)
    """Softmax temperature; 0 is greedy. An engine may have a highest temperature."""

    top_p: float = setting(0.95, gt=0, le=1)
    """Nucleus sampling; 1.0 is off."""


@dataclass(kw_only=True)
class ExportConfig:
    """What becomes of the student at the end, beside the folder ``student`` of the run."""

    push_to_hub: bool = setting(False)
    """Whether the student is uploaded to the Hugging Face Hub. Needs ``hub_model_id``, and a token
    on the machine of rank 0 (``hf auth login`` or ``HF_TOKEN``)."""

    hub_model_id: str | None = setting(None, only_with=when("export.push_to_hub"))
    """The repository that it is uploaded to, as in ``user/name``; it is made if it is missing."""

    hub_private_repo: bool = setting(True, only_with=when("export.push_to_hub"))
    """Whether a repository that is made is private."""


@dataclass(kw_only=True)
class ProfileConfig:
    """Profiles of some steps, in ``<output_dir>/profile``; docs/profiling.md describes them."""

    start: int | None = setting(None, ge=0)
    """First step that is profiled; by default none is. The first steps of a process are slower than
    the others. Needs ``end``."""

    end: int | None = setting(None, ge=1, only_with=when("profile.start"))
    """The step before which the profile ends."""

    ranks: list[int] = setting([0], ge=0, only_with=when("profile.start"))
    """Ranks that are profiled."""

    kind: Literal["torch", "nsys", "memory"] = setting("torch", only_with=when("profile.start"))
    """``torch`` is torch's profiler: a trace and a table of operations. ``nsys`` starts and stops
    the recording of Nsight Systems, under which the ranks have to be launched. ``memory`` is a
    snapshot of the GPU's memory with its history of allocations."""


Tracker = Literal["wandb", "mlflow", "swanlab"]

# Numbers of steps and ranks are added to a seed, and generators take 32 bits or more.
LARGEST_SEED = 2**31 - 1


@dataclass(kw_only=True)
class RunConfig:
    """One distillation run."""

    output_dir: str = setting("???", not_empty="a folder")
    """Folder of checkpoints, metrics and the exported student."""

    train_iters: int = setting(500, ge=1)
    """Optimizer steps."""

    seed: int = setting(1234, ge=0, le=LARGEST_SEED)
    """Seed of prompts, rollouts and random states."""

    tensorboard: bool = setting(True)
    """Whether metrics also go to TensorBoard."""

    samples_interval: int | None = setting(None, ge=1)
    """Steps between two tables of samples (four prompts with a response), in
    ``<output_dir>/samples.jsonl``, TensorBoard and trackers. By default there are none."""

    trackers: list[Tracker] = setting([])
    """Where metrics also go: ``wandb`` (Weights & Biases), ``mlflow`` and ``swanlab``, of which
    each is an extra of the package. Addresses and keys are set by their own environment
    variables."""

    project_name: str = setting("megatron-oprd", not_empty="a name", only_with=when("trackers"))
    """The project of trackers (in MLflow the experiment)."""

    experiment_name: str | None = setting(None, only_with=when("trackers"))
    """The run's name in trackers; by default that of the folder ``output_dir``."""

    model: ModelConfig = group(ModelConfig)
    teacher: TeacherConfig = group(TeacherConfig)
    teacher_prompt: TeacherPromptConfig = group(TeacherPromptConfig)
    extra_teachers: list[ExtraTeacherConfig] = setting([])
    parallel: ParallelConfig = group(ParallelConfig)
    taps: TapConfig = group(TapConfig)
    ride: RideConfig = group(RideConfig)
    loss: LossConfig = group(LossConfig)
    output_loss: OutputLossConfig = group(
        OutputLossConfig, only_with=when("output_loss.kind", *get_args(OutputLoss)[1:])
    )
    bridge: BridgeConfig = group(BridgeConfig)
    data: DataConfig = group(DataConfig)
    rollout: RolloutConfig = group(RolloutConfig)
    batch: BatchConfig = group(BatchConfig)
    optimizer: OptimizerConfig = group(OptimizerConfig)
    recompute: RecomputeConfig = group(RecomputeConfig)
    checkpoint: CheckpointConfig = group(CheckpointConfig)
    evaluation: EvaluationConfig = group(EvaluationConfig)
    export: ExportConfig = group(ExportConfig)
    profile: ProfileConfig = group(ProfileConfig)

    @property
    def decay_iters(self) -> int:
        """``optimizer.lr_decay_iters``, its default filled in."""
        return self.optimizer.lr_decay_iters or self.train_iters

    @property
    def compares_outputs(self) -> bool:
        """Whether there is an output-space loss."""
        return self.output_loss.kind != "none"

    @property
    def teachers(self) -> list[TeacherConfig]:
        """The group ``teacher`` of each teacher, the first included."""
        return [self.teacher, *(one.as_teacher(self.teacher) for one in self.extra_teachers)]

    @property
    def named_teachers(self) -> list[tuple[str, TeacherConfig]]:
        """`teachers`, each with the setting that it comes from."""
        names = ["teacher", *(f"extra_teachers[{i}]" for i in range(len(self.extra_teachers)))]
        return list(zip(names, self.teachers, strict=True))

    @property
    def prompt_columns(self) -> list[str]:
        """The columns of the prompt files that the run needs, apart from prompts.

        They assign prompts to teachers or to steps, or are passed to ``rollout.function``.
        """
        columns = [column for teacher in self.teachers for column in teacher.when]
        if self.data.group_by is not None:
            columns.append(self.data.group_by)
        columns += self.rollout.function_columns
        return list(dict.fromkeys(columns))

    @property
    def teacher_parallel(self) -> ParallelConfig:
        """The teacher's parallel layout."""
        own = self.teacher.expert_model_parallel_size, self.teacher.expert_tensor_parallel_size
        return replace(
            self.parallel,
            expert_model_parallel_size=own[0] or self.parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=own[1] or self.parallel.expert_tensor_parallel_size,
        )

    @property
    def teacher_max_prompt_tokens(self) -> int:
        """Tokens of the teacher's longest prompt."""
        return self.teacher_prompt.max_tokens or self.data.max_prompt_tokens
