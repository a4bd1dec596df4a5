"""Steps that start more prompts than they use (``rollout.oversample``), and what is left of them.

A prompt's place is its position in the stream of prompts: one permutation of the data per epoch
after the other. Step t starts the prompts that wait, and the next ones of the stream.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.rollout.collect import gather
from megatron_oprd.rollout.division import divide
from megatron_oprd.rollout.engine import Rollout
from megatron_oprd.rollout.oversampling import (
    complete_prompts,
    generate_until,
    is_complete,
    key_of,
)
from megatron_oprd.rollout.pool import EnginePool
from megatron_oprd.training import checkpoints
from megatron_oprd.training.plan import RunPlan
from megatron_oprd.training.prompts import sent_prompts_at
from megatron_oprd.training.rollouts import sampling_of_step


@dataclass(frozen=True, kw_only=True)
class SurplusUse:
    """What became of the responses that a step started and did not use."""

    stopped: int  # responses that were not at their end
    dropped: int  # responses whose tokens are given up; their prompts come again
    dropped_tokens: int
    longest_wait: int  # steps that have started the prompt that waits longest; 0 if none waits


class Surplus:
    """Generates for more prompts than a step uses. Every rank has to make every call.

    Attributes:
        waiting: Places of the prompts that were started and not used, in order; they come first in
            the next step. The same on every rank.
    """

    def __init__(
        self,
        plan: RunPlan,
        context: ParallelContext,
        engines: EnginePool,
        prompts: Sequence[Prompt],  # the run's; on rank 0 only
        *,
        waiting: Sequence[int],
    ) -> None:
        self.waiting = tuple(waiting)
        self._plan = plan
        self._context = context
        self._engines = engines
        self._prompts = list(prompts)
        # Responses that go on in the next step, by place and sample.
        self._kept: dict[tuple[int, int], Rollout] = {}

    def generate(self, step: int) -> tuple[list[Rollout], SurplusUse]:
        """A step's rollouts, the same on every rank, with weights of version ``step``.

        Raises:
            RolloutEngineError: An engine failed too often; on every rank.
        """
        config = self._plan.config
        rollout, sampling = config.rollout, sampling_of_step(step, config)
        wanted = rollout.prompts_per_step
        # Every step uses as many prompts as it takes from the stream, so those before it have
        # taken what they used and what waits.
        first_new = step * wanted + len(self.waiting)
        num_new = rollout.started_prompts - len(self.waiting)
        places = [*self.waiting, *range(first_new, first_new + num_new)]
        prompts = sent_prompts_at(places, self._prompts, config, self._context)
        place_of = {
            (prompt.index, prompt.occurrence): place
            for prompt, place in zip(prompts, places, strict=True)
        }
        samples = range(sampling.samples_per_prompt)
        responses = generate_until(
            self._engines,
            prompts,
            sampling,
            wanted=wanted,
            interval=rollout.oversample_interval,
            begun={
                key_of(prompt, sample): self._kept[place, sample]
                for prompt, place in zip(prompts, places, strict=True)
                for sample in samples
                if (place, sample) in self._kept
            },
            decode=lambda ids: self._plan.tokenizer.decode(ids, skip_special_tokens=False),
        )
        used = complete_prompts(prompts, responses, sampling)[:wanted]
        is_used = {place_of[prompt.index, prompt.occurrence] for prompt in used}
        self.waiting = tuple(place for place in places if place not in is_used)
        left = {
            (place, sample): response
            for (index, occurrence, sample), response in responses.items()
            if (place := place_of[index, occurrence]) not in is_used
        }
        self._kept = self._still_usable(left, step + 1)
        dropped = [response for key, response in left.items() if key not in self._kept]
        use = SurplusUse(
            stopped=sum(not is_complete(response, sampling) for response in left.values()),
            dropped=len(dropped),
            dropped_tokens=sum(len(response.response_ids) for response in dropped),
            longest_wait=max((self._wait(place, step) for place in self.waiting), default=0),
        )
        return self._gathered(step, used, responses), use

    def _still_usable(
        self, left: Mapping[tuple[int, int], Rollout], step: int
    ) -> dict[tuple[int, int], Rollout]:
        """The responses that may go on in ``step``."""
        config = self._plan.config
        oldest = step - config.rollout.max_staleness
        # A checkpoint has no responses, so a resumed run could not go on with them.
        if checkpoints.is_due(step, config):
            return {}
        return {key: one for key, one in left.items() if one.weights_version >= oldest}

    def _wait(self, place: int, step: int) -> int:
        """The steps up to ``step``, included, that have started a prompt."""
        rollout = self._plan.config.rollout
        extra = rollout.started_prompts - rollout.prompts_per_step
        return step + 1 - max(0, (place - extra) // rollout.prompts_per_step)

    def _gathered(
        self, step: int, used: Sequence[Prompt], responses: Mapping[tuple[int, int, int], Rollout]
    ) -> list[Rollout]:
        """The rollouts of the prompts that the step uses, as the teacher reads them too."""
        engines, sampling = self._engines, sampling_of_step(step, self._plan.config)
        generated = None
        if engines.own is not None:
            share = divide(used, sampling, num_engines=engines.size)[engines.own]
            generated = [
                responses[key_of(prompt, sample)]
                for prompt in share
                for sample in prompt.samples or ()
            ]
        return gather(
            engines,
            generated,
            used,
            sampling,
            weights_versions=range(step - self._plan.config.rollout.max_staleness, step + 1),
            reader=self._plan.teachers[0].reader,
        )
