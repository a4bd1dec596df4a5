"""Refuses settings that are wrong whatever the models are.

The range of a setting, and the settings that it has an effect with, are declared with its field in
`megatron_oprd.config.schema`, and one walk enforces both. The other functions check relations of
several settings. Checks that need the models' configurations are in `megatron_oprd.training.plan`.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_oprd.config.engines.checks import ENGINE_CHECKS
from megatron_oprd.config.schema import (
    ParallelConfig,
    RunConfig,
    TeacherPromptConfig,
)
from megatron_oprd.config.setting import Found, Rules, When, settings_of, shown
from megatron_oprd.errors import UserError


def check_values(config: RunConfig) -> None:
    """Refuses values and combinations that are wrong whatever the models are.

    Raises:
        UserError: There is one.
    """
    check_ranges(config)
    check_effects(settings_of(config))
    _check_teacher(config)
    _check_extra_teachers(config)
    _check_ride(config)
    _check_parallel(config.parallel)
    _check_losses(config)
    _check_rollout(config)
    if (check_engine := ENGINE_CHECKS.get(config.rollout.engine)) is not None:
        check_engine(config)
    _check_batch(config)
    _check_optimizer(config)
    _check_recompute(config)
    _check_evaluation(config)
    _check_export(config)
    _check_profile(config)


def check_ranges(config: Any) -> None:
    """Refuses settings that are empty or out of their range, in a configuration of any command.

    Raises:
        UserError: There is one.
    """
    for found in settings_of(config):
        rules = found.rules
        if rules.not_empty and not found.value:
            raise UserError(f"{found.key} is empty; give {rules.not_empty}")
        if not rules.admits(found.value):
            each = "each " if isinstance(found.value, list) else ""
            words = rules.range_in_words(of_floats=_has_float(found.value))
            reason = f"; {rules.because}" if rules.because else ""
            raise UserError(
                f"{_setting(found)} is out of range: {each or 'it '}has to be {words}{reason}"
            )


def _has_float(value: Any) -> bool:
    return any(map(_has_float, value)) if isinstance(value, list) else isinstance(value, float)


def check_effects(settings: Iterable[Found]) -> None:
    """Refuses settings that differ from their default and have no effect.

    Args:
        settings: The settings, with all that their rules name.

    Raises:
        UserError: There is one.
    """
    all_found = {found.key: found for found in settings}
    for found in all_found.values():
        if found.value != found.default:
            for rules in (*found.of_groups, found.rules):
                _check_effect(found, rules, all_found)


def _check_effect(found: Found, rules: Rules, all_found: Mapping[str, Found]) -> None:
    for condition in rules.no_effect_with:
        other = all_found[condition.setting]
        if _holds(condition, other):
            raise UserError(
                f"{_setting(found)} has no effect with {_setting(other)}; {condition.instead}"
            )
    needed = rules.only_with
    if not needed or any(_holds(condition, all_found[condition.setting]) for condition in needed):
        return
    if len(needed) == 1 and needed[0].values:
        raise UserError(
            f"{_setting(found)} has no effect with {_setting(all_found[needed[0].setting])}; use "
            f"{' or '.join(shown(value) for value in needed[0].values)} there"
        )
    spelled = " or ".join(
        condition.setting + "".join(f" = {shown(value)}" for value in condition.values)
        for condition in needed
    )
    raise UserError(
        f"{_setting(found)} has no effect without {spelled}; set that, or leave {found.key} out"
    )


def _holds(condition: When, found: Found) -> bool:
    if condition.values:
        return found.value in condition.values
    return found.value != found.default


def _setting(found: Found) -> str:
    return f"{found.key} = {shown(found.value)}"


def _check_teacher(config: RunConfig) -> None:
    teacher, prompt = config.teacher, config.teacher_prompt
    if teacher.fp8_recipe == "delayed":
        raise UserError(
            "teacher.fp8_recipe = delayed is wrong for a teacher: its scales come from a history "
            "of activations that is written only while gradients are computed, and a teacher "
            "computes none. Use tensorwise, blockwise or mxfp8 with Transformer Engine, or "
            "per_channel_log, per_channel or block_128 without it"
        )
    if prompt.tokenizer == "own" and config.compares_outputs:
        raise UserError(
            f"output_loss.kind = {config.output_loss.kind} cannot be combined with "
            "teacher_prompt.tokenizer = own, because distributions over different tokens cannot "
            "be compared; set output_loss.kind = none, or take a teacher with the student's "
            "tokenizer"
        )
    changes = teacher.refresh_interval is not None
    if changes and (teacher.precision != "bf16" or teacher.offload != "none"):
        raise UserError(
            f"teacher.refresh_interval = {teacher.refresh_interval} needs teacher.precision = bf16 "
            f"(found {teacher.precision}) and teacher.offload = none (found {teacher.offload}): "
            "the teacher's weights change on the device"
        )
    if prompt.is_own and config.data.long_prompts == "cut":
        raise UserError(
            "data.long_prompts = cut cannot be combined with teacher_prompt, because the "
            "teacher's prompt would keep what is cut off the student's; set data.long_prompts = "
            "drop"
        )
    try:
        made = prompt.template.format(prompt="<prompt>", privileged="<privileged>")
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"teacher_prompt.template = {prompt.template!r} cannot be filled in ({error}); it may "
            "have only {prompt} and {privileged} in braces, and other braces have to be doubled"
        ) from error
    for name, text in (("prompt", "prompt"), ("privileged", "privileged text")):
        if f"<{name}>" not in made:
            raise UserError(
                f"teacher_prompt.template = {prompt.template!r} has no {{{name}}}; put it where "
                f"the {text} belongs"
            )


def _check_extra_teachers(config: RunConfig) -> None:
    extra = config.extra_teachers
    for number, one in enumerate(extra):
        if (one.layers == "last_n") != (one.n is not None):
            raise UserError(
                f"extra_teachers[{number}].layers = {one.layers} does not agree with "
                f"extra_teachers[{number}].n = {shown(one.n)}: last_n needs n, the number of "
                "layers, and no other value of layers has one"
            )
    if extra and config.teacher_prompt != TeacherPromptConfig():
        raise UserError(
            "extra_teachers cannot be combined with teacher_prompt, because several teachers read "
            "the student's sequences; leave one of the two out"
        )
    for name, teacher in config.named_teachers:
        if teacher.when and teacher.prompt_share is not None:
            raise UserError(
                f"{name}.when = {teacher.when} cannot be combined with {name}.prompt_share = "
                f"{teacher.prompt_share}: a teacher gets the prompts of certain columns or a "
                "share of all prompts; leave one of the two out"
            )
        _check_when(f"{name}.when", teacher.when)
    _check_negative_teachers(config)
    shares = [config.teacher.prompt_share, *(teacher.prompt_share for teacher in extra)]
    given = [share for share in shares if share is not None]
    if sum(given) > 1 + 1e-9:
        raise UserError(
            f"prompt_share of the teachers = {shares}, which is {sum(given):.3g} together; their "
            "sum has to be at most 1"
        )
    if given and len(given) == len(shares) and sum(given) < 1 - 1e-9:
        raise UserError(
            f"prompt_share of the teachers = {shares}, which leaves {1 - sum(given):.3g} of the "
            "prompts without a teacher; make the sum 1, or leave prompt_share out of one teacher, "
            "which then gets all prompts"
        )


def _check_when(setting: str, when: dict[str, Any]) -> None:
    for column, wanted in when.items():
        values = wanted if isinstance(wanted, list) else [wanted]
        if not values or not all(isinstance(value, str | int | float) for value in values):
            raise UserError(
                f"{setting} = {when}: the value for column {column!r} has to be a text, a number, "
                "or a list of these"
            )


def _check_negative_teachers(config: RunConfig) -> None:
    """Refuses a teacher with a negative coefficient where losses do not add up to one target."""
    extra = config.extra_teachers
    negative = [number for number, one in enumerate(extra) if one.coefficient < 0]
    if not negative:
        return
    name = f"extra_teachers[{negative[0]}]"
    setting = f"{name}.coefficient = {extra[negative[0]].coefficient}"
    if config.loss.normalize != "none":
        raise UserError(
            f"{setting} cannot be combined with loss.normalize = {config.loss.normalize}, because "
            "a negative coefficient needs plain MSE; set loss.normalize = none"
        )
    for other, teacher in config.named_teachers:
        if teacher.prompt_share is not None or teacher.when:
            what = "when" if teacher.when else "prompt_share"
            raise UserError(
                f"{setting} cannot be combined with {other}.{what}, because prompts that only "
                f"{name} teaches would have a loss without a minimum; leave {other}.{what} out"
            )
    if config.bridge.trainable != "none":
        raise UserError(
            f"{setting} cannot be combined with bridge.trainable = {config.bridge.trainable}, "
            "because a negative coefficient needs teachers whose states are compared directly; "
            "leave bridge.trainable out"
        )
    for number, one in enumerate(extra):
        if one.bridge is not None:
            raise UserError(
                f"{setting} cannot be combined with extra_teachers[{number}].bridge = "
                f"{one.bridge}, because a negative coefficient needs teachers whose states are "
                "compared directly; leave that bridge or the teacher out"
            )


def _check_ride(config: RunConfig) -> None:
    ride = config.ride
    if ride.base is None:
        return
    if ride.lambda_ == 1:
        raise UserError(
            f"ride.base = {ride.base} has no effect with ride.lambda = 1; set another "
            "ride.lambda, or leave ride.base out"
        )
    if config.loss.normalize != "none":
        raise UserError(
            f"ride.base = {ride.base} cannot be combined with loss.normalize = "
            f"{config.loss.normalize}, because the target is a sum of states, which only plain "
            "MSE compares; set loss.normalize = none"
        )
    if config.bridge.trainable != "none":
        raise UserError(
            f"ride.base = {ride.base} cannot be combined with bridge.trainable = "
            f"{config.bridge.trainable}, because the target is a sum of states, which are "
            "compared directly; leave bridge.trainable out"
        )
    teacher = config.teacher
    if teacher.prompt_share is not None or teacher.when or teacher.refresh_interval is not None:
        raise UserError(
            f"ride.base = {ride.base} needs a fixed model.teacher that teaches all prompts; leave "
            "out teacher.prompt_share, teacher.when and teacher.refresh_interval"
        )


def _check_parallel(parallel: ParallelConfig) -> None:
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size
    if parallel.sequence_parallel and tp == 1:
        raise UserError(
            "parallel.sequence_parallel = true needs parallel.tensor_model_parallel_size > 1, "
            "found 1"
        )
    if vpp is not None and pp < 2:
        raise UserError(
            f"parallel.virtual_pipeline_model_parallel_size = {vpp} needs "
            f"parallel.pipeline_model_parallel_size of at least 2, found {pp}"
        )
    layers = parallel.num_layers_per_stage
    if layers is not None and len(layers) != pp * (vpp or 1):
        raise UserError(
            f"parallel.num_layers_per_stage has {len(layers)} entries; "
            f"{pp * (vpp or 1)} are needed, one for each stage"
        )


def _check_losses(config: RunConfig) -> None:
    taps, output, bridge = config.taps, config.output_loss, config.bridge
    for setting, positions, k_setting, k in (
        ("taps.positions", taps.positions, "taps.k", taps.k),
        ("output_loss.positions", output.positions, "output_loss.positions_k", output.positions_k),
    ):
        if positions in ("last_k", "first_k") and k is None:
            raise UserError(
                f"{setting} = {positions} needs {k_setting}, the number of tokens, which is null; "
                "set it"
            )
    _check_layers("taps.layers", taps.layers)
    for number, teacher in enumerate(config.extra_teachers):
        _check_layers(f"extra_teachers[{number}].layers", teacher.layers)
    if taps.layers == "last_n" and taps.n is None:
        raise UserError(
            "taps.layers = last_n needs taps.n, the number of layers, which is null; set it"
        )
    _check_points("loss.coefficient_points", config.loss.coefficient_points)
    _check_points("output_loss.coefficient_points", output.coefficient_points)
    if output.kind == "none" and taps.layers == "none":
        raise UserError(
            "taps.layers = none with output_loss.kind = none leaves no loss; set one of them"
        )
    if bridge.path is not None and bridge.trainable != "none":
        raise UserError(
            f"bridge.trainable = {bridge.trainable} cannot be combined with bridge.path = "
            f"{bridge.path}, whose projectors are frozen; leave one of the two out"
        )
    if bridge.path is not None and config.loss.normalize != "l2":
        raise UserError(
            f"loss.normalize = {config.loss.normalize} cannot be combined with bridge.path = "
            f"{bridge.path}, because unit vectors are compared through a bridge; set "
            "loss.normalize = l2 (and a loss.coefficient of about 10)"
        )


def _check_layers(setting: str, layers: str | list[int]) -> None:
    if isinstance(layers, str):
        return
    in_order = sorted(set(layers))
    if not layers or layers != in_order:
        raise UserError(
            f"{setting} = {layers} is not a list of layers; it has to name at least one layer, in "
            f"rising order, each once{f', as in {in_order}' if layers else ''}"
        )


def _check_points(setting: str, points: list[list[float]]) -> None:
    """Refuses a schedule whose points are no pairs, go back, or have a negative factor."""
    steps = [point[0] for point in points if len(point) == 2]
    if (
        len(steps) < len(points)
        or any(not step.is_integer() or step < 0 for step in steps)
        or any(after <= before for before, after in itertools.pairwise(steps))
        or any(not (math.isfinite(factor) and factor >= 0) for _, factor in points)
    ):
        raise UserError(
            f"{setting} = {points} is not a schedule; it has to be pairs [step, factor] with "
            "rising steps from 0 on and factors of at least 0, as in [[0, 1], [10, 0]]"
        )


def _check_rollout(config: RunConfig) -> None:
    if "" in config.rollout.stop:
        raise UserError(
            f"rollout.stop = {config.rollout.stop} has an empty text, which would end every "
            "response; remove it"
        )
    name = config.rollout.function
    if name is not None and re.fullmatch(r"[\w.]+:[\w.]+", name) is None:
        raise UserError(
            f"rollout.function = {name} is not the name of a function; it has to be "
            "package.module:name"
        )
    if config.rollout.oversample:
        _check_oversample(config)


def _check_oversample(config: RunConfig) -> None:
    rollout = config.rollout
    setting = f"rollout.oversample = {rollout.oversample}"
    if rollout.function is not None:
        raise UserError(
            f"{setting} cannot be combined with rollout.function = {rollout.function}, whose "
            "responses cannot be stopped and go on later; leave one of the two out"
        )
    if config.data.group_by is not None:
        raise UserError(
            f"{setting} cannot be combined with data.group_by = {config.data.group_by}, because "
            "prompts that are left would come in a step of another group; leave one of the two out"
        )
    if rollout.oversample_interval >= rollout.max_new_tokens:
        raise UserError(
            f"rollout.oversample_interval = {rollout.oversample_interval} is not below "
            f"rollout.max_new_tokens = {rollout.max_new_tokens}, so that no response would be "
            f"stopped before its end; give less, such as {max(1, rollout.max_new_tokens // 8)}"
        )


def _check_batch(config: RunConfig) -> None:
    of_teacher, of_student = config.teacher.max_tokens, config.batch.max_tokens
    if of_teacher is not None and of_teacher < of_student:
        raise UserError(
            f"teacher.max_tokens = {of_teacher} is below batch.max_tokens = {of_student}; the "
            "teacher's micro-batches consist of the student's, so give at least that, or leave "
            "teacher.max_tokens out"
        )
    if config.batch.sequence_packing and config.parallel.context_parallel_size > 1:
        raise UserError(
            "batch.sequence_packing = true cannot be combined with parallel.context_parallel_size "
            f"= {config.parallel.context_parallel_size}, because packed sequences are not "
            "divided; use one of the two"
        )


def _check_optimizer(config: RunConfig) -> None:
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        raise UserError(
            f"optimizer.min_lr = {optimizer.min_lr} is above optimizer.lr = {optimizer.lr}; it "
            "has to be at most that"
        )
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


def _check_recompute(config: RunConfig) -> None:
    recompute, parallel = config.recompute, config.parallel
    full = recompute.recompute_granularity == "full"
    for name in ("recompute_method", "recompute_num_layers"):
        if full and getattr(recompute, name) is None:
            raise UserError(
                f"recompute.recompute_granularity = full needs recompute.{name}, which is null; "
                "set it"
            )
    if recompute.distribute_saved_activations and (
        not full or parallel.tensor_model_parallel_size == 1 or parallel.sequence_parallel
    ):
        raise UserError(
            "recompute.distribute_saved_activations = true needs "
            "recompute.recompute_granularity = full (found "
            f"{shown(recompute.recompute_granularity)}), parallel.tensor_model_parallel_size > 1 "
            f"(found {parallel.tensor_model_parallel_size}), and "
            "parallel.sequence_parallel = false, which has divided them already (found "
            f"{shown(parallel.sequence_parallel)})"
        )


def _check_evaluation(config: RunConfig) -> None:
    evaluation = config.evaluation
    if (evaluation.interval is None) != (not evaluation.data):
        raise UserError(
            f"evaluation.interval = {shown(evaluation.interval)} does not agree with "
            f"evaluation.data = {evaluation.data}; set both or neither"
        )


def _check_export(config: RunConfig) -> None:
    name = config.export.hub_model_id
    if config.export.push_to_hub and not (name and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)):
        raise UserError(
            f"export.push_to_hub needs export.hub_model_id, which is {shown(name)}; give a "
            "repository, as in user/name"
        )
    if len(set(config.trackers)) < len(config.trackers):
        raise UserError(f"trackers = {config.trackers} names one of them twice; name each once")


def _check_profile(config: RunConfig) -> None:
    start, end, ranks = config.profile.start, config.profile.end, config.profile.ranks
    if start is None:
        return
    if end is None or not start < end <= config.train_iters:
        raise UserError(
            f"profile.start = {start} needs profile.end, which is {shown(end)}; give a step above "
            f"{start} and of at most train_iters = {config.train_iters}"
        )
    if not ranks:
        raise UserError("profile.ranks is empty; give at least one rank, as in [0]")
