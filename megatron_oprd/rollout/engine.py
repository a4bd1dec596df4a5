"""What the training loop asks of a rollout engine, and what it gets back."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.data.teacher_sequences import TeacherSequence


class RolloutEngineError(RuntimeError):
    """An engine ended, does not answer or failed. It is of no further use; another one may be."""


class WrongWeightsError(RolloutEngineError):
    """An engine has other weights than were sent."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How responses are sampled.

    Attributes:
        temperature: Softmax temperature; 0 is greedy.
        top_p: Nucleus: the smallest set of tokens whose probability reaches this; 1.0 is off.
        top_k: Only the k most likely tokens; 0 is off.
        stop: A response ends with the token that completes any of these texts in the response.
        stop_token_ids: A response ends with any of these, besides the engine's end-of-sequence
            tokens.
        max_new_tokens: A response is cut after this many tokens.
        samples_per_prompt: Responses for each prompt.
        seed: The same seed gives the same response to the same prompt and sample index, whatever
            else is in the batch and however the prompts are divided over processes.
        logprobs: Whether rollouts come with the log-probabilities of their tokens, which takes the
            engine some time.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_new_tokens: int
    samples_per_prompt: int = 1
    seed: int
    logprobs: bool = False


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One response to one prompt.

    Attributes:
        prompt_index: The prompt's index in the data set (`Prompt.index`).
        sample_index: Which of the prompt's ``samples_per_prompt`` responses this is.
        prompt_ids: Token ids of the prompt, without padding.
        response_ids: Token ids of the response, what ended it (end-of-sequence token, stop token,
            tokens of a stop text) included. Never empty.
        finished: False when the response was cut at ``max_new_tokens``.
        teacher: What the teacher reads in its place, if that is something else.
        taught_by: For each of the run's teachers, whether it teaches this rollout; None: all do.
        weights_version: The number that came with the weights (`RolloutEngine.load_weights`).
        logprobs: Log-probability of each response token by the model's logits as they are, before
            temperature, top-k and top-p, over the whole vocabulary but for ids that mean nothing.
            They are not those that it was sampled with, unless these three are off. None where they
            were not asked for. Rollouts are compared without them, since the batch that a response
            is in changes their rounding.
    """

    prompt_index: int
    sample_index: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    finished: bool
    teacher: TeacherSequence | None = None
    taught_by: tuple[bool, ...] | None = None
    weights_version: int = 0
    logprobs: tuple[float, ...] | None = field(default=None, compare=False)


def teacher_sequences_of(rollouts: Sequence[Rollout]) -> list[TeacherSequence] | None:
    """What the teacher reads of each rollout; None if it reads the student's sequences."""
    read = [rollout.teacher for rollout in rollouts]
    if all(one is None for one in read):
        return None
    assert None not in read, "the teacher reads all rollouts in one way"
    return [one for one in read if one is not None]


class RolloutEngine(Protocol):
    """Generates responses with the student's current weights.

    Any call may raise `RolloutEngineError`; `load_weights` also in the middle of its stream.
    """

    def needs_all_weights(self) -> bool:
        """Whether the next `load_weights` has to bring every weight: the engine lacks some."""

    def load_weights(
        self,
        stream: Iterable[tuple[str, Tensor]],
        *,
        version: int = 0,
        left_out: Collection[str] = (),
    ) -> None:
        """Replaces weights by the stream's (full tensors under Hugging Face names).

        Rollouts come back with ``version`` until other weights are loaded. All weights come but
        ``left_out``, which stay as they are; with `needs_all_weights` that is empty.
        """

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Samples ``samples_per_prompt`` responses a prompt, ordered by prompt, then sample."""

    def sleep(self) -> None:
        """Gives up the memory that it does not need until the next `load_weights`."""

    def close(self) -> None:
        """Ends the engine."""


@runtime_checkable
class OverlappingEngine(RolloutEngine, Protocol):
    """An engine that can generate while its caller does something else."""

    def start(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        """Begins what `generate` does. No other call may come before `finish`."""

    def finish(self) -> list[Rollout]:
        """Waits for the rollouts, and returns them as `generate` does."""
