"""RIDE's extrapolation (arXiv:2609.36484) as two teachers.

With plain MSE, || s - (t + (lambda - 1) (t - b)) ||^2 and
lambda || s - t ||^2 - (lambda - 1) || s - b ||^2 differ by a number that does not depend on the
student's state s. So they have the same gradient.
"""

from dataclasses import replace

from megatron_oprd.config.schema import ExtraTeacherConfig, RideConfig, RunConfig


def with_base_as_teacher(config: RunConfig) -> RunConfig:
    """The run with the group ``ride`` as an entry of ``extra_teachers``; without it, the run."""
    ride, taps, loss = config.ride, config.taps, config.loss
    if ride.base is None:
        return config
    base = ExtraTeacherConfig(
        model=ride.base,
        hf_config=ride.base_hf_config,
        layers=taps.layers,
        n=taps.n,
        layer_map=taps.layer_map,
        layer_weights=loss.layer_weights,
        coefficient=-(ride.lambda_ - 1) * loss.coefficient,
    )
    return replace(
        config,
        loss=replace(loss, coefficient=ride.lambda_ * loss.coefficient),
        extra_teachers=[*config.extra_teachers, base],
        ride=RideConfig(),
    )
