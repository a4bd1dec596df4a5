"""Refuses settings of vLLM that are wrong whatever the models are."""

from megatron_oprd.config.engines.vllm import MAX_TEMPERATURE, VLLMConfig
from megatron_oprd.config.schema import RunConfig
from megatron_oprd.config.urls import check_url
from megatron_oprd.errors import UserError


def check_vllm(config: RunConfig) -> None:
    """Refuses settings of vLLM that are wrong whatever the models are.

    Raises:
        UserError: There is one.
    """
    vllm = config.rollout.vllm
    if vllm.servers:
        if vllm.start_servers:
            raise UserError(
                f"rollout.vllm.start_servers = {vllm.start_servers} with rollout.vllm.servers = "
                f"{vllm.servers}: the run starts servers, or uses servers that are there; leave "
                "one of the two out"
            )
        for url in vllm.servers:
            check_url(url, "rollout.vllm.servers")
        if len(set(vllm.servers)) < len(vllm.servers):
            raise UserError(
                f"rollout.vllm.servers = {vllm.servers}: a server is there twice; name each once"
            )
    _check_places(vllm)
    if vllm.quantization is not None:
        _check_quantization(config)
    if (ahead := config.rollout.steps_ahead) > 1 and not vllm.uses_server:
        raise UserError(
            f"rollout.max_staleness = {ahead}: an engine on the trainer's GPUs gets new weights "
            "between two rollouts only, so it generates one step ahead at most; give 1, or use "
            "servers (rollout.vllm.servers, rollout.vllm.start_servers)"
        )
    if config.rollout.function is not None and config.rollout.max_staleness:
        raise UserError(
            f"rollout.max_staleness = {config.rollout.max_staleness} cannot be combined with "
            f"rollout.function = {config.rollout.function} and rollout.engine = vllm, which would "
            "generate while the trainer computes, where the function cannot run; set "
            "rollout.max_staleness = 0"
        )
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


def _check_places(vllm: VLLMConfig) -> None:
    """Checks the nodes and GPUs of servers that the run starts."""
    nodes = vllm.server_nodes
    if not nodes or len(set(nodes)) < len(nodes):
        raise UserError(
            f"rollout.vllm.server_nodes = {nodes}: name each node that starts servers once; 0 is "
            "the first"
        )
    if vllm.start_servers % len(nodes):
        raise UserError(
            f"rollout.vllm.start_servers = {vllm.start_servers}: the {len(nodes)} nodes of "
            f"rollout.vllm.server_nodes = {nodes} start the same number each; give a multiple of "
            f"{len(nodes)}"
        )
    size, gpus = vllm.tensor_model_parallel_size, vllm.server_gpus
    needed = size * vllm.servers_per_node
    if gpus and not len(set(gpus)) == len(gpus) == needed:
        raise UserError(
            f"rollout.vllm.server_gpus = {gpus}: rollout.vllm.start_servers = "
            f"{vllm.start_servers} on rollout.vllm.server_nodes = {nodes} with "
            f"rollout.vllm.tensor_model_parallel_size = {size} GPUs each need {needed} different "
            "GPUs on each node"
        )


def _check_quantization(config: RunConfig) -> None:
    vllm = config.rollout.vllm
    setting = f"rollout.vllm.quantization = {vllm.quantization}"
    if config.model.params_dtype != "bf16":
        raise UserError(
            f"{setting}: vLLM quantises weights that come in bf16; model.params_dtype = "
            f"{config.model.params_dtype}"
        )
