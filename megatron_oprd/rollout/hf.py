"""Rollout engine in the training process: the student as a transformers model."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.initialization import no_init_weights

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.parallel import cpu
from megatron_oprd.rollout.engine import Progress, Rollout, SamplingParams
from megatron_oprd.rollout.packed import linears_packed
from megatron_oprd.rollout.sampling import (
    StopTexts,
    logits_processors,
    max_new_tokens_of,
    samples_of,
    seed_of,
)
from megatron_oprd.weights.fused_experts import published_name


def attention_of(config: PretrainedConfig) -> str | None:
    """The implementation of attention that has what the model's scores need; None: any."""
    # Some versions of transformers choose another one by themselves, and leave the softcap out.
    return "eager" if getattr(config, "attn_logit_softcapping", None) else None


class HFEngine:
    """A `RolloutEngine` that runs transformers' ``generate`` on a copy of the student.

    Call `load_weights` before `generate`. A seed gives the same response in any batch, up to the
    rounding of the logits: kernels may round differently for another batch shape and flip a near
    tie.
    """

    def __init__(
        self,
        folder: Path,  # its generation_config.json is ignored
        *,
        dtype: torch.dtype,  # of weights and activations
        device: torch.device,
        eos_token_ids: Sequence[int],
        pad_token_id: int,  # left padding; masked
        # The tokenizer's ids; other ids pad the embedding and are never sampled.
        known_ids: Collection[int],
        # Keeps special tokens; needed for stop texts.
        decode: Callable[[Sequence[int]], str] | None = None,
        max_batch_size: int | None = None,  # responses generated at the same time; None: no limit
    ):
        """Builds the model from ``folder``'s config.json, without reading weights."""
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device(device), no_init_weights():
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention_of(config)
            )
        model.tie_weights()  # no_init_weights skips tying, too
        # generate() reads defaults from here for fields that its explicit config leaves unset.
        model.generation_config = GenerationConfig()
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        self._device = device
        self._eos_token_ids = frozenset(eos_token_ids)
        self._pad_token_id = pad_token_id
        self._meaningless_ids = sorted(set(range(config.vocab_size)) - set(known_ids))
        self._decode = decode
        self._max_batch_size = max_batch_size
        self.weights_version: int | None = None
        self._progress = Progress()

    def needs_all_weights(self) -> bool:
        """Whether `load_weights` has not been called or has failed."""
        return self.weights_version is None

    @torch.no_grad()
    def load_weights(
        self,
        stream: Iterable[tuple[str, Tensor]],
        *,
        version: int = 0,
        left_out: Collection[str] = (),
    ) -> None:
        """Replaces weights in place; tensors may have any float dtype and device.

        Tied weights may arrive under either name or both. Raises ValueError for an unknown name, a
        wrong shape, a missing weight, or a repeated one (tied weights may repeat if equal).
        """
        assert not (left_out and self.needs_all_weights()), (
            "weights are left out that are not there"
        )
        self.weights_version = None  # a partial load is not a usable model
        destinations = checkpoint_tensors(self.model)
        shapes = {name: tuple(tensor.shape) for name, tensor in destinations.items()}
        delivered: dict[int, str] = {}  # data pointer -> name; tied weights share the pointer
        for name, tensor in known_weights(stream, shapes):
            destination = destinations[name]
            value = tensor.to(device=destination.device, dtype=destination.dtype)
            earlier = delivered.setdefault(destination.data_ptr(), name)
            if earlier == name:
                destination.copy_(value)
            elif not torch.equal(destination, value):
                raise ValueError(f"{name} and {earlier} are one weight, but got two values")
        there = delivered.keys() | {destinations[name].data_ptr() for name in left_out}
        missing = [n for n, t in destinations.items() if t.data_ptr() not in there]
        if missing:
            raise ValueError(f"{len(missing)} weights were not delivered, the first {missing[0]!r}")
        self.weights_version = version

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Samples ``samples_per_prompt`` responses per prompt, ordered by prompt, then sample.

        Does not communicate with other ranks. Raises RuntimeError if no weights have been loaded.
        """
        if self.weights_version is None:
            raise RuntimeError("generate() before load_weights(): the model has no weights yet")
        requests = [(p, i) for p in prompts for i in samples_of(p, sampling)]
        # Prompts of similar length share a batch, which saves padding.
        by_length = sorted(range(len(requests)), key=lambda i: len(requests[i][0].token_ids))
        batch_size = self._max_batch_size or max(len(requests), 1)
        rollouts: dict[int, Rollout] = {}
        self._progress = Progress()
        # Megatron's stand-in for a GPU would look at every operation: 13 of 160 ms of a token (24
        # layers, 8 sequences, one core). Packed once for all batches.
        with cpu.left(), linears_packed(self.model):
            for start in range(0, len(requests), batch_size):
                batch = by_length[start : start + batch_size]
                rollouts.update(
                    zip(batch, self._generate([requests[i] for i in batch], sampling), strict=True)
                )
                self._progress = Progress(
                    responses=len(rollouts),
                    tokens=sum(len(one.response_ids) for one in rollouts.values()),
                )
        return [rollouts[i] for i in range(len(requests))]

    def progress(self) -> Progress:
        """The batches of the `generate` under way that are done."""
        return self._progress

    def sleep(self) -> None:
        """Does nothing: the model's weights are all the memory the engine holds."""

    def close(self) -> None:
        """Does nothing."""

    def _generate(
        self, requests: Sequence[tuple[Prompt, int]], sampling: SamplingParams
    ) -> list[Rollout]:
        """Generates one batch of (prompt, sample index) pairs."""
        assert self.weights_version is not None
        width = max(len(prompt.token_ids) for prompt, _ in requests)
        # [b, s], padded on the left: generate() appends after the last column
        input_ids = torch.full((len(requests), width), self._pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, (prompt, _) in enumerate(requests):
            assert prompt.token_ids, f"prompt {prompt.index} is empty"
            input_ids[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            attention_mask[row, width - len(prompt.token_ids) :] = 1
        seeds = [seed_of(prompt, sample, sampling) for prompt, sample in requests]
        limits = [max_new_tokens_of(prompt, sampling) for prompt, _ in requests]
        end_ids = self._eos_token_ids | set(sampling.stop_token_ids)
        stop_texts = None
        if sampling.stop:
            assert self._decode is not None, "stop texts need the tokenizer's decoding"
            stop_texts = StopTexts(
                sampling.stop, self._decode, prompt_width=width, num_rows=len(requests)
            )
        processors, logprobs = logits_processors(
            sampling, seeds, self._device, never=self._meaningless_ids
        )
        sequences = self.model.generate(
            input_ids.to(self._device),
            attention_mask=attention_mask.to(self._device),
            generation_config=GenerationConfig(
                # Greedy decoding of logits with Gumbel noise is sampling (GumbelNoise).
                do_sample=False,
                num_beams=1,
                use_cache=True,
                max_new_tokens=max(limits),
                eos_token_id=sorted(end_ids) or None,
                pad_token_id=self._pad_token_id,
            ),
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([] if stop_texts is None else [stop_texts]),
        )
        rollouts = []
        reported = None if logprobs is None else logprobs.rows()
        for row, ((prompt, sample), generated) in enumerate(
            zip(requests, sequences[:, width:].tolist(), strict=True)
        ):
            response = generated[: limits[row]]
            length = next((i + 1 for i, token in enumerate(response) if token in end_ids), None)
            stopped = None if stop_texts is None else stop_texts.lengths[row]
            if stopped is not None and stopped <= len(response):
                # generate() pads after the stop, possibly with an end-of-sequence token.
                length = stopped if length is None else min(length, stopped)
            response = response[:length]
            rollouts.append(
                Rollout(
                    prompt_index=prompt.index,
                    sample_index=sample,
                    prompt_ids=prompt.token_ids,
                    response_ids=tuple(response),
                    finished=length is not None,
                    weights_version=self.weights_version,
                    logprobs=None if reported is None else tuple(reported[row][: len(response)]),
                )
            )
        return rollouts


def known_weights(
    stream: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """Passes through a stream of weights and checks it while it is read.

    Raises ValueError for an unknown name, a shape other than in ``shapes``, or a repeated name.
    """
    came: set[str] = set()
    for name, tensor in stream:
        if name not in shapes:
            raise ValueError(f"the rollout model has no weight {name!r}")
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"{name}: the rollout model's shape is {shapes[name]}, got {tuple(tensor.shape)}"
            )
        if name in came:
            raise ValueError(f"{name} came twice")
        came.add(name)
        yield name, tensor


def checkpoint_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Maps checkpoint names to a model's tensors, or to views of them.

    transformers 5 stores a layer's experts in two tensors, ``experts.gate_up_proj`` [e, 2f, h] and
    ``experts.down_proj`` [e, h, f]; checkpoints have three tensors per expert. GPT-OSS's, which
    have biases, are stacked there as well.
    """
    state = model.state_dict()
    tensors = {}
    for name, tensor in state.items():
        prefix, _, fused = name.rpartition(".")
        if f"{name}_bias" in state:
            tensors[name] = tensor
        elif fused == "gate_up_proj" and prefix.endswith(".experts"):
            for expert, gate_up in enumerate(tensor):
                gate, up = gate_up.chunk(2)
                tensors[f"{prefix}.{expert}.gate_proj.weight"] = gate
                tensors[f"{prefix}.{expert}.up_proj.weight"] = up
        elif fused == "down_proj" and prefix.endswith(".experts"):
            for expert, down in enumerate(tensor):
                tensors[f"{prefix}.{expert}.down_proj.weight"] = down
        else:
            tensors[name] = tensor
    model_type = model.config.model_type
    return {published_name(name, model_type): tensor for name, tensor in tensors.items()}
