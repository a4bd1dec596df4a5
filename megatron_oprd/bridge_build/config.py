"""The settings of a bridge that is to be built; those of training have the same names here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_oprd.config.checks import check_values
from megatron_oprd.config.load import load_settings
from megatron_oprd.config.schema import (
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
from megatron_oprd.errors import UserError

# Row numbers are carried in fp32.
MAX_ROWS = 2**24


@dataclass(kw_only=True)
class FitConfig:
    """How the projectors are fitted.

    Attributes:
        ranks: Ranks r that are reported. The bridge has the largest; training can use any lower one
            (``bridge.rank``).
        num_prompts: Prompts of the rollouts, a multiple of ``rollout.prompts_per_step``.
        method: least_squares solves for P_S in closed form, from second moments, and keeps no row
            but 8 (d_T^2 + d_S^2 + d_T d_S) bytes for each pair, on every rank that has the pair;
            gradient is the paper's way, AdamW on the rows.
        ridge: For least_squares: what is added to the student's second moments, relative to their
            mean diagonal entry.
        max_rows: Rows (positions) of each pair at most, drawn from all of them. None takes all for
            least_squares, and 16,384 for gradient, as the paper does, which keeps them.
        epochs: For gradient: passes over the rows.
        lr: For gradient: AdamW's learning rate.
        batch_rows: For gradient: rows of an update.
        held_out_share: Share of the prompts whose responses are left out of the fit; the cosine
            is measured on them.
    """

    ranks: list[int] = field(default_factory=lambda: [4, 8, 16])
    num_prompts: int = 2000
    method: Literal["least_squares", "gradient"] = "least_squares"
    ridge: float = 1e-6
    max_rows: int | None = None
    epochs: int = 20
    lr: float = 1e-3
    batch_rows: int = 256
    held_out_share: float = 0.1

    @property
    def rows(self) -> int | None:
        """``max_rows``, its default filled in."""
        if self.max_rows is None and self.method == "gradient":
            return 16384
        return self.max_rows


@dataclass(kw_only=True)
class BuildBridgeConfig:
    """One bridge.

    Attributes:
        output_dir: The bridge's folder; a bridge that is there is replaced.
        seed: Seed of prompts, rollouts, held-out prompts and the fit.
        model: The two models.
        teacher: What the frozen teacher costs.
        teacher_prompt: What the teacher reads, where it is not what the student does.
        parallel: The model-parallel layout; the student is divided as in training.
        taps: Which hidden states are paired; training has to use the same.
        data: Prompts.
        rollout: Generation with the student.
        batch: Micro-batches, which are padded, not packed.
        fit: How the projectors are fitted.
    """

    output_dir: str = "???"
    seed: int = 1234
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teacher_prompt: TeacherPromptConfig = field(default_factory=TeacherPromptConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    taps: TapConfig = field(default_factory=TapConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    fit: FitConfig = field(default_factory=FitConfig)

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
    _check_fit(config)
    check_values(config.as_run())
    return config


def _check_fit(config: BuildBridgeConfig) -> None:
    fit = config.fit
    if not fit.ranks or min(fit.ranks) < 1:
        raise UserError(f"fit.ranks = {fit.ranks}: name at least one rank, each at least 1")
    for name in ("num_prompts", "epochs", "batch_rows"):
        if getattr(fit, name) < 1:
            raise UserError(f"fit.{name} = {getattr(fit, name)}: has to be at least 1")
    if fit.max_rows is not None and not 1 <= fit.max_rows <= MAX_ROWS:
        raise UserError(f"fit.max_rows = {fit.max_rows}: has to be from 1 to {MAX_ROWS}")
    for name in ("ridge", "lr"):
        if not 0 < getattr(fit, name) < math.inf:
            raise UserError(f"fit.{name} = {getattr(fit, name)}: has to be above 0, and finite")
    if not 0 < fit.held_out_share < 1:
        raise UserError(f"fit.held_out_share = {fit.held_out_share}: has to be between 0 and 1")
    per_step = config.rollout.prompts_per_step
    if per_step < 1 or fit.num_prompts % per_step:
        raise UserError(
            f"fit.num_prompts = {fit.num_prompts} is not a multiple of rollout.prompts_per_step = "
            f"{per_step}, the prompts of one round"
        )
    for name in ("one_step_off_policy", "logprob_check_interval"):
        if (value := getattr(config.rollout, name)) != getattr(RolloutConfig(), name):
            raise UserError(
                f"rollout.{name} = {value} has no effect on how a bridge is built; leave it out"
            )
    if config.batch.sequence_packing:
        raise UserError(
            "batch.sequence_packing = true has no effect on how a bridge is built; leave it out"
        )
