"""Evaluation on benchmarks during a run, with the run's own rollout engines."""

import dataclasses
import datetime
import time
from pathlib import Path
from typing import Any

from megatron_oprd.data.benchmarks import Benchmark, tokenized
from megatron_oprd.evaluation.benchmarks import GRADING_SECONDS, grade_rollouts
from megatron_oprd.evaluation.grading import Grader
from megatron_oprd.evaluation.samples_file import Sample
from megatron_oprd.evaluation.sampling_metrics import SamplingMetrics, sampling_metrics
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.phases import phase
from megatron_oprd.rollout.collect import collect
from megatron_oprd.rollout.engine import SamplingParams
from megatron_oprd.rollout.pool import EnginePool
from megatron_oprd.training.plan import RunPlan
from megatron_oprd.training.reading import chat_format_of_benchmarks


class BenchmarkEvaluator:
    """Evaluates the student every ``evaluation.interval`` steps."""

    def __init__(self, plan: RunPlan, context: ParallelContext, *, today: datetime.date | None):
        # `today` is the run's first day, so that a resumed run gets the same prompts.
        chat = dataclasses.replace(chat_format_of_benchmarks(plan.config), today=today)
        self._plan = plan
        self._context = context
        self._prompts = [
            tokenized(benchmark, plan.tokenizer, chat) for benchmark in plan.benchmarks
        ]

    def is_due(self, steps_done: int) -> bool:
        """Whether to evaluate after ``steps_done`` steps."""
        interval = self._plan.config.evaluation.interval
        at_end = steps_done == self._plan.config.train_iters
        return interval is not None and (at_end or steps_done % interval == 0)

    @phase("evaluation")
    def evaluate(self, engines: EnginePool, steps_done: int) -> dict[str, Any]:
        """Evaluates on all benchmarks; every rank has to call.

        The engines generate the responses, with the weights that they have. Rank 0 grades them and
        writes the samples to ``output_dir/evaluation/step_N``, replacing older ones.

        Returns:
            On rank 0 ``eval/NAME`` -> measure -> value for each benchmark, and over all benchmarks
            ``eval_score``, the share of right responses, and ``eval_responses``, their number. On
            every rank ``seconds_evaluation``.
        """
        started = time.perf_counter()
        folder = Path(self._plan.config.output_dir) / "evaluation" / f"step_{steps_done}"
        if self._context.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for benchmark in self._plan.benchmarks:
                # _append adds to the file; a resumed run may evaluate the same step again.
                _file(folder, benchmark).unlink(missing_ok=True)
        metrics: dict[str, Any] = {}
        is_right: list[bool] = []
        with Grader(timeout=GRADING_SECONDS) as grader:
            for number, benchmark in enumerate(self._plan.benchmarks):
                samples = self._sample(engines, number, folder, grader, steps_done)
                if self._context.rank == 0:
                    n = self._plan.config.evaluation.n
                    metrics[f"eval/{benchmark.name}"] = _flat(sampling_metrics(samples, n))
                    is_right += [sample.correct for sample in samples]
        if self._context.rank == 0:
            metrics["eval_score"] = sum(is_right) / len(is_right)
            metrics["eval_responses"] = len(is_right)
        return {**metrics, "seconds_evaluation": time.perf_counter() - started}

    def _sample(
        self,
        engines: EnginePool,
        number: int,
        folder: Path,
        grader: Grader,
        weights_version: int,
    ) -> list[Sample]:
        """Graded samples of one benchmark on rank 0, written in batches as they come."""
        config, context = self._plan.config, self._context
        benchmark, prompts = self._plan.benchmarks[number], self._prompts[number]
        at_once = self._prompts_at_once(engines.size)
        samples: list[Sample] = []
        for start in range(0, len(prompts), at_once):
            rollouts = collect(
                engines,
                prompts[start : start + at_once],
                SamplingParams(
                    temperature=config.evaluation.temperature,
                    top_p=config.evaluation.top_p,
                    stop=tuple(config.rollout.stop),
                    stop_token_ids=tuple(config.rollout.stop_token_ids),
                    max_new_tokens=config.evaluation.max_new_tokens,
                    samples_per_prompt=config.evaluation.n,
                    # The same at every step, so that students differ by their weights alone.
                    seed=config.seed,
                ),
                weights_version=weights_version,
            )
            if context.rank == 0:
                graded = grade_rollouts(rollouts, benchmark, self._plan.tokenizer, grader)
                _append(folder, benchmark, graded)
                samples += graded
        return samples

    def _prompts_at_once(self, num_engines: int) -> int:
        """The number of problems in a batch: about as many responses as in a training step."""
        config = self._plan.config
        responses = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
        # A multiple of the engines, so that all have the same share.
        return max(1, responses // config.evaluation.n // num_engines) * num_engines


def _append(folder: Path, benchmark: Benchmark, samples: list[Sample]) -> None:
    with _file(folder, benchmark).open("a", encoding="utf-8") as file:
        file.writelines(sample.as_line() for sample in samples)


def _file(folder: Path, benchmark: Benchmark) -> Path:
    return folder / f"{benchmark.name}.jsonl"


def _flat(metrics: SamplingMetrics) -> dict[str, float]:
    """Measures by their names in the logs, without intervals."""
    rest = dataclasses.asdict(metrics)
    return {
        f"avg@{metrics.n}": metrics.avg.value,
        f"best@{metrics.n}": metrics.best.value,
        **{f"pass@{k}": estimate.value for k, estimate in metrics.pass_at.items()},
        **{
            name: rest[name]
            for name in ("dist_4", "mean_length", "cut_share", "no_answer_share", "num_timed_out")
        },
    }
