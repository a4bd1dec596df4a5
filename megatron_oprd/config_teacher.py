"""The teacher's settings."""

from dataclasses import dataclass
from typing import Any, Literal

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
