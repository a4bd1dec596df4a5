"""A run's configuration: its settings, their meaning, allowed values and defaults.

Options that Megatron has carry Megatron's names.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

Positions = Literal["all", "last", "last_k", "first_k"]
Normalize = Literal["none", "l2"]
Aggregation = Literal["token_mean", "sequence_mean"]
OutputLoss = Literal["none", "sampled_token", "top_k", "reverse_kl", "forward_kl", "jsd"]
Support = Literal["only_stu", "only_tch", "intersection", "union"]
SupportWeights = Literal["student_p", "teacher_p", "none"]


@dataclass(kw_only=True)
class LossConfig:
    """The loss on hidden states. It and the output-space loss, if there is one, are added up.

    Attributes:
        normalize: none compares hidden states as they are; l2 makes them unit vectors first (the
            loss is then about 1/d as large and wants a coefficient of 100 to 1000).
        coefficient: Factor on the loss (the paper's mu). 0 leaves it out of the gradient; the
            layers' losses and cosines are still measured.
        layer_weights: Factor on the loss of each tapped layer; None is 1 for each. The loss is the
            sum of the layers' weighted losses, divided by the number of tapped layers.
        aggregation: token_mean averages over all supervised tokens of the global batch;
            sequence_mean over each response's tokens, then over responses (eq. 6). Of both losses.
    """

    normalize: Normalize = "none"
    coefficient: float = 1.0
    layer_weights: list[float] | None = None
    aggregation: Aggregation = "token_mean"


@dataclass(kw_only=True)
class OutputLossConfig:
    """The loss on next-token distributions (OPD): p the student's, q the teacher's.

    Attributes:
        kind: none; sampled_token: policy gradient with the detached log q - log p of the sampled
            token as its advantage; top_k: reverse KL of both distributions renormalised on a few
            tokens; reverse_kl, KL(p || q), forward_kl, KL(q || p), and jsd, the generalised
            Jensen-Shannon divergence, over the whole vocabulary.
        coefficient: Factor on the loss.
        k: For top_k: how many tokens of a model are taken.
        support: For top_k: the student's k most likely tokens, the teacher's, those in both, or
            those in either.
        support_weights: For top_k: what each token's log-ratio counts for: the renormalised p (the
            exact KL), the renormalised q, or the same for all.
        beta: For jsd: the teacher's share of the mixture m = beta * q + (1 - beta) * p, and the
            weight of KL(q || m) beside that of KL(p || m), 1 - beta.
        positions: Response tokens whose distributions are compared, as in ``taps.positions``.
        positions_k: For last_k and first_k: how many tokens of each response.
        student_temperature: The student's logits are divided by this.
        teacher_temperature: The teacher's are by this.
        chunk_tokens: Positions whose logits exist at a time.
    """

    kind: OutputLoss = "none"
    coefficient: float = 1.0
    k: int = 16
    support: Support = "only_stu"
    support_weights: SupportWeights = "student_p"
    beta: float = 0.5
    positions: Positions = "all"
    positions_k: int | None = None
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    chunk_tokens: int = 512


LayerSet = Literal["all", "last", "even", "odd", "none"]
FP8Recipe = Literal[
    "per_channel_log", "per_channel", "block_128", "tensorwise", "blockwise", "mxfp8", "delayed"
]


@dataclass(kw_only=True)
class TeacherConfig:
    """What the teacher costs, and whether it stays as it is.

    Attributes:
        precision: fp8 keeps the weights of its layers' matrices in FP8, and everything else (norms,
            biases, embedding, routers) in ``model.params_dtype``; bf16 is no FP8, all weights are
            in ``model.params_dtype``.
        fp8_recipe: How. per_channel_log, per_channel and block_128 run on any device, without
            Transformer Engine: FP8 weights with scales by output channel or by 128 x 128 block,
            decoded when used; per_channel_log, whose steps are even on the weights' own axis, is
            three times as exact. tensorwise, blockwise and mxfp8 are Transformer Engine's, with
            activations in FP8 as well, and faster where the GPU has them. delayed is refused.
        num_layers_at_start_in_bf16: First layers that stay in ``model.params_dtype``.
        num_layers_at_end_in_bf16: Last layers, up to the deepest mapped one, that do.
        offload: cpu keeps the teacher's weights in (pinned) host memory and has them on the device
            during the teacher pass only; none leaves them on the device.
        target_memory_gb: Most memory (10^9 bytes, on each rank) that the teacher's targets of a
            step may take. Where all targets of a step need more, teacher and student take turns
            on groups of micro-batches. A micro-batch is never divided. None keeps all targets.
        expert_model_parallel_size: Ranks that share out the teacher's experts; None is
            ``parallel.expert_model_parallel_size``. Its other parallel sizes are the student's: the
            layers of a pair lie on one stage, and replicas are of the same sequences.
        expert_tensor_parallel_size: Ranks that share each of the teacher's experts; None is
            ``parallel.expert_tensor_parallel_size``.
        prompt_share: With ``extra_teachers``: the share of the prompts that this teacher teaches;
            None: all of them.
        refresh_interval: For a teacher that starts as the student (self-distillation): steps from
            one time that it takes over the student's weights to the next. None never does.
        ema_decay: What it then keeps of its own weights, an exponential moving average; 0 takes the
            student's as they are.
    """

    precision: Literal["bf16", "fp8"] = "bf16"
    fp8_recipe: FP8Recipe = "per_channel_log"
    num_layers_at_start_in_bf16: int = 0
    num_layers_at_end_in_bf16: int = 0
    offload: Literal["none", "cpu"] = "none"
    target_memory_gb: float | None = None
    expert_model_parallel_size: int | None = None
    expert_tensor_parallel_size: int | None = None
    prompt_share: float | None = None
    refresh_interval: int | None = None
    ema_decay: float = 0.0


@dataclass(kw_only=True)
class TeacherPromptConfig:
    """What the teacher reads, where it is not what the student does.

    Attributes:
        privileged_key: Column of the prompt files, or a field inside of one
            (``reward_model.ground_truth``), with text that only the teacher sees, such as a
            reference solution. None: the teacher's prompts are the student's.
        template: What a prompt, or its last chat message, becomes for the teacher: a text with
            {prompt} and {privileged}.
        max_tokens: Prompts that are longer for the teacher are left out; None is
            ``data.max_prompt_tokens``.
        tokenizer: same: the teacher reads the student's tokens, and both tokenizers are the same
            one. own: it reads the rollout's text in its own tokens, behind its own chat template;
            positions at which both have read the same text are compared.
        chat_template_kwargs: As ``data.chat_template_kwargs``, which it takes if this is None.
        suffix: Text behind the teacher's prompt, such as the start of its thinking.
    """

    privileged_key: str | None = None
    template: str = "{prompt}\n\nReference solution:\n{privileged}"
    max_tokens: int | None = None
    tokenizer: Literal["same", "own"] = "same"
    chat_template_kwargs: dict[str, Any] | None = None
    suffix: str = ""

    @property
    def is_own(self) -> bool:
        """Whether the teacher reads something else than the student."""
        return (
            self.tokenizer == "own"
            or self.privileged_key is not None
            or self.chat_template_kwargs is not None
            or bool(self.suffix)
        )


@dataclass(kw_only=True)
class ExtraTeacherConfig:
    """One more teacher, which reads what the student does; its loss on hidden states is added.

    Precision, offload and the like are those of ``teacher``, and positions those of ``taps``. With
    ``teacher.offload = cpu`` only one teacher is on the device at a time.

    Attributes:
        model: As ``model.teacher``.
        hf_config: As ``model.teacher_hf_config``.
        layers: As ``taps.layers``: the student's layers that this teacher teaches.
        layer_map: As ``taps.layer_map``.
        coefficient: As ``loss.coefficient``.
        prompt_share: As ``teacher.prompt_share``.
        bridge: As ``bridge.path``; all of its directions are used.
    """

    model: str = "???"
    hf_config: str | None = None
    layers: LayerSet | list[int] = "all"
    layer_map: Literal["proportional"] | list[int] = "proportional"
    coefficient: float = 1.0
    prompt_share: float | None = None
    bridge: str | None = None


# vLLM's names for FP8 (E4M3) with a scale for each tensor, block or output channel.
Quantization = Literal["fp8_per_tensor", "fp8_per_block", "fp8_per_channel"]


@dataclass(kw_only=True)
class VLLMConfig:
    """For ``rollout.engine = vllm``: one engine beside each data-parallel replica's first rank.

    Or a server, with devices of its own, which all replicas use. For one that the run starts
    (``start_server``) all settings have an effect but ``sleep_level`` and ``sync_bucket_mb``; for
    one that was started for it (``server_url``) only ``max_model_len``, ``check_weights_interval``
    and what is below it, the rest being up to whoever starts it.

    Attributes:
        server_url: A vLLM server that was started for this run, as in ``http://127.0.0.1:8000``;
            None starts an engine beside each replica.
        start_server: Whether the run starts a server instead, on the machine of global rank 0, and
            ends it. Its output is in ``<output_dir>/vllm_server.log`` (of ``build_bridge`` in
            ``<output_dir>.vllm_server.log``).
        server_gpus: The GPUs that it has for itself, on that machine, as nvidia-smi counts them: as
            many as ``tensor_model_parallel_size``. Empty on a CPU.
        gpu_memory_utilization: Share of the device's memory (of the host's, on a CPU) that the
            engine may take, its weights included. The default leaves room for a trainer; a server
            has its GPUs for itself, and may take 0.9 of them.
        kv_cache_gb: Memory (10^9 bytes) of the KV cache on each GPU; None is what
            ``gpu_memory_utilization`` leaves.
        max_model_len: Longest prompt with its response; None is ``data.max_prompt_tokens`` +
            ``rollout.max_new_tokens``.
        enforce_eager: Whether nothing is compiled and no CUDA graph captured: the engine starts
            faster and generates slower.
        tensor_model_parallel_size: GPUs of one engine (vLLM's tensor parallelism): those of its
            replica's first ranks on one machine, which have to be as many; of a server its own.
        quantization: How vLLM quantises the weights of linear layers after each sync, and their
            inputs (its online quantization); None leaves them as they came. The rollouts are then
            not quite the student's: ``rollout.logprob_check_interval`` measures how far they are
            off.
        sleep_level: What the engine gives up between a rollout and the next weight sync, on a GPU:
            0 nothing, 1 the KV cache and, to the host's memory, the weights, 2 both for good; the
            sync brings all weights again, and with 0 and 1 only those that train.
        sync_bucket_mb: Size (10^6 bytes) of the buffer that weights go to the engine through. Small
            enough for the processor's cache is fastest on a CPU.
        check_weights_interval: Weight syncs from one check that the engine has the weights that
            were sent to the next, by a checksum of each tensor. None never checks.
        timeout_minutes: An engine that takes longer to start, or for a rollout, counts as hanging.
        sync_timeout_minutes: Likewise for a part of a weight sync. The replica's other ranks wait
            for it in a collective, so it has to be below ``parallel.distributed_timeout_minutes``.
        max_restarts: How often an engine that ended or hangs is started again in one step; it gets
            the weights anew and repeats what it was asked for. A server of ``server_url`` is not
            started, but waited for, ``sync_timeout_minutes`` each time. After that the run ends,
            with a checkpoint of the last whole step (unless ``checkpoint.save_interval`` is None).
    """

    server_url: str | None = None
    start_server: bool = False
    server_gpus: list[int] = field(default_factory=list)
    gpu_memory_utilization: float = 0.4
    kv_cache_gb: float | None = None
    max_model_len: int | None = None
    enforce_eager: bool = False
    tensor_model_parallel_size: int = 1
    quantization: Quantization | None = None
    sleep_level: int = 2
    sync_bucket_mb: int = 16
    check_weights_interval: int | None = None
    timeout_minutes: float = 120.0
    sync_timeout_minutes: float = 10.0
    max_restarts: int = 2

    @property
    def uses_server(self) -> bool:
        """Whether rollouts come from a server, be it the run's own."""
        return self.start_server or self.server_url is not None


@dataclass(kw_only=True)
class EvaluationConfig:
    """Evaluation on benchmarks during the run, as `megatron_oprd.evaluate` does it by itself.

    Attributes:
        interval: Steps between evaluations; there is one more at the end. None evaluates never.
        data: Parquet or JSONL files with the columns ``prompt`` and ``reward_model.ground_truth``.
        limit: Problems that are taken of each file, its first ones; None takes all.
        instruction: Text that is put behind each problem; None leaves problems as they are.
        n: Responses for each problem.
        max_new_tokens: A response is cut after this many tokens.
        temperature: Softmax temperature; 0 is greedy.
        top_p: Nucleus; 1.0 is off.
    """

    interval: int | None = None
    data: list[str] = field(default_factory=list)
    limit: int | None = None
    instruction: str | None = None
    n: int = 16
    max_new_tokens: int = 1024
    temperature: float = 0.7
    top_p: float = 0.95


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
