"""What is checked of the settings for vLLM, the group ``rollout.vllm``."""

import math
from urllib.parse import urlsplit

from megatron_oprd.config import RunConfig
from megatron_oprd.config_vllm import VLLMConfig
from megatron_oprd.errors import UserError

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
