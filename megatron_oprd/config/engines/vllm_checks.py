"""Refuses settings of vLLM that are wrong whatever the models are."""

from megatron_oprd.config.engines.vllm import MAX_TEMPERATURE
from megatron_oprd.config.schema import RunConfig
from megatron_oprd.config.urls import check_url
from megatron_oprd.errors import UserError


def check_vllm(config: RunConfig) -> None:
    """Refuses settings of vLLM that are wrong whatever the models are.

    Raises:
        UserError: There is one.
    """
    vllm = config.rollout.vllm
    if vllm.server_url is not None:
        if vllm.start_server:
            raise UserError(
                "rollout.vllm.start_server = true with rollout.vllm.server_url = "
                f"{vllm.server_url}: the run starts a server, or uses a server that is there; "
                "leave one of the two out"
            )
        check_url(vllm.server_url, "rollout.vllm.server_url")
    size, of_replica = vllm.tensor_model_parallel_size, config.parallel.replica_size
    if not vllm.start_server and size > of_replica:
        raise UserError(
            f"rollout.vllm.tensor_model_parallel_size = {size}: an engine runs on the GPUs of its "
            f"replica's ranks, so it has to be from 1 to {of_replica} (tensor x context x pipeline "
            "parallel size)"
        )
    gpus = vllm.server_gpus
    if gpus and not len(set(gpus)) == len(gpus) == size:
        raise UserError(
            f"rollout.vllm.server_gpus = {gpus}: have to be as many different GPUs as "
            f"rollout.vllm.tensor_model_parallel_size = {size}"
        )
    if vllm.quantization is not None:
        _check_quantization(config)
    for name, temperature in (
        ("rollout.temperature", config.rollout.temperature),
        ("evaluation.temperature", config.evaluation.temperature),
    ):
        if temperature > MAX_TEMPERATURE:
            raise UserError(
                f"{name} = {temperature}: vLLM takes at most {MAX_TEMPERATURE}; give that, or use "
                "rollout.engine = hf"
            )
    of_collectives = config.parallel.distributed_timeout_minutes
    if vllm.sync_timeout_minutes >= of_collectives:
        raise UserError(
            f"rollout.vllm.sync_timeout_minutes = {vllm.sync_timeout_minutes}: has to be below "
            f"parallel.distributed_timeout_minutes = {of_collectives}, after which the ranks that "
            "wait for the engine give up"
        )
    needed = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if vllm.max_model_len is not None and vllm.max_model_len < needed:
        raise UserError(
            f"rollout.vllm.max_model_len = {vllm.max_model_len} is below data.max_prompt_tokens + "
            f"rollout.max_new_tokens = {needed}: responses to long prompts would be cut early; "
            f"give at least {needed}, or leave it out"
        )


def _check_quantization(config: RunConfig) -> None:
    vllm = config.rollout.vllm
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
