"""The settings of a bridge that is to be built; those of training have the same names here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_oprd.config.checks import check_effects, check_ranges, check_values
from megatron_oprd.config.load import load_settings
from megatron_oprd.config.schema import (
    LARGEST_SEED,
    BatchConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TapConfig,
    TeacherConfig,
    TeacherPromptConfig,
)
from megatron_oprd.config.setting import group, setting, settings_of, shown, when
from megatron_oprd.errors import UserError

# Row numbers are carried in fp32.
MAX_ROWS = 2**24
_LEAST_SQUARES = when("fit.method", "least_squares")
_GRADIENT = when("fit.method", "gradient")


@dataclass(kw_only=True)
class FitConfig:
    """The fit of the projectors."""

    ranks: list[int] = setting([4, 8, 16], ge=1, not_empty="at least one rank")
    """Ranks r that are reported. The bridge has the largest; training can use any lower rank
    (``bridge.rank``)."""

    num_prompts: int = setting(2000, ge=1)
    """Prompts of the rollouts, a multiple of ``rollout.prompts_per_step``."""

    method: Literal["least_squares", "gradient"] = setting("least_squares")
    """``least_squares`` solves for P_S in closed form, from second moments. It keeps no row, but
    8 (d_T^2 + d_S^2 + d_T d_S) bytes for each pair, on every rank that has the pair. ``gradient``
    is the paper's way, AdamW on the rows."""

    ridge: float = setting(1e-6, gt=0, only_with=_LEAST_SQUARES)
    """Number that is added to the student's second moments, relative to
    their mean diagonal entry."""

    max_rows: int | None = setting(None, ge=1, le=MAX_ROWS)
    """Most rows (positions) of each pair, drawn from all of them. By default ``least_squares``
    takes all, and ``gradient``, which keeps its rows, takes 16,384, as the paper does."""

    epochs: int = setting(20, ge=1, only_with=_GRADIENT)
    """Passes over the rows."""

    lr: float = setting(1e-3, gt=0, only_with=_GRADIENT)
    """AdamW's learning rate."""

    batch_rows: int = setting(256, ge=1, only_with=_GRADIENT)
    """Rows of an update."""

    held_out_share: float = setting(0.1, gt=0, lt=1)
    """Share of the prompts whose responses are left out of the fit; the cosine is measured on
    them."""

    @property
    def rows(self) -> int | None:
        """``max_rows``, its default filled in."""
        if self.max_rows is None and self.method == "gradient":
            return 16384
        return self.max_rows


@dataclass(kw_only=True)
class BuildBridgeConfig:
    """One bridge.

    The student is divided as in training, and training has to use the same ``taps``. Micro-batches
    are padded, not packed.
    """

    output_dir: str = setting("???", not_empty="a folder")
    """The bridge's folder; a bridge that is there is replaced."""

    seed: int = setting(1234, ge=0, le=LARGEST_SEED)
    """Seed of prompts, rollouts, held-out prompts and the fit."""

    model: ModelConfig = group(ModelConfig)
    teacher: TeacherConfig = group(TeacherConfig)
    teacher_prompt: TeacherPromptConfig = group(TeacherPromptConfig)
    parallel: ParallelConfig = group(ParallelConfig)
    taps: TapConfig = group(TapConfig)
    data: DataConfig = group(DataConfig)
    rollout: RolloutConfig = group(RolloutConfig)
    batch: BatchConfig = group(BatchConfig)
    fit: FitConfig = group(FitConfig)

    @property
    def num_steps(self) -> int:
        """Rounds of rollouts."""
        return self.fit.num_prompts // self.rollout.prompts_per_step

    def as_run(self) -> RunConfig:
        """The training run that has these settings, as far as there are any."""
        return RunConfig(
            output_dir=self.output_dir,
            train_iters=self.num_steps,
            seed=self.seed,
            model=self.model,
            teacher=self.teacher,
            teacher_prompt=self.teacher_prompt,
            parallel=self.parallel,
            taps=self.taps,
            data=self.data,
            rollout=self.rollout,
            batch=self.batch,
        )


def load_build_config(path: Path, overrides: Sequence[str] = ()) -> BuildBridgeConfig:
    """Loads a YAML file and applies dotted overrides (``fit.ridge=1e-4``), the last one wins.

    Raises:
        UserError: The file cannot be read, a key is unknown, or a value is not allowed.
    """
    config = load_settings(path, overrides, BuildBridgeConfig)
    check_ranges(config)
    check_effects(settings_of(config.fit, "fit."))
    _check_relations(config)
    check_values(config.as_run())
    return config


# Both models read one micro-batch after another, of rollouts with the student's first weights.
_WITHOUT_EFFECT = {
    "rollout": ("max_staleness", "oversample", "logprob_check_interval"),
    "teacher": ("max_tokens", "target_memory_gb"),
    "batch": ("sequence_packing",),
}


# Not in config/, which knows the settings of a training run only. Rules of the fields cannot say it
# either: the groups are a training run's, where these settings have an effect.
def _check_relations(config: BuildBridgeConfig) -> None:
    num_prompts, per_step = config.fit.num_prompts, config.rollout.prompts_per_step
    if num_prompts % per_step:
        raise UserError(
            f"fit.num_prompts = {num_prompts} is not a multiple of rollout.prompts_per_step = "
            f"{per_step}, the prompts of one round"
        )
    for group_name, names in _WITHOUT_EFFECT.items():
        group = getattr(config, group_name)
        for name in names:
            if (value := getattr(group, name)) != getattr(type(group)(), name):
                raise UserError(
                    f"{group_name}.{name} = {shown(value)} has no effect on how a bridge is built; "
                    "leave it out"
                )
