"""The interface of rollout engines: sampling parameters, rollouts and the engine protocol."""

import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.data.teacher_sequences import TeacherSequence


class RolloutEngineError(RuntimeError):
    """An engine exited, hangs or failed. It is unusable; a new engine may work."""


class WrongWeightsError(RolloutEngineError):
    """An engine's weights differ from the weights that were sent."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of a step.

    A seed gives the same response for a prompt and sample index, independent of the rest of the
    batch and of how prompts are divided over processes.
    """

    temperature: float = 1.0  # softmax temperature; 0 is greedy
    top_p: float = 1.0  # nucleus: smallest set of tokens with at least this probability; 1.0 is off
    top_k: int = 0  # sample from the k most likely tokens; 0 is off
    # A response ends with the token that completes any of these texts in it.
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # in addition to the engine's end-of-sequence tokens
    max_new_tokens: int
    samples_per_prompt: int = 1
    seed: int
    logprobs: bool = False  # return log-probabilities of the sampled tokens; costs the engine time


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One response to one prompt."""

    prompt_index: int  # index in the data set (`Prompt.index`)
    sample_index: int  # from 0, among the prompt's samples_per_prompt responses
    prompt_ids: tuple[int, ...]  # without padding
    # Including the stop token, or the tokens of the stop text; never empty.
    response_ids: tuple[int, ...]
    finished: bool  # False: cut at max_new_tokens
    # Of each response token, whether the student wrote it; only these are supervised. The others
    # were inserted by a function (`megatron_oprd.rollout.function`). None: the student wrote all.
    written: tuple[bool, ...] | None = None
    # Numbers by name that such a function measured.
    metrics: tuple[tuple[str, float], ...] = ()
    # What the teacher reads instead of the student's sequence.
    teacher: TeacherSequence | None = None
    columns: tuple[tuple[str, Any], ...] = ()  # the prompt's, see `Prompt.columns`
    # Per teacher of the run, whether it teaches this rollout; None: all do.
    taught_by: tuple[bool, ...] | None = None
    # The version passed to `RolloutEngine.load_weights`; the oldest, if weights came in the middle.
    weights_version: int = 0
    # Log-probability of each token that the student wrote, from the raw logits: before temperature,
    # top-k and top-p, over the whole vocabulary except padding ids. Equal to the sampling
    # log-probabilities only if all three are off. None if not requested. Excluded from comparison,
    # because their rounding depends on the batch.
    logprobs: tuple[float, ...] | None = field(default=None, compare=False)

    @property
    def num_written(self) -> int:
        """Response tokens that the student wrote."""
        return len(self.response_ids) if self.written is None else sum(self.written)


@dataclass(frozen=True, kw_only=True)
class EngineUse:
    """How full an engine was while it generated, or each of the servers that it uses."""

    # Largest share of each KV cache in use, of the moments it was looked at.
    kv_cache_peaks: tuple[float, ...]
    busy_seconds: tuple[float, ...]  # wall-clock in which each had responses under way
    preemptions: int  # responses that lost their cache for want of room, and computed it again
    queued_seconds: float  # sum over responses of the time before their first token's pass
    num_responses: int

    def __add__(self, other: "EngineUse") -> "EngineUse":
        """The use of both together."""
        return EngineUse(
            kv_cache_peaks=tuple(map(max, self.kv_cache_peaks, other.kv_cache_peaks)),
            busy_seconds=tuple(map(operator.add, self.busy_seconds, other.busy_seconds)),
            preemptions=self.preemptions + other.preemptions,
            queued_seconds=self.queued_seconds + other.queued_seconds,
            num_responses=self.num_responses + other.num_responses,
        )


def teacher_sequences_of(rollouts: Sequence[Rollout]) -> list[TeacherSequence] | None:
    """The teacher's sequence of each rollout; None if it reads the student's sequences."""
    read = [rollout.teacher for rollout in rollouts]
    if all(one is None for one in read):
        return None
    assert None not in read, "the teacher reads all rollouts in one way"
    return [one for one in read if one is not None]


class RolloutEngine(Protocol):
    """Generates responses with the student's current weights.

    Any call may raise `RolloutEngineError`; `load_weights` may raise before its stream is
    exhausted.
    """

    def needs_all_weights(self) -> bool:
        """Whether the engine lacks weights, so the next `load_weights` must bring all of them."""

    def load_weights(
        self,
        stream: Iterable[tuple[str, Tensor]],
        *,
        version: int = 0,
        left_out: Collection[str] = (),
    ) -> None:
        """Replaces weights by the stream's full tensors, under Hugging Face names.

        Later rollouts carry ``version``. The stream has all weights except ``left_out``, which stay
        unchanged; ``left_out`` must be empty if `needs_all_weights`.
        """

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Samples ``samples_per_prompt`` responses per prompt, ordered by prompt, then sample.

        Of a prompt with `Prompt.samples` these responses alone, and of one with
        `Prompt.max_new_tokens` at most so many tokens.
        """

    def sleep(self) -> None:
        """Frees memory that is not needed until the next `load_weights`."""

    def close(self) -> None:
        """Ends the engine."""


@runtime_checkable
class OverlappingEngine(RolloutEngine, Protocol):
    """An engine that generates in the background.

    An engine that swaps weights (`EngineKind.swaps_weights`) may be called in between, also with
    `load_weights` and `start`. For other engines the next call after `start` must be `finish`.
    """

    def start(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        """Starts `generate` in the background."""

    def finish(self) -> list[Rollout]:
        """Waits for the rollouts of the first `start` and returns them as `generate` does."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What an engine has generated so far."""

    responses: int = 0  # whole ones
    tokens: int = 0  # of these; also of responses under way if the engine knows them


@runtime_checkable
class CountingEngine(RolloutEngine, Protocol):
    """An engine that knows how far it is."""

    def progress(self) -> Progress:
        """Of the `generate` under way, or of what `finish` waits for.

        Also called from another thread.
        """


@runtime_checkable
class MeasuringEngine(RolloutEngine, Protocol):
    """An engine that knows how full it was."""

    def take_use(self) -> EngineUse | None:
        """Its use since the last call; None if it generated nothing."""
