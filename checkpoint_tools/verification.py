"""Two checkpoints compared, what they hold and what they compute; or one and its manifest."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint_tools.hidden_states import (
    HiddenStates,
    StateDifference,
    compare_states,
    transformers_states,
)
from checkpoint_tools.inspection import shares
from checkpoint_tools.megatron_states import load_whole_model, megatron_states
from megatron_oprd.config.schema import ParallelConfig
from megatron_oprd.errors import UserError
from megatron_oprd.models.open_checkpoint import OpenedCheckpoint, open_checkpoint
from megatron_oprd.parallel.context import ParallelContext, data_parallel_size, parallel_run
from megatron_oprd.weights.compare import (
    KeyDifference,
    ValueDifference,
    compare_keys,
    compare_values,
)
from megatron_oprd.weights.hf_files import HFCheckpoint
from megatron_oprd.weights.manifest import (
    ChecksumDifference,
    compare_checksums,
    compare_files,
    read_checksums,
    read_file_checksums,
    stored_tensors,
)
from megatron_oprd.weights.megatron_checkpoint import is_megatron
from megatron_oprd.weights.progress import Progress
from megatron_oprd.weights.source import WeightSource
from megatron_oprd.weights.torch_dist_plan import TargetLayout


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a comparison found.

    Attributes:
        checksums: Tensors that are not what the folder's manifest says; None where the level does
            not look at them.
        keys: Differences of keys; None likewise.
        values: Tensors with other values; None likewise.
        states: Differences of hidden states and logits, place by place; None likewise.
        tolerance: Up to which relative difference states count as equal.
    """

    checksums: list[ChecksumDifference] | None = None
    keys: list[KeyDifference] | None = None
    values: list[ValueDifference] | None = None
    states: list[StateDifference] | None = None
    tolerance: float = 0.0

    @property
    def first_state_over(self) -> StateDifference | None:
        """The first place, in the order in which a token passes, that differs too much."""
        over = (one for one in self.states or () if not one.relative <= self.tolerance)
        return next(over, None)

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        differences = self.checksums or self.keys or self.values
        return not differences and self.first_state_over is None


def verify_manifest(folder: Path) -> Verdict:
    """Compares the tensors of a folder with the checksums in its manifest.

    Args:
        folder: A Hugging Face folder or a Megatron checkpoint that one of the tools or a training
            run wrote. Of training's every file is compared.

    Raises:
        UserError: It cannot be read, or has no manifest with checksums.
    """
    if is_megatron(folder) and (files := read_file_checksums(folder)) is not None:
        with Progress("checking", sum(size for size, _ in files.values())) as progress:
            return Verdict(checksums=compare_files(folder, files, advance=progress.advance))
    stored = stored_tensors(folder)
    expected = read_checksums(folder)
    with Progress("checking", sum(one.num_bytes for one in stored)) as progress:
        different = compare_checksums(stored, expected, advance=progress.advance)
    return Verdict(checksums=different)


def verify_files(
    a: Path,
    b: Path,
    *,
    values: bool,
    dtype: torch.dtype | None = None,
    hf_config: Path | None = None,
) -> Verdict:
    """Compares what two checkpoints hold.

    Args:
        a: The first checkpoint.
        b: The second.
        values: Whether values are compared too, bit by bit.
        dtype: What both are cast to before that; their own dtypes then may differ.
        hf_config: For a Megatron checkpoint without a Hugging Face configuration: a folder with
            the model's.

    Raises:
        UserError: A checkpoint cannot be read.
    """
    source_a, source_b = (open_weights(path, hf_config) for path in (a, b))
    keys = compare_keys(source_a, source_b, ignore_dtypes=dtype is not None)
    if not values:
        return Verdict(keys=keys)
    with Progress("comparing", source_a.num_bytes()) as progress:
        different = compare_values(source_a, source_b, dtype=dtype, advance=progress.advance)
    return Verdict(keys=keys, values=different)


def verify_states(
    a: Path,
    b: Path,
    sequences: Sequence[Sequence[int]],
    *,
    tolerance: float,
    parallel: ParallelConfig,
    megatron_only: bool = False,
    hf_config: Path | None = None,
) -> Verdict | None:
    """Runs two models on the same tokens in fp32 and compares what their layers put out.

    Every rank of the run has to call.

    Args:
        a: The first checkpoint.
        b: The second.
        sequences: Token ids.
        tolerance: Up to which relative difference states count as equal.
        parallel: The layout of a model that runs in Megatron.
        megatron_only: Whether Hugging Face folders run in Megatron too.
        hf_config: For a Megatron checkpoint without a Hugging Face configuration.

    Returns:
        The verdict on rank 0, None on other ranks.

    Raises:
        UserError: A checkpoint cannot be run, or the models are not of one architecture.
    """
    opened = {
        path: open_checkpoint(path, hf_config=hf_config if is_megatron(path) else None)
        for path in (a, b)
        if megatron_only or is_megatron(path)
    }
    for one in opened.values():
        _check_fits(one, sequences, parallel)

    def run(path: Path, context: ParallelContext | None) -> HiddenStates | None:
        if path not in opened:
            if context is not None and context.rank != 0:
                return None
            device = torch.device("cpu") if context is None else context.device
            return transformers_states(path, sequences, device=device)
        assert context is not None
        architecture = opened[path].architecture
        chunks, _ = load_whole_model(
            architecture,
            opened[path].source,
            parallel=parallel,
            context=context,
            max_sequence_length=max(map(len, sequences)),
        )
        return megatron_states(chunks, architecture, sequences, parallel=parallel, context=context)

    if not opened:
        states = [run(a, None), run(b, None)]
    else:
        with parallel_run(parallel, seed=0) as context:
            states = [run(a, context), run(b, context)]
            if context.rank != 0:
                return None
    of_a, of_b = states
    assert of_a is not None
    assert of_b is not None
    return Verdict(states=compare_states(of_a, of_b), tolerance=tolerance)


def open_weights(path: Path, hf_config: Path | None) -> WeightSource:
    """Opens a checkpoint; a Hugging Face folder may be of any architecture.

    Raises:
        UserError: It cannot be read.
    """
    if is_megatron(path):
        return open_checkpoint(path, hf_config=hf_config).source
    return HFCheckpoint(path)


def _check_fits(
    opened: OpenedCheckpoint, sequences: Sequence[Sequence[int]], parallel: ParallelConfig
) -> None:
    """Checks that a model can be run in a layout, before anything is built."""
    opened.check_tensors()
    architecture = opened.architecture
    shares(
        architecture,
        opened.source,
        TargetLayout.of(parallel),
        padded_vocab_size=architecture.padded_vocab_size(parallel.tensor_model_parallel_size),
    )
    data_parallel_size(parallel, int(os.environ.get("WORLD_SIZE", "1")))
    original = architecture.rope.original_max_position_embeddings
    if architecture.rope.rope_type == "longrope" and original is not None:
        longer = {len(sequence) > original for sequence in sequences}
        if len(longer) > 1:
            raise UserError(
                f"some sequences are longer than original_max_position_embeddings = {original} "
                "and some are not; Megatron takes one set of rotary factors for a whole run, "
                "transformers one for each sequence. Give sequences on one side of it."
            )
