"""Checks of a weight sync: every weight is sent once, and the engine's workers got it intact."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from megatron_oprd.rollout.engine import WrongWeightsError
from megatron_oprd.rollout.hf import checkpoint_tensors, known_weights
from megatron_oprd.rollout.vllm.messages import HEAD
from megatron_oprd.weights.checksum import checksum


class SyncCheck:
    """Checks the successive syncs of one engine.

    Attributes:
        tied: Whether the LM head is the embedding, which is then sent alone.
        vocab_size: Rows of the embedding.
        has_experts: Whether the model is a mixture of experts.
        largest_elements: Elements of the largest weight.
        is_due: Whether the workers' checksums are compared after the current sync.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, interval: int | None) -> None:
        """Reads the config in a Hugging Face model folder; weights are not read."""
        model = AutoConfig.from_pretrained(folder, local_files_only=True)
        self.tied = bool(model.tie_word_embeddings)
        self.vocab_size = int(model.vocab_size)
        self.is_due = False
        self._shapes = checkpoint_shapes(model, tied=self.tied)
        self.has_experts = any(".experts." in name for name in self._shapes)
        self.largest_elements = max(prod(shape) for shape in self._shapes.values())
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
        self._sent = {}
        return self._pass(stream, left_out)

    def _pass(
        self, stream: Iterable[tuple[str, Tensor]], left_out: Collection[str]
    ) -> Iterator[tuple[str, Tensor]]:
        came: set[str] = set()
        # Tied: the receiver copies the embedding to the head.
        own = ((n, tensor) for n, tensor in stream if not (self.tied and n == HEAD))
        for name, tensor in known_weights(own, self._shapes):
            came.add(name)
            if self.is_due:
                self._sent[name] = checksum(tensor.to(self._dtype))
            yield name, tensor
        if missing := [n for n in self._shapes if n not in came and n not in left_out]:
            raise ValueError(f"{len(missing)} weights were not delivered, the first {missing[0]!r}")

    def compare(self, found: Iterable[Mapping[str, str]], version: int) -> None:
        """Compares the checksums of the tensors that each worker got with those that were sent.

        Raises WrongWeightsError if a worker got another tensor, or one more or fewer.
        """
        for worker, of_worker in enumerate(found):
            names = self._sent.keys() | of_worker.keys()
            wrong = sorted(n for n in names if self._sent.get(n) != of_worker.get(n))
            if wrong:
                raise WrongWeightsError(
                    f"in weight sync {version} worker {worker} of the engine got other values than "
                    f"were sent in {len(wrong)} of {len(names)} tensors, the first {wrong[0]!r}"
                )


def checkpoint_shapes(config: PretrainedConfig, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Shape of every checkpoint tensor, by name; without the LM head if it is tied."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    tensors = checkpoint_tensors(model)
    return {n: tuple(t.shape) for n, t in tensors.items() if not (tied and n == HEAD)}
