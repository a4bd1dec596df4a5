"""Which layers sit on which pipeline stage, so that every matched pair shares a stage."""

from collections.abc import Sequence

from megatron_oprd.errors import UserError
from megatron_oprd.taps.layer_map import LayerPair


def student_stages(num_layers: int, num_running: int, num_stages: int) -> tuple[int, ...]:
    """The student's layers on each stage: those that run as even as they go, the rest at the end.

    With fewer running layers than stages, all layers are divided evenly.

    Args:
        num_layers: The student's depth.
        num_running: Layers up to the deepest tap, which are the ones that cost time.
        num_stages: Pipeline stages, virtual ones counted one by one.

    Raises:
        UserError: There are fewer layers than stages.
    """
    if num_layers < num_stages:
        raise UserError(
            f"{num_stages} pipeline stages (parallel.pipeline_model_parallel_size x virtual "
            f"stages) for the student's {num_layers} layers: every stage needs at least one"
        )
    spread = num_running if num_running >= num_stages else num_layers
    share, more = divmod(spread, num_stages)
    counts = [share + (stage < more) for stage in range(num_stages)]
    counts[-1] += num_layers - spread
    return tuple(counts)


def teacher_stages(
    pairs: Sequence[LayerPair], layers_per_student_stage: Sequence[int]
) -> tuple[int, ...]:
    """The teacher's layers on each stage, up to its deepest mapped layer.

    Teacher layers up to phi(l) live on the stage of student layer l or before it. Where the map
    leaves a choice, the teacher's layers are divided as evenly as it allows.

    Args:
        pairs: The matched pairs, in any order.
        layers_per_student_stage: The student's layers on each stage.

    Raises:
        UserError: No division puts every pair on one stage; the message names the pair.
    """
    stage_of = [stage for stage, count in enumerate(layers_per_student_stage) for _ in range(count)]
    num_stages = len(layers_per_student_stage)
    depth = max(pair.teacher for pair in pairs) + 1
    counts, done = [], 0
    for stage in range(num_stages):
        here_or_before = [p for p in pairs if stage_of[p.student] <= stage]
        after = [p for p in pairs if stage_of[p.student] > stage]
        first_after = min(after, key=lambda p: p.teacher, default=None)
        low = max((p.teacher + 1 for p in here_or_before), default=0)
        high = first_after.teacher if first_after is not None else depth
        if low > high:
            assert first_after is not None
            deepest = max(here_or_before, key=lambda p: p.teacher)
            raise UserError(
                f"taps.layer_map: student layer {first_after.student} (pipeline stage "
                f"{stage_of[first_after.student]}) is matched with teacher layer "
                f"{first_after.teacher}, but student layer {deepest.student} of the earlier stage "
                f"{stage_of[deepest.student]} with teacher layer {deepest.teacher}; matched "
                "layers share a stage, so later student stages need deeper teacher layers"
            )
        even = round((stage + 1) * depth / num_stages)
        end = min(max(even, low, done), high)
        counts.append(end - done)
        done = end
    return tuple(counts)
