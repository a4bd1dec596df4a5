"""A run's configuration: its settings, their meaning, allowed values and defaults.

Options that Megatron has carry Megatron's names.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron_oprd.config_evaluation import EvaluationConfig
from megatron_oprd.config_losses import LossConfig, OutputLossConfig, Positions
from megatron_oprd.config_teacher import (
    ExtraTeacherConfig,
    LayerSet,
    TeacherConfig,
    TeacherPromptConfig,
)
from megatron_oprd.config_vllm import VLLMConfig

Alignment = Literal["token", "predictor"]


@dataclass(kw_only=True)
class ModelConfig:
    """Which models, and in which number format.

    Attributes:
        student: The student that is trained: a Hugging Face folder, a Megatron checkpoint
            (torch_dist), or the folder of a run with Megatron checkpoints.
        teacher: The frozen teacher, likewise.
        student_hf_config: For a student in a Megatron checkpoint that carries no Hugging Face
            configuration: a folder with config.json, tokenizer and the like.
        teacher_hf_config: The same for the teacher.
        params_dtype: Format of weights and activations. bf16 trains fp32 main parameters.
        make_vocab_size_divisible_by: The embedding's rows are padded to a multiple of this (and of
            the tensor-parallel size).
    """

    student: str = "???"
    teacher: str = "???"
    student_hf_config: str | None = None
    teacher_hf_config: str | None = None
    params_dtype: Literal["fp32", "bf16"] = "bf16"
    make_vocab_size_divisible_by: int = 128


@dataclass(kw_only=True)
class ParallelConfig:
    """The model-parallel layout; data parallelism takes the ranks that are left.

    Attributes:
        tensor_model_parallel_size: Ranks that share each layer's matrices.
        pipeline_model_parallel_size: Ranks that share the layers.
        virtual_pipeline_model_parallel_size: Model chunks a pipeline rank (interleaved schedule).
        expert_model_parallel_size: Ranks that share out the experts of each layer with a mixture of
            experts; they may belong to several data-parallel replicas.
        expert_tensor_parallel_size: Ranks that share each expert's matrices; None is
            ``tensor_model_parallel_size``.
        sequence_parallel: Whether activations between a layer's parallel regions are split over
            the tensor-parallel ranks. A student with a mixture of experts needs it where
            ``tensor_model_parallel_size`` is above 1.
        context_parallel_size: Ranks that share each sequence. Attention over a shared sequence is
            Transformer Engine's; without it every rank gathers all keys and values, which saves
            memory in the rest of the layer only.
        num_layers_per_stage: The student's layers on each pipeline stage (of each chunk in turn
            under virtual stages); None divides the layers that run as evenly as they go.
        distributed_timeout_minutes: A collective that takes longer ends the run.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    sequence_parallel: bool = False
    context_parallel_size: int = 1
    num_layers_per_stage: list[int] | None = None
    distributed_timeout_minutes: int = 30

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
    """Which hidden states are compared (method: layer set, map, position set).

    Attributes:
        layers: Student layers that are tapped: all, last, even (0-based 0, 2, ...), odd, or a list.
            none taps no layer, for a run with an output-space loss alone.
        layer_map: Teacher layer of each tapped student layer: proportional (eq. 11), or a list of
            0-based teacher layers, one for each tapped layer.
        positions: Supervised response positions: all, last, last_k, first_k.
        k: For last_k and first_k: how many tokens of each response.
        alignment: token takes the position that holds a response token (as the reference
            implementation does), predictor the one before it, which predicts it (as the paper
            writes).
        last_layer: post_norm takes a model's last layer after the final norm (Hugging Face's
            hidden_states[-1]), pre_norm the raw output of the block.
    """

    layers: LayerSet | list[int] = "all"
    layer_map: Literal["proportional"] | list[int] = "proportional"
    positions: Positions = "all"
    k: int | None = None
    alignment: Alignment = "token"
    last_layer: Literal["post_norm", "pre_norm"] = "post_norm"


@dataclass(kw_only=True)
class BridgeConfig:
    """Frozen projectors (OPRD-Bridge). What is compared are unit vectors: ``loss.normalize = l2``.

    The reference implementation's ``loss.coefficient`` is 10.

    Attributes:
        path: A folder that ``megatron_oprd.build_bridge`` wrote for these two models, or the
            reference implementation's ps_bank.pt. None compares the states as they are.
        rank: Leading directions that are used, at least 2; None uses all of them.
    """

    path: str | None = None
    rank: int | None = None


@dataclass(kw_only=True)
class DataConfig:
    """Prompts.

    Attributes:
        prompts: JSONL or parquet files.
        prompt_key: Column with the prompt: text or chat messages.
        chat_template: None renders chat messages and leaves text as it is; true wraps text as a
            user's message; false refuses chat messages.
        chat_template_kwargs: What chat templates are given beside the messages, in training and in
            its evaluation: enable_thinking, date_string and the like.
        continue_final_message: Whether a conversation that ends with the assistant's message is
            continued behind it; otherwise it is refused.
        max_prompt_tokens: Longer prompts are dropped or cut, and counted.
        long_prompts: drop leaves them out; cut takes their last ``max_prompt_tokens`` tokens.
        shuffle: Whether each epoch is a seeded permutation.
    """

    prompts: list[str] = field(default_factory=list)
    prompt_key: str = "prompt"
    chat_template: bool | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    continue_final_message: bool = False
    max_prompt_tokens: int = 1024
    long_prompts: Literal["drop", "cut"] = "drop"
    shuffle: bool = True


@dataclass(kw_only=True)
class RolloutConfig:
    """On-policy generation.

    Attributes:
        engine: hf generates with transformers on the first rank of each data-parallel replica, vllm
            with vLLM in a process beside it, on the same device.
        prompts_per_step: Prompts of one training step, over all data-parallel replicas.
        samples_per_prompt: Responses for each prompt.
        max_new_tokens: A response is cut after this many tokens.
        temperature: Softmax temperature; 0 is greedy.
        top_p: Nucleus; 1.0 is off.
        top_k: Most likely tokens to choose from; 0 is off.
        stop: A response ends behind the first of these texts that it contains.
        stop_token_ids: A response ends with any of these tokens, besides the model's own
            end-of-sequence tokens.
        max_batch_size: Sequences that are generated at once; None takes a replica's whole share
            (vLLM: what it takes by itself).
        one_step_off_policy: Whether a step's rollouts are generated while the step before is
            computed, with the weights from before its update. For an engine beside the trainer,
            which then does not sleep. The first step and the one after each checkpoint have
            rollouts of their own weights.
        logprob_check_interval: Steps from one comparison of the engine's log-probabilities with the
            student's, on the rollouts' tokens before the update, to the next; the first is in step
            0. The whole student runs forward once more for it. None never compares.
        logprob_warning_threshold: A mean absolute difference above this, in nats a token, gives a
            warning. bf16 alone makes one of 0.04 in a model of 135M parameters.
        vllm: For ``engine = vllm``.
    """

    engine: Literal["hf", "vllm"] = "hf"
    prompts_per_step: int = 8
    samples_per_prompt: int = 2
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    max_batch_size: int | None = None
    one_step_off_policy: bool = False
    logprob_check_interval: int | None = None
    logprob_warning_threshold: float = 0.1
    vllm: VLLMConfig = field(default_factory=VLLMConfig)


@dataclass(kw_only=True)
class BatchConfig:
    """How a step's sequences become micro-batches, after sorting by length.

    Attributes:
        max_tokens: Tokens in a micro-batch, padding included; a longer sequence is one by itself.
        micro_batch_size: Sequences in a micro-batch at most; None leaves it to ``max_tokens``.
        sequence_packing: Whether sequences lie one behind the other in one row, attended each by
            itself, instead of being padded to one length. Padding then costs nothing but the few
            tokens that fill up the row. Not with context parallelism.
    """

    max_tokens: int = 16384
    micro_batch_size: int | None = None
    sequence_packing: bool = False


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW, its schedule and gradient reduction.

    Attributes:
        lr: Peak learning rate.
        min_lr: Learning rate at the end of the decay.
        lr_decay_iters: Updates over which the learning rate is decayed, from the first one on;
            later ones have ``min_lr``. None is ``train_iters``. A resumed run keeps the length that
            it began with, also if its ``train_iters`` are others.
        lr_warmup_fraction: Share of ``lr_decay_iters`` with a linear warm-up.
        lr_decay_style: Shape of the decay after the warm-up.
        weight_decay: Decoupled weight decay; norms and biases are not decayed.
        adam_beta1: Decay of the first moment.
        adam_beta2: Decay of the second moment.
        adam_eps: Added to the root of the second moment.
        clip_grad: Global gradient norm; 0 is off.
        use_distributed_optimizer: Whether data-parallel ranks share the optimizer's states.
        overlap_grad_reduce: Whether gradients are reduced during the backward pass.
        overlap_param_gather: Whether the distributed optimizer's ranks gather updated parameters
            while the next forward pass runs. The weight sync to the rollout engine waits for all
            of them, so it helps only where a step runs the student before that.
        offload_states: Whether the optimizer's states and the gradient buffers leave the device
            while they are not used: states from an update to the next, buffers during rollout and
            teacher pass. Needs ``model.params_dtype = bf16``.
        max_skipped_in_a_row: That many steps with a non-finite loss or gradient end the run.
    """

    lr: float = 1e-5
    min_lr: float = 0.0
    lr_decay_iters: int | None = None
    lr_warmup_fraction: float = 0.03
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    offload_states: bool = False
    max_skipped_in_a_row: int = 5


@dataclass(kw_only=True)
class RecomputeConfig:
    """Activation recompute, as Megatron names it.

    Attributes:
        recompute_granularity: None keeps all activations; selective recomputes the attention
            core; full recomputes whole layers.
        recompute_method: For full: uniform or block.
        recompute_num_layers: For full: layers of a recomputed chunk (uniform) or recomputed layers
            of a stage (block).
        distribute_saved_activations: For full, with tensor but without sequence parallelism: each
            tensor-parallel rank keeps its share of a layer's saved input.
    """

    recompute_granularity: Literal["selective", "full"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: int | None = None
    distribute_saved_activations: bool = False


@dataclass(kw_only=True)
class CheckpointConfig:
    """Training checkpoints.

    Attributes:
        save_interval: Steps between checkpoints; there is one more at the end. Without it and the
            next two the run writes none and cannot be resumed; the exported student does not depend
            on it.
        save_interval_minutes: Minutes from one checkpoint, of whatever cause, to the next, as well.
        exit_after_minutes: That long after its start the run saves and ends, with exit code 75. It
            ends at the end of a step, as it does on SIGTERM and SIGUSR1.
        keep: Newest checkpoints that stay.
        resume: auto goes on from the newest whole checkpoint of ``output_dir``; never refuses an
            ``output_dir`` that has one.
    """

    save_interval: int | None = 50
    save_interval_minutes: float | None = None
    exit_after_minutes: float | None = None
    keep: int = 2
    resume: Literal["auto", "never"] = "auto"

    @property
    def is_on(self) -> bool:
        """Whether checkpoints are written at all."""
        causes = (self.save_interval, self.save_interval_minutes, self.exit_after_minutes)
        return any(cause is not None for cause in causes)


@dataclass(kw_only=True)
class RunConfig:
    """One distillation run.

    Attributes:
        output_dir: Folder of checkpoints, metrics and the exported student.
        train_iters: Optimizer steps.
        seed: Seed of prompts, rollouts and random states.
        tensorboard: Whether metrics also go to TensorBoard.
        model: The two models.
        teacher: What the teacher costs, and whether it stays as it is.
        teacher_prompt: What the teacher reads, where it is not what the student does.
        extra_teachers: More teachers.
        parallel: The model-parallel layout.
        taps: Which hidden states are compared.
        loss: The loss on hidden states.
        output_loss: The loss on next-token distributions.
        bridge: Projectors that hidden states go through before they are compared.
        data: Prompts.
        rollout: On-policy generation.
        batch: Micro-batches.
        optimizer: AdamW and its schedule.
        recompute: Activation recompute.
        checkpoint: Training checkpoints.
        evaluation: Evaluation on benchmarks during the run.
    """

    output_dir: str = "???"
    train_iters: int = 500
    seed: int = 1234
    tensorboard: bool = True
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teacher_prompt: TeacherPromptConfig = field(default_factory=TeacherPromptConfig)
    extra_teachers: list[ExtraTeacherConfig] = field(default_factory=list)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    taps: TapConfig = field(default_factory=TapConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    output_loss: OutputLossConfig = field(default_factory=OutputLossConfig)
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def decay_iters(self) -> int:
        """``optimizer.lr_decay_iters``, its default filled in."""
        return self.optimizer.lr_decay_iters or self.train_iters

    @property
    def compares_outputs(self) -> bool:
        """Whether there is an output-space loss."""
        return self.output_loss.kind != "none"

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
