"""A run's configuration: its fields, how it is loaded from YAML and the command line.

Options that Megatron has carry Megatron's names. What can be checked without a model is checked
here; what needs the models' configurations is checked in `megatron_oprd.training.plan`.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_oprd.errors import UserError

LayerSet = Literal["all", "last", "even", "odd"]


@dataclass(kw_only=True)
class ModelConfig:
    """Which models, and in which number format.

    Attributes:
        student: Hugging Face folder of the student that is trained.
        teacher: Hugging Face folder of the frozen teacher.
        params_dtype: Format of weights and activations. bf16 trains fp32 main parameters.
        make_vocab_size_divisible_by: The embedding's rows are padded to a multiple of this (and of
            the tensor-parallel size).
    """

    student: str = "???"
    teacher: str = "???"
    params_dtype: Literal["fp32", "bf16"] = "bf16"
    make_vocab_size_divisible_by: int = 128


@dataclass(kw_only=True)
class ParallelConfig:
    """The model-parallel layout; data parallelism takes the ranks that are left.

    Attributes:
        tensor_model_parallel_size: Ranks that share each layer's matrices.
        pipeline_model_parallel_size: Ranks that share the layers.
        virtual_pipeline_model_parallel_size: Model chunks a pipeline rank (interleaved schedule).
        sequence_parallel: Whether activations between a layer's parallel regions are split over
            the tensor-parallel ranks.
        num_layers_per_stage: The student's layers on each pipeline stage (of each chunk in turn
            under virtual stages); None divides the layers that run as evenly as they go.
        distributed_timeout_minutes: A collective that takes longer ends the run.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    sequence_parallel: bool = False
    num_layers_per_stage: list[int] | None = None
    distributed_timeout_minutes: int = 30


@dataclass(kw_only=True)
class TapConfig:
    """Which hidden states are compared (method: layer set, map, position set).

    Attributes:
        layers: Student layers that are tapped: all, last, even (0-based 0, 2, ...), odd, or a list.
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
    positions: Literal["all", "last", "last_k", "first_k"] = "all"
    k: int | None = None
    alignment: Literal["token", "predictor"] = "token"
    last_layer: Literal["post_norm", "pre_norm"] = "post_norm"


@dataclass(kw_only=True)
class LossConfig:
    """The distillation loss.

    Attributes:
        normalize: none compares hidden states as they are; l2 makes them unit vectors first (the
            loss is then about 1/d as large and wants a coefficient of 100 to 1000).
        coefficient: Factor on the loss.
        aggregation: token_mean averages over all supervised tokens of the global batch;
            sequence_mean over each response's tokens, then over responses (eq. 6).
    """

    normalize: Literal["none", "l2"] = "none"
    coefficient: float = 1.0
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"


@dataclass(kw_only=True)
class DataConfig:
    """Prompts.

    Attributes:
        prompts: JSONL or parquet files.
        prompt_key: Column with the prompt: text or chat messages.
        chat_template: None renders chat messages and leaves text as it is; true wraps text as a
            user's message; false refuses chat messages.
        max_prompt_tokens: Longer prompts are dropped and counted.
        shuffle: Whether each epoch is a seeded permutation.
    """

    prompts: list[str] = field(default_factory=list)
    prompt_key: str = "prompt"
    chat_template: bool | None = None
    max_prompt_tokens: int = 1024
    shuffle: bool = True


@dataclass(kw_only=True)
class RolloutConfig:
    """On-policy generation.

    Attributes:
        engine: hf generates with transformers on the first rank of each data-parallel replica.
        prompts_per_step: Prompts of one training step, over all data-parallel replicas.
        samples_per_prompt: Responses for each prompt.
        max_new_tokens: A response is cut after this many tokens.
        temperature: Softmax temperature; 0 is greedy.
        top_p: Nucleus; 1.0 is off.
        top_k: Most likely tokens to choose from; 0 is off.
        max_batch_size: Sequences that are generated at once; None takes a replica's whole share.
    """

    engine: Literal["hf"] = "hf"
    prompts_per_step: int = 8
    samples_per_prompt: int = 2
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_batch_size: int | None = None


@dataclass(kw_only=True)
class BatchConfig:
    """How a step's sequences become micro-batches, after sorting by length.

    Attributes:
        max_tokens: Tokens in a micro-batch, padding included; a longer sequence is one by itself.
        micro_batch_size: Sequences in a micro-batch at most; None leaves it to ``max_tokens``.
    """

    max_tokens: int = 16384
    micro_batch_size: int | None = None


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW, its schedule and gradient reduction.

    Attributes:
        lr: Peak learning rate.
        min_lr: Learning rate at the end of the decay.
        lr_warmup_fraction: Share of ``train_iters`` with a linear warm-up.
        lr_decay_style: Shape of the decay after the warm-up.
        weight_decay: Decoupled weight decay; norms and biases are not decayed.
        adam_beta1: Decay of the first moment.
        adam_beta2: Decay of the second moment.
        adam_eps: Added to the root of the second moment.
        clip_grad: Global gradient norm; 0 is off.
        use_distributed_optimizer: Whether data-parallel ranks share the optimizer's states.
        overlap_grad_reduce: Whether gradients are reduced during the backward pass.
        max_skipped_in_a_row: That many steps with a non-finite loss or gradient end the run.
    """

    lr: float = 1e-5
    min_lr: float = 0.0
    lr_warmup_fraction: float = 0.03
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
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
    """

    recompute_granularity: Literal["selective", "full"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: int | None = None


@dataclass(kw_only=True)
class CheckpointConfig:
    """Training checkpoints.

    Attributes:
        save_interval: Steps between checkpoints; there is one more at the end. None writes none, so
            that the run cannot be resumed; the exported student does not depend on it.
        keep: Newest checkpoints that stay.
        resume: auto goes on from the newest whole checkpoint of ``output_dir``; never refuses an
            ``output_dir`` that has one.
    """

    save_interval: int | None = 50
    keep: int = 2
    resume: Literal["auto", "never"] = "auto"


@dataclass(kw_only=True)
class RunConfig:
    """One distillation run.

    Attributes:
        output_dir: Folder of checkpoints, metrics and the exported student.
        train_iters: Optimizer steps.
        seed: Seed of prompts, rollouts and random states.
        tensorboard: Whether metrics also go to TensorBoard.
        model: The two models.
        parallel: The model-parallel layout.
        taps: Which hidden states are compared.
        loss: The distillation loss.
        data: Prompts.
        rollout: On-policy generation.
        batch: Micro-batches.
        optimizer: AdamW and its schedule.
        recompute: Activation recompute.
        checkpoint: Training checkpoints.
    """

    output_dir: str = "???"
    train_iters: int = 500
    seed: int = 1234
    tensorboard: bool = True
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    taps: TapConfig = field(default_factory=TapConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Loads a YAML file and applies dotted overrides (``optimizer.lr=1e-5``), the last one wins.

    Raises:
        UserError: The file cannot be read, a key is unknown, a value has the wrong type or is not
            allowed, a required setting is missing, or two settings contradict each other.
    """
    try:
        given: Any = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: cannot be read: {_one_line(error)}") from error
    if not OmegaConf.is_dict(given):
        raise UserError(f"--config {path}: expected settings (key: value), found something else")
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override {override!r}: expected key=value, as in optimizer.lr=1e-5")
        try:
            given = OmegaConf.merge(given, OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, TypeError, yaml.YAMLError) as error:
            raise UserError(f"override {override!r}: {_one_line(error)}") from error
    try:
        _check_keys(OmegaConf.to_container(given), RunConfig, prefix="")
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), given)
        if unset := sorted(OmegaConf.missing_keys(merged)):
            raise UserError(f"{unset[0]} is not set; give it in the YAML file or as {unset[0]}=...")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        where = f" (setting {key})" if key else ""
        raise UserError(f"--config {path}: {str(error).splitlines()[0]}{where}") from error
    assert isinstance(config, RunConfig)
    _check_values(config)
    return config


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_keys(given: Any, schema: type, prefix: str) -> None:
    """Refuses a key that no dataclass has, and names the nearest one that exists."""
    if not isinstance(given, dict):
        raise UserError(
            f"setting {prefix.rstrip('.')!r}: expected a group of settings, found {given!r}"
        )
    hints = get_type_hints(schema)
    for key, value in given.items():
        full = f"{prefix}{key}"
        if key not in hints:
            elsewhere = [k for k in _all_keys(RunConfig) if k.rsplit(".", 1)[-1] == str(key)]
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)
            nearest = elsewhere[0] if elsewhere else f"{prefix}{near[0]}"
            raise UserError(f"unknown setting {full!r}; the nearest is {nearest!r}")
        if is_dataclass(hints[key]):
            _check_keys(value, hints[key], prefix=f"{full}.")


def _all_keys(schema: type, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in get_type_hints(schema).items():
        if is_dataclass(hint):
            assert isinstance(hint, type)
            keys += _all_keys(hint, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def _check_values(config: RunConfig) -> None:
    """Refuses values and combinations that are wrong whatever the models are."""
    for key in ("output_dir", "model.student", "model.teacher"):
        if not _get(config, key):
            raise UserError(f"{key} is empty; give a folder")
    if not config.data.prompts:
        raise UserError("data.prompts is empty; name at least one JSONL or parquet file")
    _check_numbers(config)

    taps = config.taps
    needs_k = taps.positions in ("last_k", "first_k")
    if needs_k and taps.k is None:
        raise UserError(f"taps.positions = {taps.positions} needs taps.k, the number of tokens")
    if not needs_k and taps.k is not None:
        raise UserError(
            f"taps.k = {taps.k} has no effect with taps.positions = {taps.positions}; "
            "use last_k or first_k"
        )
    _check_parallel(config.parallel)
    recompute = config.recompute
    full = recompute.recompute_granularity == "full"
    for name in ("recompute_method", "recompute_num_layers"):
        if (getattr(recompute, name) is not None) != full:
            raise UserError(
                f"recompute.{name} = {getattr(recompute, name)} with "
                f"recompute.recompute_granularity = {recompute.recompute_granularity}: it is "
                "needed for full and for nothing else"
            )


def _check_parallel(parallel: ParallelConfig) -> None:
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size
    if parallel.sequence_parallel and tp == 1:
        raise UserError(
            "parallel.sequence_parallel = true needs parallel.tensor_model_parallel_size > 1, "
            "found 1"
        )
    if vpp is not None and (vpp < 2 or pp < 2):
        raise UserError(
            f"parallel.virtual_pipeline_model_parallel_size = {vpp} with "
            f"parallel.pipeline_model_parallel_size = {pp}: both have to be at least 2"
        )
    layers = parallel.num_layers_per_stage
    if layers is not None and len(layers) != pp * (vpp or 1):
        raise UserError(
            f"parallel.num_layers_per_stage has {len(layers)} entries; "
            f"{pp * (vpp or 1)} are needed, one for each stage"
        )


def _check_numbers(config: RunConfig) -> None:
    at_least_one = (
        "train_iters",
        "model.make_vocab_size_divisible_by",
        "parallel.tensor_model_parallel_size",
        "parallel.pipeline_model_parallel_size",
        "parallel.distributed_timeout_minutes",
        "taps.k",
        "data.max_prompt_tokens",
        "rollout.prompts_per_step",
        "rollout.samples_per_prompt",
        "rollout.max_new_tokens",
        "rollout.max_batch_size",
        "batch.max_tokens",
        "batch.micro_batch_size",
        "optimizer.max_skipped_in_a_row",
        "recompute.recompute_num_layers",
        "checkpoint.save_interval",
        "checkpoint.keep",
    )
    for key in at_least_one:
        value = _get(config, key)
        if value is not None and value < 1:
            raise UserError(f"{key} = {value}: has to be at least 1")
    not_negative = (
        "optimizer.lr",
        "optimizer.min_lr",
        "optimizer.weight_decay",
        "optimizer.clip_grad",
        "loss.coefficient",
        "rollout.temperature",
        "rollout.top_k",
        "seed",
    )
    for key in not_negative:
        if not 0 <= _get(config, key) < math.inf:
            raise UserError(f"{key} = {_get(config, key)}: has to be 0 or more, and finite")
    if config.optimizer.min_lr > config.optimizer.lr:
        raise UserError(
            f"optimizer.min_lr = {config.optimizer.min_lr} is above optimizer.lr = "
            f"{config.optimizer.lr}"
        )
    for key in ("lr_warmup_fraction", "adam_beta1", "adam_beta2"):
        value = _get(config.optimizer, key)
        if not 0 <= value < 1:
            raise UserError(f"optimizer.{key} = {value}: has to be in [0, 1)")
    if not 0 < config.optimizer.adam_eps < math.inf:
        raise UserError(f"optimizer.adam_eps = {config.optimizer.adam_eps}: has to be above 0")
    if not 0 < config.rollout.top_p <= 1:
        raise UserError(f"rollout.top_p = {config.rollout.top_p}: has to be in (0, 1]")


def _get(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config
