"""Division of a step's responses over engines."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.rollout.engine import SamplingParams


def divide(
    prompts: Sequence[Prompt], sampling: SamplingParams, *, num_engines: int
) -> list[list[Prompt]]:
    """What each engine generates: prompts with `Prompt.samples` set. Deterministic.

    Engines get equally many responses, up to one: how long a response becomes is not known, and
    their number is what generation time depends on most. Prompts are dealt out by falling length,
    to the engine that has the fewest prompt tokens so far. A prompt's responses stay on one engine,
    which computes the prompt once, unless that leaves another one idle.
    """
    per_prompt = sampling.samples_per_prompt
    total = len(prompts) * per_prompt
    room = [total // num_engines + (i < total % num_engines) for i in range(num_engines)]
    load = [0] * num_engines
    shares: list[list[Prompt]] = [[] for _ in range(num_engines)]
    # Parts that still need an engine, the longest prompts first.
    for prompt in sorted(prompts, key=lambda prompt: -len(prompt.token_ids)):
        samples = list(range(per_prompt))
        while samples:
            # Whole if possible; else the largest part that some engine has room for.
            fits = max(min(len(samples), of_engine) for of_engine in room)
            able = [i for i in range(num_engines) if room[i] >= fits]
            engine = min(able, key=lambda i: (load[i], i))
            part, samples = samples[:fits], samples[fits:]
            shares[engine].append(replace(prompt, samples=tuple(part)))
            room[engine] -= fits
            load[engine] += len(prompt.token_ids)
    return shares
