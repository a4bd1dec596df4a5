"""Checks of a weight sync: every weight is sent once, and the engine received it intact."""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from megatron_oprd.rollout.engine import WrongWeightsError
from megatron_oprd.rollout.hf import checkpoint_tensors, known_weights
from megatron_oprd.rollout.vllm.worker import EMBEDDING, HEAD, value_checksum

logger = logging.getLogger(__name__)


class SyncCheck:
    """Checks the successive syncs of one engine.

    Weights omitted from a sync must be unchanged since they were last sent.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, interval: int | None) -> None:
        """Reads the config in a Hugging Face model folder; weights are not read."""
        model = AutoConfig.from_pretrained(folder, local_files_only=True)
        # The LM head is the embedding; its weight is then sent only as the embedding.
        self.tied = bool(model.tie_word_embeddings)
        self.vocab_size = int(model.vocab_size)  # rows of the embedding
        self.is_due = False  # read the engine's weights back after the current sync
        self._shapes = checkpoint_shapes(model, tied=self.tied)
        self._dtype = dtype  # the engine's; weights are converted to it before the checksum
        self._interval = interval  # syncs between two comparisons; None: never compare
        self._syncs = 0
        self._sent: dict[str, str] = {}

    def passing(
        self, stream: Iterable[tuple[str, Tensor]], *, left_out: Collection[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """Starts a sync; passes its stream through and checks it while it is read.

        Raises ValueError for an unknown name, a wrong shape, a repeated or a missing weight.
        """
        self.is_due = self._interval is not None and self._syncs % self._interval == 0
        self._syncs += 1
        return self._pass(stream, left_out)

    def left_out_shapes(self, left_out: Collection[str]) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights omitted from a sync, by name."""
        return {name: self._shapes[name] for name in left_out}

    def _pass(
        self, stream: Iterable[tuple[str, Tensor]], left_out: Collection[str]
    ) -> Iterator[tuple[str, Tensor]]:
        came: set[str] = set()
        # Tied: the receiver copies the embedding to the head.
        own = ((n, tensor) for n, tensor in stream if not (self.tied and n == HEAD))
        for name, tensor in known_weights(own, self._shapes):
            came.add(name)
            # Every weight at least once: it may be left out of the sync whose check is due.
            if self.is_due or (self._interval is not None and name not in self._sent):
                self._sent[name] = value_checksum(tensor.to(self._dtype))
            yield name, tensor
        if missing := [n for n in self._shapes if n not in came and n not in left_out]:
            raise ValueError(f"{len(missing)} weights were not delivered, the first {missing[0]!r}")

    def compare(self, found: Mapping[str, str], version: int) -> None:
        """Compares the checksums of sent weights with ``found`` (`checksums_of_engine`).

        Weights omitted from this sync are compared with the values last sent. Raises
        WrongWeightsError if a checksum differs.
        """
        sent = dict(self._sent)
        if self.tied:
            sent[HEAD] = sent[EMBEDDING]
        wrong = sorted(name for name, value in found.items() if sent[name] != value)
        if wrong:
            raise WrongWeightsError(
                f"after weight sync {version} the engine has other values than were sent in "
                f"{len(wrong)} of {len(found)} tensors, the first {wrong[0]!r}"
            )
        if unread := sorted(sent.keys() - found.keys()):
            logger.warning(
                "weight sync %d: %d of %d tensors could not be read back from vLLM, the first %s",
                version,
                len(unread),
                len(sent),
                unread[0],
            )


def checkpoint_shapes(config: PretrainedConfig, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Shape of every checkpoint tensor, by name; without the LM head if it is tied."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    tensors = checkpoint_tensors(model)
    return {n: tuple(t.shape) for n, t in tensors.items() if not (tied and n == HEAD)}
