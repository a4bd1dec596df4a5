"""Measures a saved student against its teacher, with transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from task import Problem, encode_prompts, max_new_tokens, respond, solved
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

_SEED = 123  # of the sampled responses


@dataclass(frozen=True, kw_only=True)
class Measures:
    """One student.

    Attributes:
        accuracy: Share of all problems that it solves with its most likely tokens.
        num_problems: Their number.
        cosine_by_position: Of the student's hidden states with the teacher's, mean over layers, by
            position of the response's token that they predict. The responses are sampled from the
            student, at temperature 1; None where none of them has a token.
        kl_by_position: KL(student || teacher) at these positions, in nats.
        cosine: Mean over all of these tokens.
        kl: Likewise.
        first_token: Share of the responses whose first token would be the teacher's most likely one
            if each model took its own most likely token.
    """

    accuracy: float
    num_problems: int
    cosine_by_position: list[float | None]
    kl_by_position: list[float | None]
    cosine: float
    kl: float
    first_token: float


@torch.no_grad()
def measure(
    student: Path, teacher: Path, problems: Sequence[Problem], *, num_sampled: int
) -> Measures:
    """Measures a saved student; ``num_sampled`` of the problems are answered by sampling, too."""
    tokenizer = AutoTokenizer.from_pretrained(student, local_files_only=True)
    models = [
        AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        for folder in (student, teacher)
    ]
    prompts = encode_prompts(problems, tokenizer)
    longest = max_new_tokens(problems)
    greedy = respond(models[0], tokenizer, prompts, max_new_tokens=longest, do_sample=False)
    torch.manual_seed(_SEED)
    sampled = respond(
        models[0], tokenizer, prompts[:num_sampled], max_new_tokens=longest, do_sample=True
    )
    tokens = torch.cat([prompts[:num_sampled], sampled], 1)
    (states, logits), (teacher_states, teacher_logits) = (
        _predicting(model, tokens, num_prompt_tokens=prompts.shape[1]) for model in models
    )
    cosines = F.cosine_similarity(states, teacher_states, dim=-1).mean(0)
    log_p, log_q = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    counts = sampled != tokenizer.pad_token_id
    return Measures(
        accuracy=solved(greedy, tokenizer, problems).mean().item(),
        num_problems=len(problems),
        cosine_by_position=_by_position(cosines, counts),
        kl_by_position=_by_position(kl, counts),
        cosine=cosines[counts].mean().item(),
        kl=kl[counts].mean().item(),
        first_token=(log_p[:, 0].argmax(-1) == log_q[:, 0].argmax(-1)).float().mean().item(),
    )


def _predicting(
    model: PreTrainedModel, tokens: Tensor, *, num_prompt_tokens: int
) -> tuple[Tensor, Tensor]:
    """States [layers, n, s, d] and logits [n, s, v] at the positions that predict the response."""
    predicting = slice(num_prompt_tokens - 1, -1)
    output = model(input_ids=tokens, output_hidden_states=True)
    # The first one is the embedding.
    states = torch.stack(output.hidden_states[1:])
    return states[:, :, predicting], output.logits[:, predicting]


def _by_position(values: Tensor, counts: Tensor) -> list[float | None]:
    """Means over the responses [n, s] that have a token there."""
    return [
        column[has].mean().item() if has.any() else None
        for column, has in zip(values.T, counts.T, strict=True)
    ]
