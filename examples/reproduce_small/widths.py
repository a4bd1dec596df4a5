r"""A wider teacher through a bridge: does training on hidden states alone collapse?

python examples/reproduce_small/widths.py --models runs/reproduce_small/models \
    --out runs/reproduce_small/widths [--steps 400] [--small]

The student is that of pretrain.py. The teacher is a wider model, pretrained here on the same
problems. Every method runs once at each learning rate, and the table has the rate with the best
end.
"""

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

from pretrain import SMALL, Settings, from_scratch, save
from processes import in_processes
from rich.table import Table
from runs import Budget, Run, configuration, curve_of, metrics_of, prompts_of, start
from task import make_split, make_tokenizer, read_problems

from megatron_oprd.console import make_console
from megatron_oprd.errors import run_entry_point

_RANK = 16
_TEACHER_ACCURACY = 0.98
_RATES = (3e-4, 1e-3)
_RESPONSES = 16
_TOP_16 = {"kind": "top_k", "k": 16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run.

    Attributes:
        method: Its name.
        lr: Peak learning rate.
        accuracy: Steps done -> share of the test problems that are solved.
        cosine: Steps done -> mean cosine of the projected states; None without a loss on them.
    """

    method: str
    lr: float
    accuracy: dict[int, float]
    cosine: dict[int, float | None]

    @property
    def final(self) -> float:
        """Accuracy at the end."""
        return self.accuracy[max(self.accuracy)]

    @property
    def best(self) -> int:
        """Steps until the highest accuracy."""
        return max(self.accuracy, key=lambda step: self.accuracy[step])


def methods(steps: int, bridge: Path) -> dict[str, dict[str, Any]]:
    """The settings of each method, by its name."""
    through = {"bridge": {"path": str(bridge), "rank": _RANK}}
    unit = {"normalize": "l2", "coefficient": 10.0}
    # LastOPD's: a projector of the student's states to the teacher's width.
    trains, thousand = {"bridge": {"trainable": "linear"}}, unit | {"coefficient": 1000.0}
    last = {"taps": {"layers": "last"}}
    # LastOPD's crossfade: over a twentieth of the steps, after a quarter of them.
    begin, end = steps // 4, steps // 4 + max(1, steps // 20)
    fade_out, fade_in = [[begin, 1], [end, 0]], [[begin, 0], [end, 1]]
    return {
        "hidden states, all layers": through | {"loss": unit},
        "hidden states, last layer": through | last | {"loss": unit},
        "last layer, then top-16": through
        | last
        | {"loss": unit | {"coefficient_points": fade_out}}
        | {"output_loss": _TOP_16 | {"coefficient_points": fade_in}},
        "both, all layers": through | {"loss": unit, "output_loss": _TOP_16},
        "projector that trains, last layer": trains | last | {"loss": thousand},
        "the same, then top-16": trains
        | last
        | {"loss": thousand | {"coefficient_points": fade_out}}
        | {"output_loss": _TOP_16 | {"coefficient_points": fade_in}},
        "top-16": {"taps": {"layers": "none"}, "output_loss": _TOP_16},
    }


def main() -> int:
    """Parses the command line, runs everything, writes and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, help="what pretrain.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of runs and results")
    parser.add_argument("--steps", type=int, default=400, help="steps of each run (400)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    parser.add_argument("--small", action="store_true", help="seconds, for the tests")
    arguments = parser.parse_args()
    steps = 4 if arguments.small else arguments.steps
    rates = _RATES[:1] if arguments.small else _RATES
    budget = Budget(
        steps=steps, interval=max(1, steps // 20), curve_problems=8 if arguments.small else 400
    )
    settings = SMALL if arguments.small else Settings()
    wide = dataclasses.replace(settings, hidden_size=settings.hidden_size * 3 // 2)
    make_teacher(arguments.out / "teacher", wide)
    here = {"models": arguments.models, "budget": budget}
    fit = partial(build_bridge, prompts=32 if arguments.small else 1024, **here)
    list(in_processes(fit, [arguments.out], jobs=1))
    names = methods(budget.steps, arguments.out)
    outcomes = []
    for outcome in in_processes(
        partial(distil, out=arguments.out, **here),
        [(name, lr) for name in names for lr in rates],
        jobs=arguments.jobs,
    ):
        print(f"{outcome.method}  lr {outcome.lr:g}  accuracy {outcome.final:.3f}", flush=True)
        outcomes.append(outcome)
    content = {"runs": [dataclasses.asdict(one) for one in outcomes]}
    (arguments.out / "widths.json").write_text(json.dumps(content, indent=2) + "\n")
    make_console().print(table(outcomes))
    return 0


def make_teacher(out: Path, settings: Settings) -> None:
    """Pretrains a teacher until it solves nearly all validation problems, unless it is there."""
    if out.exists():
        return
    split = make_split(
        settings.task,
        num_train=settings.num_train,
        num_validation=settings.num_validation,
        num_test=settings.num_test,
    )
    tokenizer = make_tokenizer()
    for reached in from_scratch(settings, split, tokenizer):
        if reached.accuracy >= _TEACHER_ACCURACY:
            break
    save(reached.model, tokenizer, out)


def build_bridge(out: Path, *, models: Path, budget: Budget, prompts: int) -> None:
    """Fits the projectors between the student and the teacher, in this process."""
    run = _run(lr=0.0)
    config = _configuration(run, models, out, out / "bridge", budget)
    shared = {name: config[name] for name in ("model", "data", "rollout", "seed")}
    per_step = {"prompts_per_step": 32, "samples_per_prompt": 4}
    fit = shared | {
        "output_dir": str(out / "bridge" / "projectors"),
        "rollout": config["rollout"] | per_step,
        "fit": {"ranks": [8, _RANK], "num_prompts": prompts},
    }
    lines = (models / "train.jsonl").read_text().splitlines()
    start("build_bridge", fit, out / "bridge", prompts=lines[:prompts])


def distil(task: tuple[str, float], *, models: Path, out: Path, budget: Budget) -> Outcome:
    """Runs one method at one learning rate, in this process."""
    name, lr = task
    folder = out / "runs" / f"{name.replace(' ', '_').replace(',', '')}_lr{lr:g}"
    run = _run(lr=lr)
    config = _configuration(run, models, out, folder, budget)
    config |= methods(budget.steps, out / "bridge" / "projectors")[name]
    start("train", config, folder, prompts=prompts_of(run, models=models, budget=budget))
    curve = curve_of(folder, read_problems(models / "test.jsonl")[: budget.curve_problems])
    cosine = {one["step"] + 1: one["cosine"] for one in metrics_of(folder)}
    return Outcome(
        method=name,
        lr=lr,
        accuracy=curve.accuracy,
        cosine={step: cosine[step] for step in curve.accuracy},
    )


def _run(*, lr: float) -> Run:
    return Run(pair="early", method="oprd", responses=_RESPONSES, lr=lr, seed=1)


def _configuration(
    run: Run, models: Path, out: Path, folder: Path, budget: Budget
) -> dict[str, Any]:
    config = configuration(run, models=models, out=folder, budget=budget)
    return config | {"model": config["model"] | {"teacher": str(out / "teacher")}}


def table(outcomes: list[Outcome]) -> Table:
    """For each method the run with the best end: where it was best, and where it ended."""
    found = Table(title="A wider teacher through a bridge")
    for column in ("method", "lr", "best", "at step", "cosine there", "end", "cosine there"):
        found.add_column(column, justify="left" if column == "method" else "right")
    for method in dict.fromkeys(one.method for one in outcomes):
        one = max((o for o in outcomes if o.method == method), key=lambda o: o.final)
        last = max(one.accuracy)
        found.add_row(
            method,
            f"{one.lr:g}",
            f"{one.accuracy[one.best]:.1%}",
            str(one.best),
            _cosine(one.cosine[one.best]),
            f"{one.final:.1%}",
            _cosine(one.cosine[last]),
        )
    return found


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    run_entry_point(main)
