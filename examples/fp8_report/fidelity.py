"""How far a teacher's hidden states move, and what it weighs, with its weights in FP8."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_oprd.config.schema import ModelConfig, ParallelConfig, TeacherConfig
from megatron_oprd.data.batching import MicroBatch, collate, pack
from megatron_oprd.data.chat import ChatFormat
from megatron_oprd.data.prompts import load_prompts
from megatron_oprd.data.tokenizers import eos_token_ids, load_tokenizer
from megatron_oprd.distill.representation import token_cosine
from megatron_oprd.distill.taps import Selection
from megatron_oprd.errors import UserError
from megatron_oprd.evaluation.teacher_forced import teacher_continuations
from megatron_oprd.models import fp8_codes, fp8_transformer_engine
from megatron_oprd.models.build import DTYPES, Extent, padded_vocab_size
from megatron_oprd.models.families import mapping_table
from megatron_oprd.models.fp8 import scale_bytes
from megatron_oprd.models.layout_checks import check_divides
from megatron_oprd.models.open_checkpoint import OpenedCheckpoint, open_checkpoint
from megatron_oprd.models.teacher import build_teacher, check_precision, token_multiple
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.weights.megatron_checkpoint import is_megatron
from megatron_oprd.weights.megatron_keys import is_linear_weight, named_parameters

FINAL_NORM = "final norm"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a model's weights take, scales included, over all ranks; bf16 where they are not FP8.

    Attributes:
        linear: Bytes of the weights of the decoder layers' matrices.
        whole: Bytes of all weights; a teacher has no LM head of its own.
    """

    linear: int
    whole: int


@dataclass(frozen=True, kw_only=True)
class PlaceFidelity:
    """The FP8 teacher's hidden states against the other's, in one place.

    Attributes:
        place: A layer, counted from 0, whose raw output is compared; or the final norm.
        cosine: Mean over the positions.
        lowest_cosine: Of the position that moved most.
        relative_error: Mean of |difference| / |hidden state| over the positions.
    """

    place: str
    cosine: float
    lowest_cosine: float
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class RecipeFidelity:
    """One recipe's FP8 teacher.

    Attributes:
        recipe: As in ``teacher.fp8_recipe``.
        weights: What its weights take.
        places: Its hidden states, layer by layer and behind the final norm.
    """

    recipe: str
    weights: Weights
    places: list[PlaceFidelity]


@dataclass(frozen=True, kw_only=True)
class FidelityReport:
    """What ``examples.fp8_report.report`` writes to its JSON file.

    Attributes:
        teacher: The teacher's folder.
        prompts: The prompt files.
        num_sequences: Prompts, each with its continuation.
        num_positions: Positions that are compared.
        params_dtype: What both teachers compute in, and the other's weights are in.
        num_layers_at_start_in_bf16: First layers that are not FP8.
        num_layers_at_end_in_bf16: Last layers that are not.
        bf16: What the weights take in bf16.
        recipes: The recipes.
    """

    teacher: str
    prompts: list[str]
    num_sequences: int
    num_positions: int
    params_dtype: str
    num_layers_at_start_in_bf16: int
    num_layers_at_end_in_bf16: int
    bf16: Weights
    recipes: list[RecipeFidelity]


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What all teachers of one report have in common."""

    opened: OpenedCheckpoint
    model: ModelConfig
    parallel: ParallelConfig
    context: ParallelContext
    sequences: list[list[int]]
    weights: list[Tensor]  # 1 at the positions that are compared, each [length]
    max_tokens: int


def measure_fidelity(
    folder: Path,
    prompt_files: Sequence[Path],
    teachers: Sequence[TeacherConfig],
    *,
    model: ModelConfig,
    parallel: ParallelConfig,
    context: ParallelContext,
    max_new_tokens: int,
    max_prompt_tokens: int,
    max_tokens: int,
) -> FidelityReport:
    """Compares FP8 teachers with the same teacher without FP8, on its own continuations.

    One model is in memory at a time. The hidden states that are compared are kept on the host.

    Args:
        folder: The teacher.
        prompt_files: Read by `load_prompts`.
        teachers: One FP8 precision each, alike but for the recipe; at least one.
        model: Says the number format of everything that is not FP8.
        parallel: The layout, tensor parallelism only.
        context: This rank's place; every rank has to call.
        max_new_tokens: transformers continues each prompt greedily by at most so many tokens, which
            are then compared. 0 continues nothing and compares at the prompts' own tokens.
        max_prompt_tokens: Longer prompts are left out.
        max_tokens: Tokens of a forward pass.

    Raises:
        UserError: The teacher, the prompts or a recipe cannot be used.
    """
    opened = open_checkpoint(folder)
    opened.check_tensors()
    check_divides(
        opened.architecture,
        ParallelLayout.of(parallel),
        model="--teacher",
        spelling=lambda name, size: f"{name} = {size}, the number of processes,",
    )
    for teacher in teachers:
        check_precision(
            teacher,
            opened.architecture,
            model=model,
            parallel=parallel,
            num_layers=opened.architecture.num_layers,
        )
    sequences, starts = _sequences(
        opened, prompt_files, context, max_new_tokens, max_prompt_tokens, DTYPES[model.params_dtype]
    )
    longest = opened.architecture.max_position_embeddings
    if max(map(len, sequences)) > longest:
        raise UserError(
            f"--max-prompt-tokens {max_prompt_tokens} and --max-new-tokens {max_new_tokens} made a "
            f"sequence of {max(map(len, sequences))} tokens; {folder} was made for at most "
            f"{longest}"
        )
    compared = [torch.ones(len(sequence)) for sequence in sequences]
    for weights, start in zip(compared, starts, strict=True):
        weights[:start] = 0.0
    run = _Run(
        opened=opened,
        model=model,
        parallel=parallel,
        context=context,
        sequences=sequences,
        weights=compared,
        max_tokens=max_tokens,
    )
    places = [*map(str, range(opened.architecture.num_layers)), FINAL_NORM]
    chunk = _build(run, TeacherConfig())
    in_bf16 = _weights(chunk, context)
    expected = [states.cpu() for states in _hidden_states(run, TeacherConfig(), chunk)]
    del chunk
    recipes = []
    for teacher in teachers:
        chunk = _build(run, teacher)
        found = _hidden_states(run, teacher, chunk)
        recipes.append(
            RecipeFidelity(
                recipe=teacher.fp8_recipe,
                weights=_weights(chunk, context),
                places=[
                    _compare(place, ours, theirs.to(ours.device))
                    for place, ours, theirs in zip(places, found, expected, strict=True)
                ],
            )
        )
        del chunk, found
    return FidelityReport(
        teacher=str(folder),
        prompts=[str(file) for file in prompt_files],
        num_sequences=len(sequences),
        num_positions=len(expected[0]),
        params_dtype=model.params_dtype,
        num_layers_at_start_in_bf16=teachers[0].num_layers_at_start_in_bf16,
        num_layers_at_end_in_bf16=teachers[0].num_layers_at_end_in_bf16,
        bf16=in_bf16,
        recipes=recipes,
    )


def write_report(report: FidelityReport, file: Path) -> None:
    """Writes a report as JSON; the folder is made where it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n", encoding="utf-8")


def _sequences(
    opened: OpenedCheckpoint,
    prompt_files: Sequence[Path],
    context: ParallelContext,
    max_new_tokens: int,
    max_prompt_tokens: int,
    dtype: torch.dtype,
) -> tuple[list[list[int]], list[int]]:
    """Token ids of every sequence, and where the part begins that is compared."""
    folder = opened.source.hf_folder
    tokenizer = load_tokenizer(folder)
    prompts = [
        prompt.token_ids
        for prompt in load_prompts(
            prompt_files, tokenizer, chat=ChatFormat(), max_prompt_tokens=max_prompt_tokens
        )
    ]
    if max_new_tokens == 0:
        return [list(prompt) for prompt in prompts], [0] * len(prompts)
    if is_megatron(opened.source.folder):
        raise UserError(
            f"--teacher {opened.source.folder} is a Megatron checkpoint, which transformers cannot "
            "continue prompts with; give --max-new-tokens 0"
        )
    continued: list[list[tuple[int, ...]]] = [[]]
    if context.rank == 0:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        continuations = teacher_continuations(
            model.to(context.device).eval(),
            prompts,
            eos_token_ids=eos_token_ids(folder, tokenizer),
            max_new_tokens=max_new_tokens,
        )
        continued = [[continuation.response_ids for continuation in continuations]]
    dist.broadcast_object_list(continued, src=0, group=context.control)
    sequences = [[*p, *response] for p, response in zip(prompts, continued[0], strict=True)]
    return sequences, [len(prompt) for prompt in prompts]


def _build(run: _Run, teacher: TeacherConfig) -> GPTModel:
    """The whole teacher on one pipeline stage."""
    architecture = run.opened.architecture
    padded = padded_vocab_size(
        architecture,
        divisible_by=run.model.make_vocab_size_divisible_by,
        tensor_model_parallel_size=run.context.tp_size,
    )
    (chunk,) = build_teacher(
        architecture,
        Extent(layers_per_stage=(architecture.num_layers,), final_norm=True, lm_head=False),
        mapping_table(architecture, padded_vocab_size=padded),
        run.opened.source,
        teacher=teacher,
        model=run.model,
        parallel=run.parallel,
        context=run.context,
        padded_vocab_size=padded,
        max_sequence_length=max(map(len, run.sequences)),
    )
    return chunk


@torch.no_grad()
def _hidden_states(run: _Run, teacher: TeacherConfig, chunk: GPTModel) -> list[Tensor]:
    """Each layer's raw output at the compared positions, and the final norm's, [positions, h]."""
    outputs: list[list[Tensor]] = [[] for _ in range(len(chunk.decoder.layers) + 1)]
    selection: Selection | None = None

    def record(hidden: Tensor, *, place: int) -> Tensor:
        assert selection is not None
        outputs[place].append(hidden.flatten(0, 1).index_select(0, selection.index))
        return hidden

    for number, layer in enumerate(chunk.decoder.layers):
        layer.tap = partial(record, place=number)
    chunk.decoder.final_layernorm.register_forward_hook(
        lambda _module, _inputs, output: record(output, place=-1)
    )
    for batch in _micro_batches(run, teacher):
        selection = Selection.of(batch, tp_rank=0, tp_size=1)
        chunk(batch.input.tokens, batch.input.position_ids, None)
    return [torch.cat(states) for states in outputs]


def _micro_batches(run: _Run, teacher: TeacherConfig) -> Iterator[MicroBatch]:
    (batches,) = pack(
        [len(sequence) for sequence in run.sequences],
        max_tokens=run.max_tokens,
        micro_batch_size=None,
        num_replicas=1,
    )
    yield from collate(
        batches,
        run.sequences,
        run.weights,
        pad_to_multiple_of=token_multiple(teacher, run.parallel),
        device=run.context.device,
    )


def _weights(chunk: GPTModel, context: ParallelContext) -> Weights:
    linear = whole = scale_bytes([chunk])
    for name, parameter in named_parameters([chunk]).items():
        if is_float8tensor(parameter):
            size = fp8_transformer_engine.num_bytes(parameter)
        elif parameter.dtype == fp8_codes.DTYPE:
            size = parameter.nbytes
        else:
            size = parameter.numel() * torch.bfloat16.itemsize
        whole += size
        if is_linear_weight(name):
            linear += size
    sums = torch.tensor([linear, whole], device=context.device)
    dist.all_reduce(sums, group=context.groups.tp)
    return Weights(linear=int(sums[0]), whole=int(sums[1]))


def _compare(place: str, found: Tensor, expected: Tensor) -> PlaceFidelity:
    found, expected = found.double(), expected.double()
    cosine = token_cosine(found, expected)
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    return PlaceFidelity(
        place=place,
        cosine=float(cosine.mean()),
        lowest_cosine=float(cosine.min()),
        relative_error=float(error.mean()),
    )
