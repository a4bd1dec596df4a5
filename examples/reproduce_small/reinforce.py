"""Makes a teacher of the student: policy gradient on its own responses to the training problems."""

from dataclasses import dataclass

import torch
from task import Split, accuracy, encode_prompts, max_new_tokens, respond, solved
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

_WARM_UP = 10
_LEAST_DEVIATION = 1e-4


@dataclass(frozen=True, kw_only=True)
class Reinforcement:
    """REINFORCE with a group's mean as baseline: GRPO without its clipping, as no response is old.

    Attributes:
        steps: Optimizer steps.
        prompts_per_step: Prompts of a step.
        group: Responses to each of them.
        lr: Peak learning rate; a warm-up of ten steps, then linearly down to 0.
        interval: Steps between evaluations on the validation problems.
        seed: Seed of prompts and responses.
    """

    steps: int = 300
    prompts_per_step: int = 64
    group: int = 8
    lr: float = 5e-4
    interval: int = 25
    seed: int = 7


def reinforce(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    split: Split,
    settings: Reinforcement,
) -> list[dict[str, float]]:
    """Trains the model in place; the reward is 1 for the exact answer and 0 for all else.

    Returns:
        Step, mean reward and validation accuracy at each evaluation.
    """
    torch.manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0)
    all_prompts = encode_prompts(split.train, tokenizer)
    longest = max_new_tokens(split.train)
    curve = []
    for step in range(1, settings.steps + 1):
        drawn = torch.randint(len(split.train), (settings.prompts_per_step,))
        drawn = drawn.repeat_interleave(settings.group)
        prompts = all_prompts[drawn]
        responses = respond(model, tokenizer, prompts, max_new_tokens=longest, do_sample=True)
        rewards = solved(responses, tokenizer, [split.train[i] for i in drawn.tolist()])
        advantages = _advantages(rewards, settings.group)
        # A group of equal rewards teaches nothing.
        told = advantages != 0
        if told.any():
            optimizer.zero_grad()
            _loss(model, tokenizer, prompts[told], responses[told], advantages[told]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * min(step / _WARM_UP, 1 - (step - 1) / settings.steps)
            optimizer.step()
        if step % settings.interval and step != settings.steps:
            continue
        right = accuracy(model, tokenizer, split.validation)
        curve.append({"step": step, "reward": rewards.mean().item(), "accuracy": right})
        print(f"RL step {step}  reward {curve[-1]['reward']:.3f}  accuracy {right:.3f}", flush=True)
    return curve


def _advantages(rewards: Tensor, group: int) -> Tensor:
    """Rewards [n], the group's mean taken off, in units of the group's deviation."""
    grouped = rewards.view(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (grouped.std(1, keepdim=True) + _LEAST_DEVIATION)).flatten()


def _loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Tensor,
    responses: Tensor,
    advantages: Tensor,
) -> Tensor:
    """Mean over the responses' tokens, the end token included."""
    logits = model(input_ids=torch.cat([prompts, responses], 1)).logits
    log_probs = logits[:, prompts.shape[1] - 1 : -1].log_softmax(-1)
    taken = log_probs.gather(-1, responses[..., None])[..., 0]
    counts = responses != tokenizer.pad_token_id
    return -(taken * advantages[:, None] * counts).sum() / counts.sum()
