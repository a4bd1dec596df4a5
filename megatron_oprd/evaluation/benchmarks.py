"""Evaluation on benchmarks: samples responses, grades them and computes metrics."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from megatron_oprd.config.engines import EngineName
from megatron_oprd.config.schema import RolloutConfig
from megatron_oprd.data.benchmarks import Benchmark, check_length, tokenized
from megatron_oprd.data.chat import ChatFormat
from megatron_oprd.data.prompts import Prompt
from megatron_oprd.data.tokenizers import load_tokenizer
from megatron_oprd.evaluation.grading import Grader
from megatron_oprd.evaluation.samples_file import Sample, SamplesFile, check_settings
from megatron_oprd.evaluation.sampling_metrics import SamplingMetrics, sampling_metrics
from megatron_oprd.models.layout_checks import check_divides
from megatron_oprd.models.open_checkpoint import OpenedCheckpoint, open_checkpoint
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.rollout.engine import Rollout, RolloutEngine, SamplingParams
from megatron_oprd.rollout.gpus import visible_gpus
from megatron_oprd.rollout.registry import ENGINES, engine_kind
from megatron_oprd.rollout.served_model import ServedModel
from megatron_oprd.weights.checksum import checksum
from megatron_oprd.weights.source import WeightSource

logger = logging.getLogger(__name__)

GRADING_SECONDS = 10.0  # time limit of one comparison


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Settings on which responses depend, in addition to model and problems."""

    engine: EngineName  # as rollout.engine
    sampling: SamplingParams  # samples_per_prompt is the benchmarks' n
    dtype: str
    batch_size: int  # responses generated at the same time
    # As data.chat_template_kwargs.
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BenchmarkEvaluation:
    """Result of an evaluation on benchmarks, as written to its JSON file."""

    settings: GenerationSettings
    models: dict[str, str]  # name -> folder, in the given order
    benchmarks: dict[str, dict[str, int]]  # name -> numbers of problems and of omitted rows
    results: dict[str, dict[str, SamplingMetrics]]  # model -> benchmark -> metrics


@dataclass(frozen=True, kw_only=True)
class _Model:
    """An opened and checked model; its weights are not read yet."""

    name: str
    opened: OpenedCheckpoint
    tokenizer: PreTrainedTokenizerBase
    prompts: dict[str, list[Prompt]]  # by benchmark

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(p.token_ids) for prompts in self.prompts.values() for p in prompts)

    def served(self, settings: GenerationSettings) -> ServedModel:
        """The model as the rollout engine gets to know it."""
        folder = self.opened.source.hf_folder
        return ServedModel(
            folder=folder,
            tokenizer=self.tokenizer,
            dtype=getattr(torch, settings.dtype),
            max_model_len=self.longest + settings.sampling.max_new_tokens,
            owner=f"evaluate {folder.absolute()}",
        )


def evaluate_on_benchmarks(
    models: Mapping[str, Path],
    benchmarks: Sequence[Benchmark],
    settings: GenerationSettings,
    output: Path,
    *,
    device: torch.device,
    tensor_model_parallel_size: int = 1,
    server_url: str | None = None,
) -> BenchmarkEvaluation:
    """Evaluates each model on each benchmark, with one model in memory at a time.

    Samples are appended to ``output/samples/MODEL/BENCHMARK.jsonl``. An interrupted evaluation
    continues from the samples in these files.

    Args:
        models: Name -> Hugging Face folder or Megatron checkpoint.
        benchmarks: The problems.
        settings: The generation settings.
        output: Output folder; created if missing.
        device: The models' device.
        tensor_model_parallel_size: GPUs per model, if the engine can split it: ``device`` and the
            following ones.
        server_url: A server of the engine, if it has servers, that gets each model's weights in
            turn; all models must have the architecture that it serves.

    Raises:
        UserError: A model is unusable, cannot be split, or differs from the server's; sequences
            would exceed a model's maximum length; or ``output`` has samples of other settings or of
            another model.
    """
    # The engine, all models and files are checked before the first model is loaded.
    rollout = ENGINES[settings.engine].alone(
        max_batch_size=settings.batch_size,
        device=device,
        num_gpus=tensor_model_parallel_size,
        server_url=server_url,
    )
    engine_kind(rollout).check_installed(rollout)
    gpus = visible_gpus(device, size=tensor_model_parallel_size)
    opened = [_open(name, folder, benchmarks, settings) for name, folder in models.items()]
    for model in opened:
        layout = ParallelLayout(tensor_model_parallel_size=tensor_model_parallel_size)
        check_divides(model.opened.architecture, layout, model=model.name)
    for model in opened:
        for benchmark in benchmarks:
            check_settings(
                _samples_path(output, model, benchmark), _comparable(settings, benchmark)
            )
        engine_kind(rollout).check_server(rollout, model.served(settings))
    results = {}
    with Grader(timeout=GRADING_SECONDS) as grader:
        for model in opened:
            results[model.name] = _evaluate_model(
                model,
                benchmarks,
                settings,
                output,
                grader=grader,
                device=device,
                gpus=gpus,
                rollout=rollout,
            )
    return BenchmarkEvaluation(
        settings=settings,
        models={name: str(folder) for name, folder in models.items()},
        benchmarks={b.name: describe_benchmark(b) for b in benchmarks},
        results=results,
    )


def write_benchmark_evaluation(evaluation: BenchmarkEvaluation, file: Path) -> None:
    """Writes an evaluation as JSON; creates the folder if missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dataclasses.asdict(evaluation), indent=2) + "\n", encoding="utf-8")


def describe_benchmark(benchmark: Benchmark) -> dict[str, int]:
    """Numbers of a benchmark's problems and of its omitted rows."""
    return {
        "num_problems": len(benchmark.problems),
        "num_rows": benchmark.num_rows,
        "num_repeated": benchmark.num_repeated,
        "num_contradicting": benchmark.num_contradicting,
    }


def grade_rollouts(
    rollouts: Sequence[Rollout],
    benchmark: Benchmark,
    tokenizer: PreTrainedTokenizerBase,
    grader: Grader,
) -> list[Sample]:
    """Grades rollouts of a benchmark's prompts; samples are in the rollouts' order."""
    answers = {problem.index: problem.answer for problem in benchmark.problems}
    samples = []
    for rollout in rollouts:
        text = tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
        grade = grader.grade(text, answers[rollout.prompt_index])
        samples.append(
            Sample(
                prompt_index=rollout.prompt_index,
                sample_index=rollout.sample_index,
                response=text,
                num_tokens=len(rollout.response_ids),
                finished=rollout.finished,
                answer=grade.answer,
                correct=grade.correct,
                timed_out=grade.timed_out,
            )
        )
    return samples


def _open(
    name: str, folder: Path, benchmarks: Sequence[Benchmark], settings: GenerationSettings
) -> _Model:
    opened = open_checkpoint(folder)
    opened.check_tensors()
    tokenizer = load_tokenizer(opened.source.hf_folder)
    chat = ChatFormat(kwargs=settings.chat_template_kwargs)
    prompts = {benchmark.name: tokenized(benchmark, tokenizer, chat) for benchmark in benchmarks}
    for benchmark in benchmarks:
        check_length(
            f"{benchmark.name}, tokenized by {name}",
            prompts[benchmark.name],
            settings.sampling.max_new_tokens,
            opened.architecture.max_position_embeddings,
        )
    return _Model(name=name, opened=opened, tokenizer=tokenizer, prompts=prompts)


def _comparable(settings: GenerationSettings, benchmark: Benchmark) -> dict[str, object]:
    """Settings on which samples depend, as plain JSON values, without the model's weights."""
    # Through JSON, so that tuples equal the lists that are read from the file.
    generation = json.loads(json.dumps(dataclasses.asdict(settings)))
    return {**generation.pop("sampling"), **generation, "problems": benchmark.fingerprint()}


def _samples_path(output: Path, model: _Model, benchmark: Benchmark) -> Path:
    return output / "samples" / model.name / f"{benchmark.name}.jsonl"


def _evaluate_model(
    model: _Model,
    benchmarks: Sequence[Benchmark],
    settings: GenerationSettings,
    output: Path,
    *,
    grader: Grader,
    device: torch.device,
    gpus: Sequence[str],
    rollout: RolloutConfig,
) -> dict[str, SamplingMetrics]:
    engine = engine_kind(rollout).create(rollout, model.served(settings), device=device, gpus=gpus)
    with contextlib.closing(engine):
        noted = xxhash.xxh3_128()
        engine.load_weights(_noting(model.opened.source, noted))
        # The weights' hash is complete once the stream has been read; samples files are opened
        # after it.
        return {
            benchmark.name: _evaluate_benchmark(
                model, benchmark, settings, output, engine, noted.hexdigest(), grader=grader
            )
            for benchmark in benchmarks
        }


def _evaluate_benchmark(
    model: _Model,
    benchmark: Benchmark,
    settings: GenerationSettings,
    output: Path,
    engine: RolloutEngine,
    weights: str,
    *,
    grader: Grader,
) -> SamplingMetrics:
    n = settings.sampling.samples_per_prompt
    # Whole problems: a batch's samples do not depend on when it is generated.
    num_prompts = max(1, settings.batch_size // n)
    prompts = model.prompts[benchmark.name]
    batches = [prompts[i : i + num_prompts] for i in range(0, len(prompts), num_prompts)]
    file = SamplesFile(
        _samples_path(output, model, benchmark),
        {**_comparable(settings, benchmark), "weights": weights},
        [len(batch) * n for batch in batches],
    )
    if file.samples:
        logger.info(
            "%s, %s: %d samples are there already", model.name, benchmark.name, len(file.samples)
        )
    with tqdm(
        total=len(prompts) * n,
        initial=len(file.samples),
        desc=f"{model.name}, {benchmark.name}",
        unit="sample",
    ) as progress:
        for batch in batches[file.num_batches :]:
            rollouts = engine.generate(batch, settings.sampling)
            file.append(grade_rollouts(rollouts, benchmark, model.tokenizer, grader))
            progress.update(len(rollouts))
    return sampling_metrics(file.samples, n)


def _noting(source: WeightSource, noted: xxhash.xxh3_128) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors by name and hashes them into ``noted``, to identify the model."""
    # Sorted: the hash must not depend on the order of files.
    for name in sorted(source.names()):
        tensor = source.read(name)
        noted.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {checksum(tensor)}".encode())
        yield name, tensor
