"""Compares the contents and results of two checkpoints, or a checkpoint with its manifest."""

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
from megatron_oprd.models.open_checkpoint import OpenedCheckpoint, open_checkpoint, open_folder
from megatron_oprd.parallel.context import ParallelContext, data_parallel_size, parallel_run
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.weights.compare import (
    KeyDifference,
    ValueDifference,
    compare_keys,
    compare_values,
)
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


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The differences found by a comparison; None for what its level does not compare."""

    checksums: list[ChecksumDifference] | None = None  # of the folder with its manifest
    keys: list[KeyDifference] | None = None  # names, shapes, dtypes, config, files
    values: list[ValueDifference] | None = None
    states: list[StateDifference] | None = None  # hidden states and logits, by place
    tolerance: float = 0.0  # largest relative difference of equal states

    @property
    def first_state_over(self) -> StateDifference | None:
        """The first place of the forward pass whose difference exceeds the tolerance."""
        # Written so that NaN counts as over the tolerance.
        over = (one for one in self.states or () if not one.relative <= self.tolerance)
        return next(over, None)

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        differences = self.checksums or self.keys or self.values
        return not differences and self.first_state_over is None


def verify_manifest(folder: Path) -> Verdict:
    """Compares a folder's tensors, or a training checkpoint's files, with its manifest.

    Raises `UserError` if it cannot be read, or its manifest has no checksums.
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
    dtype: torch.dtype | None = None,  # cast both first, and let their dtypes differ
    hf_config: Path | None = None,  # for Megatron checkpoints without a configuration
) -> Verdict:
    """Compares the keys and, with ``values``, every bit of two checkpoints.

    Raises `UserError` if a checkpoint cannot be read.
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
    tolerance: float,  # largest relative difference of equal states
    parallel: ParallelConfig,  # the layout of models that run in Megatron
    megatron_only: bool = False,  # also run Hugging Face folders in Megatron
    hf_config: Path | None = None,  # for Megatron checkpoints without a configuration
) -> Verdict | None:
    """Runs two models on the same token ids in fp32 and compares their layers' outputs.

    Every rank of the run has to call this; rank 0 gets the verdict, other ranks None.

    Raises `UserError` if a checkpoint cannot be run, or the architectures differ.
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
            # transformers runs on one rank; the others wait.
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

    Raises `UserError` if it cannot be read.
    """
    if is_megatron(path):
        return open_checkpoint(path, hf_config=hf_config).source
    return open_folder(path)


def _check_fits(
    opened: OpenedCheckpoint, sequences: Sequence[Sequence[int]], parallel: ParallelConfig
) -> None:
    """Checks that a model can run in a layout, before anything is built."""
    opened.check_tensors()
    architecture = opened.architecture
    # For its errors: whether the layout divides the model.
    shares(
        architecture,
        opened.source,
        ParallelLayout.of(parallel),
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
