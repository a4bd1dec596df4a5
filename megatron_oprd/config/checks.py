"""Refuses settings that are wrong whatever the models are.

What needs the models' configurations is checked in `megatron_oprd.training.plan`.
"""

import math
from typing import Any, get_args
from urllib.parse import urlsplit

from megatron_oprd.config.schema import (
    OutputLoss,
    OutputLossConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TeacherConfig,
    TeacherPromptConfig,
    VLLMConfig,
)
from megatron_oprd.errors import UserError


def check_rollout(config: RunConfig) -> None:
    """Refuses values that are wrong whatever the models are, and settings without effect.

    Raises:
        UserError: There is one.
    """
    rollout = config.rollout
    if "" in rollout.stop:
        raise UserError("rollout.stop has an empty text, which every response would end with")
    if rollout.one_step_off_policy and rollout.engine == "hf":
        raise UserError(
            "rollout.one_step_off_policy = true with rollout.engine = hf, which generates in the "
            "trainer's own process and so not beside an update; use rollout.engine = vllm, or "
            "one_step_off_policy = false"
        )
    if rollout.one_step_off_policy and config.checkpoint.save_interval == 1:
        raise UserError(
            "rollout.one_step_off_policy = true has no effect with checkpoint.save_interval = 1: "
            "the step after a checkpoint has rollouts of its own weights; save less often"
        )
    threshold = rollout.logprob_warning_threshold
    if not 0 < threshold < math.inf:
        raise UserError(
            f"rollout.logprob_warning_threshold = {threshold}: has to be above 0, and finite"
        )
    is_default = threshold == RolloutConfig().logprob_warning_threshold
    if rollout.logprob_check_interval is None and not is_default:
        raise UserError(
            f"rollout.logprob_warning_threshold = {threshold} has no effect without "
            "rollout.logprob_check_interval, the steps between two comparisons"
        )


MAX_TEMPERATURE = 2.0
# The ways to have an engine, and the settings that not all of them have a use for.
_EMBEDDED, _GIVEN, _STARTED = "an engine beside each replica", "server_url", "start_server"
_USES = {
    "server_gpus": (_STARTED,),
    "gpu_memory_utilization": (_EMBEDDED, _STARTED),
    "kv_cache_gb": (_EMBEDDED, _STARTED),
    "enforce_eager": (_EMBEDDED, _STARTED),
    "tensor_model_parallel_size": (_EMBEDDED, _STARTED),
    "quantization": (_EMBEDDED, _STARTED),
    "sleep_level": (_EMBEDDED,),
    "sync_bucket_mb": (_EMBEDDED,),
}


def check_vllm(config: RunConfig) -> None:
    """Refuses values that are wrong whatever the models are, and settings without effect.

    Raises:
        UserError: There is one.
    """
    vllm = config.rollout.vllm
    if config.rollout.engine != "vllm":
        for name, default in vars(VLLMConfig()).items():
            if getattr(vllm, name) != default:
                raise UserError(
                    f"rollout.vllm.{name} = {getattr(vllm, name)} has no effect with "
                    f"rollout.engine = {config.rollout.engine}; use vllm"
                )
        return
    _check_uses(vllm)
    if vllm.server_url is not None:
        check_url(vllm.server_url, "rollout.vllm.server_url")
    if vllm.start_server:
        _check_started(vllm)
    else:
        _check_size(config)
    _check_quantization(config)
    if not 0 < vllm.gpu_memory_utilization < 1:
        raise UserError(
            f"rollout.vllm.gpu_memory_utilization = {vllm.gpu_memory_utilization}: has to be above "
            "0 and below 1"
        )
    for key, of in (("rollout", config.rollout), ("evaluation", config.evaluation)):
        if of.temperature > MAX_TEMPERATURE:
            raise UserError(
                f"{key}.temperature = {of.temperature}: vLLM takes at most {MAX_TEMPERATURE}; "
                "give that, or use rollout.engine = hf"
            )
    if vllm.sleep_level not in (0, 1, 2):
        raise UserError(f"rollout.vllm.sleep_level = {vllm.sleep_level}: has to be 0, 1 or 2")
    for key in ("kv_cache_gb", "timeout_minutes", "sync_timeout_minutes"):
        value = getattr(vllm, key)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"rollout.vllm.{key} = {value}: has to be above 0, and finite")
    of_collectives = config.parallel.distributed_timeout_minutes
    if vllm.sync_timeout_minutes >= of_collectives:
        raise UserError(
            f"rollout.vllm.sync_timeout_minutes = {vllm.sync_timeout_minutes}: has to be below "
            f"parallel.distributed_timeout_minutes = {of_collectives}, after which the ranks that "
            "wait for the engine give up"
        )
    if vllm.max_restarts < 0:
        raise UserError(
            f"rollout.vllm.max_restarts = {vllm.max_restarts}: has to be 0 (never) or above"
        )
    needed = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if vllm.max_model_len is not None and vllm.max_model_len < needed:
        raise UserError(
            f"rollout.vllm.max_model_len = {vllm.max_model_len} is below data.max_prompt_tokens + "
            f"rollout.max_new_tokens = {needed}: responses to long prompts would be cut early; "
            f"give at least {needed}, or leave it out"
        )


def _check_size(config: RunConfig) -> None:
    size = config.rollout.vllm.tensor_model_parallel_size
    of_replica = config.parallel.replica_size
    if not 1 <= size <= of_replica:
        raise UserError(
            f"rollout.vllm.tensor_model_parallel_size = {size}: an engine runs on the GPUs of its "
            f"replica's ranks, so it has to be from 1 to {of_replica} (tensor x context x pipeline "
            "parallel size)"
        )


def _check_quantization(config: RunConfig) -> None:
    vllm = config.rollout.vllm
    if vllm.quantization is None:
        return
    setting = f"rollout.vllm.quantization = {vllm.quantization}"
    if config.model.params_dtype != "bf16":
        raise UserError(
            f"{setting}: vLLM quantises weights that come in bf16; model.params_dtype = "
            f"{config.model.params_dtype}"
        )
    if vllm.check_weights_interval is not None:
        raise UserError(
            f"rollout.vllm.check_weights_interval = {vllm.check_weights_interval}: with {setting} "
            "the engine has other weights than were sent; leave it out. "
            "rollout.logprob_check_interval compares what comes of them"
        )


def _check_uses(vllm: VLLMConfig) -> None:
    if vllm.start_server and vllm.server_url is not None:
        raise UserError(
            f"rollout.vllm.start_server = true with rollout.vllm.server_url = {vllm.server_url}: "
            "the run starts a server, or uses one that is there; leave one of them out"
        )
    way, instead = _EMBEDDED, "it is for rollout.vllm.start_server = true"
    if vllm.start_server:
        way, instead = _STARTED, "leave it out"
    elif vllm.server_url is not None:
        way, instead = _GIVEN, "give it to vllm serve"
    for name, ways in _USES.items():
        if way not in ways and getattr(vllm, name) != getattr(VLLMConfig(), name):
            of = way if way == _EMBEDDED else f"rollout.vllm.{way}"
            raise UserError(
                f"rollout.vllm.{name} = {getattr(vllm, name)} has no effect with {of}; {instead}"
            )


def check_url(url: str, setting: str) -> None:
    """Refuses what is no address of a server.

    Args:
        url: The address.
        setting: What it was given as.

    Raises:
        UserError: It is none.
    """
    parts = urlsplit(url)
    try:
        has_port = parts.port is None or parts.port > 0
    except ValueError:
        has_port = False
    others = (parts.path.strip("/"), parts.query, parts.fragment, parts.username)
    if parts.scheme != "http" or not parts.hostname or not has_port or any(others):
        raise UserError(f"{setting} = {url}: has to be as in http://127.0.0.1:8000")


def _check_started(vllm: VLLMConfig) -> None:
    size, gpus = vllm.tensor_model_parallel_size, vllm.server_gpus
    if size < 1:
        raise UserError(f"rollout.vllm.tensor_model_parallel_size = {size}: has to be 1 or above")
    if gpus and (len(set(gpus)) != size or len(gpus) != size or min(gpus) < 0):
        raise UserError(
            f"rollout.vllm.server_gpus = {gpus}: have to be as many different GPUs, from 0, as "
            f"rollout.vllm.tensor_model_parallel_size = {size}"
        )


# Numbers of steps and ranks are added to it, and generators take 32 bits or more.
_LARGEST_SEED = 2**31 - 1


def check_values(config: RunConfig) -> None:
    """Refuses values and combinations that are wrong whatever the models are.

    Raises:
        UserError: There is one.
    """
    for key in ("output_dir", "model.student", "model.teacher"):
        if not _get(config, key):
            raise UserError(f"{key} is empty; give a folder")
    if not config.data.prompts:
        raise UserError("data.prompts is empty; name at least one JSONL or parquet file")
    _check_numbers(config)

    _check_positions("taps.positions", config.taps.positions, "taps.k", config.taps.k)
    _check_losses(config)
    _check_teacher(config.teacher)
    _check_teacher_prompt(config)
    _check_extra_teachers(config)
    _check_parallel(config.parallel)
    if config.batch.sequence_packing and config.parallel.context_parallel_size > 1:
        raise UserError(
            "batch.sequence_packing = true with parallel.context_parallel_size = "
            f"{config.parallel.context_parallel_size}: packed sequences are not divided; use one "
            "of the two"
        )
    check_rollout(config)
    evaluation = config.evaluation
    if (evaluation.interval is None) != (not evaluation.data):
        raise UserError(
            f"evaluation.interval = {evaluation.interval} with evaluation.data = "
            f"{evaluation.data}: give both or neither"
        )
    _check_recompute(config)
    _check_optimizer(config)
    check_vllm(config)
    _check_bridge(config)


def _check_positions(setting: str, positions: str, k_setting: str, k: int | None) -> None:
    needs_k = positions in ("last_k", "first_k")
    if needs_k and k is None:
        raise UserError(f"{setting} = {positions} needs {k_setting}, the number of tokens")
    if not needs_k and k is not None:
        raise UserError(
            f"{k_setting} = {k} has no effect with {setting} = {positions}; use last_k or first_k"
        )


def _check_losses(config: RunConfig) -> None:
    output = config.output_loss
    if output.kind == "none":
        if changed := [
            name for name, value in vars(output).items() if value != vars(OutputLossConfig())[name]
        ]:
            raise UserError(
                f"output_loss.{changed[0]} has no effect with output_loss.kind = none; use "
                f"{', '.join(get_args(OutputLoss)[1:])}"
            )
        if config.taps.layers == "none":
            raise UserError(
                "taps.layers = none with output_loss.kind = none leaves no loss; set one of them"
            )
    _check_positions(
        "output_loss.positions", output.positions, "output_loss.positions_k", output.positions_k
    )
    for key, kinds in (
        ("k", ("top_k",)),
        ("support", ("top_k",)),
        ("support_weights", ("top_k",)),
        ("beta", ("jsd",)),
    ):
        value = getattr(output, key)
        if output.kind not in kinds and value != getattr(OutputLossConfig(), key):
            raise UserError(
                f"output_loss.{key} = {value} has no effect with output_loss.kind = {output.kind}; "
                f"it is for {kinds[0]}"
            )
    if not 0 < output.beta < 1:
        raise UserError(
            f"output_loss.beta = {output.beta}: has to be above 0 and below 1; the limits are "
            "output_loss.kind = forward_kl (0) and reverse_kl (1)"
        )
    for key in ("student_temperature", "teacher_temperature"):
        if not 0 < (value := getattr(output, key)) < math.inf:
            raise UserError(f"output_loss.{key} = {value}: has to be above 0, and finite")
    for weight in config.loss.layer_weights or ():
        if not 0 <= weight < math.inf:
            raise UserError(
                f"loss.layer_weights = {config.loss.layer_weights}: have to be 0 or more, and "
                "finite"
            )


def _check_teacher(teacher: TeacherConfig) -> None:
    if teacher.precision == "bf16":
        for name in ("fp8_recipe", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            value = getattr(teacher, name)
            if value != getattr(TeacherConfig(), name):
                raise UserError(
                    f"teacher.{name} = {value} has no effect with teacher.precision = bf16; use fp8"
                )
    if not 0 <= teacher.ema_decay < 1:
        raise UserError(f"teacher.ema_decay = {teacher.ema_decay}: has to be in [0, 1)")
    if teacher.refresh_interval is None:
        if teacher.ema_decay:
            raise UserError(
                f"teacher.ema_decay = {teacher.ema_decay} has no effect without "
                "teacher.refresh_interval, the steps between two refreshes"
            )
    elif teacher.precision != "bf16" or teacher.offload != "none":
        raise UserError(
            f"teacher.refresh_interval = {teacher.refresh_interval} needs teacher.precision = bf16 "
            f"(found {teacher.precision}) and teacher.offload = none (found {teacher.offload}): "
            "the teacher's weights change on the device"
        )
    if teacher.fp8_recipe == "delayed":
        raise UserError(
            "teacher.fp8_recipe = delayed is wrong for a teacher: its scales come from a history "
            "of activations that is written only while gradients are computed, and a teacher "
            "computes none. Use tensorwise, blockwise or mxfp8 with Transformer Engine, or "
            "per_channel_log, per_channel or block_128 without it"
        )


def _check_teacher_prompt(config: RunConfig) -> None:
    settings = config.teacher_prompt
    if settings.is_own and config.data.long_prompts == "cut":
        raise UserError(
            "data.long_prompts = cut with teacher_prompt: the teacher's prompt would keep what is "
            "cut off of the student's; use drop"
        )
    if not settings.is_own:
        for name in ("template", "max_tokens"):
            value = getattr(settings, name)
            if value != getattr(TeacherPromptConfig(), name):
                raise UserError(
                    f"teacher_prompt.{name} = {value!r} has no effect without "
                    "teacher_prompt.privileged_key or teacher_prompt.tokenizer = own"
                )
    try:
        made = settings.template.format(prompt="<prompt>", privileged="<privileged>")
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"teacher_prompt.template = {settings.template!r} is no template: {error}; only "
            "{prompt} and {privileged} can stand in braces, and other braces are doubled"
        ) from error
    for name in ("prompt", "privileged"):
        if f"<{name}>" not in made:
            raise UserError(
                f"teacher_prompt.template = {settings.template!r} has no {{{name}}}, where the "
                f"{'prompt' if name == 'prompt' else 'privileged text'} goes"
            )


def _check_extra_teachers(config: RunConfig) -> None:
    extra = config.extra_teachers
    shares = [config.teacher.prompt_share, *(one.prompt_share for one in extra)]
    given = [share for share in shares if share is not None]
    if given and not extra:
        raise UserError(
            f"teacher.prompt_share = {given[0]} has no effect without extra_teachers: one teacher "
            "teaches all prompts"
        )
    if given and not (min(given) > 0 and sum(given) <= 1 + 1e-9):
        raise UserError(
            f"prompt_share of the teachers = {shares}: have to be above 0, and at most 1 together"
        )
    if given and len(given) == len(shares) and sum(given) < 1 - 1e-9:
        raise UserError(
            f"prompt_share of the teachers = {shares}: leave {1 - sum(given):.3g} of the prompts "
            "to no teacher; make them 1 together, or leave one out, for all prompts"
        )
    for number, one in enumerate(extra):
        if not 0 <= one.coefficient < math.inf:
            raise UserError(
                f"extra_teachers[{number}].coefficient = {one.coefficient}: has to be 0 or more, "
                "and finite"
            )
    if extra and (config.teacher_prompt != TeacherPromptConfig()):
        raise UserError(
            "extra_teachers with teacher_prompt: several teachers read the student's sequences; "
            "leave one of the two out"
        )


def _check_recompute(config: RunConfig) -> None:
    recompute = config.recompute
    full = recompute.recompute_granularity == "full"
    for name in ("recompute_method", "recompute_num_layers"):
        if (getattr(recompute, name) is not None) != full:
            raise UserError(
                f"recompute.{name} = {getattr(recompute, name)} with "
                f"recompute.recompute_granularity = {recompute.recompute_granularity}: it is "
                "needed for full and for nothing else"
            )
    if recompute.distribute_saved_activations:
        parallel = config.parallel
        if not full or parallel.tensor_model_parallel_size == 1 or parallel.sequence_parallel:
            raise UserError(
                "recompute.distribute_saved_activations = true needs "
                "recompute.recompute_granularity = full (found "
                f"{recompute.recompute_granularity}), parallel.tensor_model_parallel_size > 1 "
                f"(found {parallel.tensor_model_parallel_size}), and "
                "parallel.sequence_parallel = false, which has divided them already (found "
                f"{str(parallel.sequence_parallel).lower()})"
            )


def _check_bridge(config: RunConfig) -> None:
    path, rank = config.bridge.path, config.bridge.rank
    if path is None:
        if rank is not None:
            raise UserError(f"bridge.rank = {rank} has no effect without bridge.path")
        return
    if config.taps.layers == "none":
        raise UserError(f"bridge.path = {path} has no effect with taps.layers = none")
    if rank is not None and rank < 2:
        raise UserError(
            f"bridge.rank = {rank}: has to be at least 2. As a unit vector a single number is only "
            "a sign, which has no gradient"
        )
    if config.loss.normalize != "l2":
        raise UserError(
            f"loss.normalize = {config.loss.normalize} with bridge.path = {path}: through a bridge "
            "unit vectors are compared; set loss.normalize = l2 (and a loss.coefficient of about "
            "10)"
        )


def _check_optimizer(config: RunConfig) -> None:
    optimizer = config.optimizer
    if optimizer.overlap_param_gather and not (
        optimizer.use_distributed_optimizer and optimizer.overlap_grad_reduce
    ):
        raise UserError(
            "optimizer.overlap_param_gather = true needs optimizer.use_distributed_optimizer and "
            "optimizer.overlap_grad_reduce to be true as well"
        )
    if optimizer.offload_states and config.model.params_dtype != "bf16":
        raise UserError(
            "optimizer.offload_states = true needs model.params_dtype = bf16, found "
            f"{config.model.params_dtype}: without fp32 main parameters of its own the optimizer's "
            "states include the model's weights"
        )
    memory = config.teacher.target_memory_gb
    if memory is not None and not 0 < memory < math.inf:
        raise UserError(f"teacher.target_memory_gb = {memory}: has to be above 0, and finite")


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
        "parallel.context_parallel_size",
        "parallel.expert_model_parallel_size",
        "parallel.expert_tensor_parallel_size",
        "parallel.distributed_timeout_minutes",
        "taps.k",
        "teacher.expert_model_parallel_size",
        "teacher.expert_tensor_parallel_size",
        "teacher.refresh_interval",
        "teacher_prompt.max_tokens",
        "output_loss.k",
        "output_loss.positions_k",
        "output_loss.chunk_tokens",
        "data.max_prompt_tokens",
        "rollout.prompts_per_step",
        "rollout.samples_per_prompt",
        "rollout.max_new_tokens",
        "rollout.max_batch_size",
        "rollout.logprob_check_interval",
        "rollout.vllm.max_model_len",
        "rollout.vllm.sync_bucket_mb",
        "rollout.vllm.check_weights_interval",
        "evaluation.interval",
        "evaluation.limit",
        "evaluation.n",
        "evaluation.max_new_tokens",
        "batch.max_tokens",
        "batch.micro_batch_size",
        "optimizer.max_skipped_in_a_row",
        "recompute.recompute_num_layers",
        "optimizer.lr_decay_iters",
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
        "output_loss.coefficient",
        "rollout.temperature",
        "rollout.top_k",
        "evaluation.temperature",
        "teacher.num_layers_at_start_in_bf16",
        "teacher.num_layers_at_end_in_bf16",
        "seed",
    )
    for key in not_negative:
        if not 0 <= _get(config, key) < math.inf:
            raise UserError(f"{key} = {_get(config, key)}: has to be 0 or more, and finite")
    if config.seed > _LARGEST_SEED:
        raise UserError(f"seed = {config.seed}: has to be at most {_LARGEST_SEED}")
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
    for key in ("checkpoint.save_interval_minutes", "checkpoint.exit_after_minutes"):
        value = _get(config, key)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{key} = {value}: has to be above 0, and finite")
    for key in ("rollout.top_p", "evaluation.top_p"):
        if not 0 < _get(config, key) <= 1:
            raise UserError(f"{key} = {_get(config, key)}: has to be in (0, 1]")


def _get(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config
