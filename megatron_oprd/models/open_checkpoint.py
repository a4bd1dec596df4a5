"""Opens a model's checkpoint in Hugging Face or Megatron format."""

import logging
from dataclasses import dataclass
from pathlib import Path

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.models.argument_checks import check_arguments
from megatron_oprd.models.families import (
    decoder_config,
    mapping_table,
    nested_model,
    plain_names,
    read_architecture,
    under_known_model_type,
    unread_tensors,
)
from megatron_oprd.weights.accounting import check_tensors, check_tied_head
from megatron_oprd.weights.dequantised import Dequantised
from megatron_oprd.weights.expert_parts import ExpertParts, has_parts
from megatron_oprd.weights.fused_experts import UnfusedExperts, has_fused_experts
from megatron_oprd.weights.hf_files import CONFIG_FILE, HFCheckpoint, HFFolder
from megatron_oprd.weights.mapping import Mapping
from megatron_oprd.weights.megatron_arguments import COMMON_FILE, read_arguments
from megatron_oprd.weights.megatron_arguments import CONFIG_FILE as RUN_CONFIG_FILE
from megatron_oprd.weights.megatron_checkpoint import (
    HF_FOLDER,
    MegatronCheckpoint,
    embedding_rows,
    is_megatron,
    resolve_checkpoint_folder,
)
from megatron_oprd.weights.mxfp4 import DequantisedMXFP4
from megatron_oprd.weights.quantization import read_quantization
from megatron_oprd.weights.source import WeightSource
from megatron_oprd.weights.text_part import TextPart
from megatron_oprd.weights.torch_dist_files import METADATA_FILE, TRACKER_FILE, TorchDistFiles

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OpenedCheckpoint:
    """A checkpoint of a known model; no weights have been read yet."""

    source: WeightSource  # tensors under Hugging Face names
    architecture: Architecture
    # The whole model's mappings, with the vocabulary padded as stored (not at all in a Hugging Face
    # folder).
    table: list[Mapping]

    def check_tensors(self) -> None:
        """Raises `UserError` if tensors are missing, unexpected, or of another shape."""
        check_tensors(self.table, self.source, tied=self.architecture.tied)

    def check_tied_head(self) -> None:
        """Raises `UserError` if a tied model stores a head that differs from the embedding."""
        if self.architecture.tied:
            check_tied_head(self.source)


def open_checkpoint(
    path: Path, *, hf_config: Path | None = None, hf_setting: str = "--hf-config"
) -> OpenedCheckpoint:
    """Opens a Hugging Face folder, a Megatron checkpoint, or the newest checkpoint of a run.

    Of a training checkpoint, only the model's weights are visible.

    Args:
        path: The folder.
        hf_config: A folder with config.json, tokenizer and so on, for Megatron checkpoints without.
        hf_setting: The option that gave ``hf_config``, for messages.

    Raises:
        UserError: The folder is incomplete, or of an unsupported format or architecture.
    """
    if is_megatron(path):
        return _open_megatron(resolve_checkpoint_folder(path), hf_config, hf_setting)
    if path.is_dir() and not (path / CONFIG_FILE).is_file():
        raise UserError(
            f"checkpoint {path} is neither a Hugging Face folder (it has no {CONFIG_FILE}) nor a "
            f"Megatron checkpoint (no {METADATA_FILE}, no {TRACKER_FILE})."
        )
    if hf_config is not None:
        raise UserError(
            f"{hf_setting} {hf_config} has no effect, because {path} is a Hugging Face folder "
            "with a configuration of its own; leave it out."
        )
    checkpoint = open_folder(path)
    architecture = read_architecture(checkpoint)
    checkpoint.leave_out(unread_tensors(checkpoint))
    table = mapping_table(architecture, padded_vocab_size=architecture.vocab_size)
    return OpenedCheckpoint(
        source=_with_single_experts(checkpoint, table),
        architecture=architecture,
        table=table,
    )


def _with_single_experts(checkpoint: WeightSource, table: list[Mapping]) -> WeightSource:
    """The folder with one tensor for each expert's layer, as the table has them."""
    if has_parts(table):
        return ExpertParts(checkpoint)
    return UnfusedExperts(checkpoint) if has_fused_experts(checkpoint) else checkpoint


def open_folder(path: Path) -> HFCheckpoint | Dequantised:
    """Opens a Hugging Face folder of any architecture; of a known nested model its decoder.

    Quantised weights are read as their values. Raises `UserError` if the folder cannot be
    read, its weights are quantised otherwise, or a nested model's decoder is not supported.
    """
    checkpoint = HFCheckpoint(path)
    quantization = read_quantization(checkpoint.config, str(path / CONFIG_FILE))
    checkpoint = open_decoder(checkpoint)
    if quantization is None:
        return checkpoint
    form = DequantisedMXFP4 if quantization.is_mxfp4 else Dequantised
    return form(checkpoint, quantization)


def open_decoder(checkpoint: HFCheckpoint) -> HFCheckpoint:
    """The decoder's part of a nested model; another model under a model_type and names known here.

    Raises `UserError` if a nested model's decoder is not supported.
    """
    path = checkpoint.folder
    if (nested := nested_model(checkpoint)) is None:
        known = under_known_model_type(checkpoint.config)
        if known is not checkpoint.config:
            checkpoint.replace_config(known)
        checkpoint.rename(plain_names(checkpoint))
        return checkpoint
    family = read_architecture(checkpoint).family
    decoder = TextPart(
        path,
        config=decoder_config(checkpoint, nested),
        prefix=nested.decoder_prefix,
        plain_prefix=nested.plain_prefix,
        others=nested.other_prefixes,
    )
    logger.warning(
        "%s: of this %s only the decoder is read, as a %s; %d tensors of its other parts (%s) "
        "are left out",
        path,
        nested.name,
        family,
        decoder.num_left_out,
        ", ".join(nested.other_prefixes),
    )
    return decoder


def _open_megatron(folder: Path, hf_config: Path | None, hf_setting: str) -> OpenedCheckpoint:
    files = TorchDistFiles(folder)
    if hf_config is None and not (folder / HF_FOLDER / CONFIG_FILE).is_file():
        raise UserError(
            f"checkpoint {folder} carries no Hugging Face configuration ({HF_FOLDER}/"
            f"{CONFIG_FILE}), as those of other Megatron runs do not: give the folder of the "
            f"model that it was made of, or one like it, with {hf_setting}."
        )
    if hf_config is not None and (folder / HF_FOLDER / CONFIG_FILE).is_file():
        raise UserError(
            f"{hf_setting} {hf_config} has no effect, because checkpoint {folder} carries a "
            f"configuration of its own ({HF_FOLDER}/{CONFIG_FILE}); leave it out."
        )
    hf = HFFolder(hf_config or folder / HF_FOLDER)
    if (nested := nested_model(hf)) is not None:
        raise UserError(
            f"{hf.folder / CONFIG_FILE} is a {nested.name}'s, of which a Megatron checkpoint has "
            "the decoder only; give the configuration of the decoder as a model of its own"
        )
    architecture = read_architecture(hf)
    rows = embedding_rows(files)
    if rows < architecture.vocab_size:
        raise UserError(
            f"checkpoint {folder} has an embedding of {rows} rows, but {hf.folder / CONFIG_FILE} "
            f"says vocab_size = {architecture.vocab_size}; give the configuration of this model."
        )
    found = read_arguments(files)
    if found is not None:
        where, arguments = found
        check_arguments(str(folder), where, arguments, architecture, str(hf.folder / CONFIG_FILE))
    elif hf_config is not None:
        logger.warning(
            "checkpoint %s has no arguments of its own (%s, %s): only names and shapes of tensors "
            "show that %s is its configuration",
            folder,
            COMMON_FILE,
            RUN_CONFIG_FILE,
            hf.folder,
        )
    table = mapping_table(architecture, padded_vocab_size=rows)
    checkpoint = MegatronCheckpoint(files, hf, table)
    return OpenedCheckpoint(source=checkpoint, architecture=architecture, table=table)
