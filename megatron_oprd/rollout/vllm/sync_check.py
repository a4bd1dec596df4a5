"""What is checked of a weight sync: that all weights come once, and that the engine has them."""

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
    """Checks one engine's syncs, one after the other.

    A weight that a sync leaves out has to have the values of the one before.

    Attributes:
        tied: Whether the LM head is the embedding, under whose name alone its weight comes.
        vocab_size: Rows of the embedding.
        is_due: Whether the engine's weights are to be read after the sync that `passing` began.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, interval: int | None) -> None:
        """Reads the model's config.

        Args:
            folder: A Hugging Face model folder, of which no weight is read.
            dtype: The engine's type, which weights are converted to on their way.
            interval: Syncs from one `compare` to the next; None never compares.
        """
        model = AutoConfig.from_pretrained(folder, local_files_only=True)
        self.tied = bool(model.tie_word_embeddings)
        self.vocab_size = int(model.vocab_size)
        self.is_due = False
        self._shapes = checkpoint_shapes(model, tied=self.tied)
        self._dtype = dtype
        self._interval = interval
        self._syncs = 0
        self._sent: dict[str, str] = {}

    def passing(
        self, stream: Iterable[tuple[str, Tensor]], *, left_out: Collection[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """Begins a sync: the stream, refused where it is not all of the model's weights once.

        Args:
            stream: Tensors by name.
            left_out: Names that do not come.

        Raises:
            ValueError: A name that the model lacks, a wrong shape, a weight that came twice or not
                at all; while the stream is read.
        """
        self.is_due = self._interval is not None and self._syncs % self._interval == 0
        self._syncs += 1
        return self._pass(stream, left_out)

    def left_out_shapes(self, left_out: Collection[str]) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights that a sync leaves out, by name."""
        return {name: self._shapes[name] for name in left_out}

    def _pass(
        self, stream: Iterable[tuple[str, Tensor]], left_out: Collection[str]
    ) -> Iterator[tuple[str, Tensor]]:
        came: set[str] = set()
        # The engine gives a tied head the embedding.
        own = ((n, tensor) for n, tensor in stream if not (self.tied and n == HEAD))
        for name, tensor in known_weights(own, self._shapes):
            came.add(name)
            # Of every weight once at least: it may be left out when a check is due.
            if self.is_due or (self._interval is not None and name not in self._sent):
                self._sent[name] = value_checksum(tensor.to(self._dtype))
            yield name, tensor
        if missing := [n for n in self._shapes if n not in came and n not in left_out]:
            raise ValueError(f"{len(missing)} weights were not delivered, the first {missing[0]!r}")

    def compare(self, found: Mapping[str, str], version: int) -> None:
        """Compares checksums of what was sent and of what the engine has, by tensor.

        Of weights that the sync left out, with what was sent when they came last.

        Args:
            found: `checksums_of_engine`.
            version: Of the weights.

        Raises:
            WrongWeightsError: They differ.
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
    """Shape of every tensor of a model's checkpoint, by name; of a tied head under one name."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    tensors = checkpoint_tensors(model.state_dict())
    return {n: tuple(t.shape) for n, t in tensors.items() if not (tied and n == HEAD)}
