"""The teacher's answers, as text to train a student on and to measure it on."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

Messages = list[dict[str, str]]
_IGNORED = -100  # what cross_entropy leaves out


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A prompt's messages and one answer; ``finished`` when the model ended it itself."""

    messages: Messages
    text: str
    finished: bool


def read_prompts(file: Path) -> list[Messages]:
    """The messages of a JSON-lines file of prompts."""
    return [json.loads(line)["prompt"] for line in file.read_text().splitlines()]


@torch.inference_mode()
def answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    *,
    max_new_tokens: int,
    sampled: int = 0,
    batch_size: int = 128,
) -> list[Answer]:
    """Answers to every prompt: so many sampled at temperature 1, or for 0 the greedy one."""
    found = []
    repeated = [one for one in prompts for _ in range(max(1, sampled))]
    # torch's generator decides: the caller seeds it.
    for start in range(0, len(repeated), batch_size):
        batch = repeated[start : start + batch_size]
        inputs = tokenizer.apply_chat_template(
            batch, add_generation_prompt=True, return_dict=True, return_tensors="pt",
            padding=True, tokenizer_kwargs={"padding_side": "left"},
        )  # fmt: skip
        how = {"do_sample": True, "top_k": 0} if sampled else {"do_sample": False}
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, **how)
        for messages, ids in zip(batch, output[:, inputs["input_ids"].shape[1] :], strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            finished = bool((ids == tokenizer.eos_token_id).any())
            found.append(Answer(messages=messages, text=text, finished=finished))
    return found


def encode(answer: Answer, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, in the tokenizer's own chat template, and of the answer."""
    prompt = tokenizer.apply_chat_template(
        answer.messages, add_generation_prompt=True, return_dict=False
    )
    ids = tokenizer(answer.text, add_special_tokens=False)["input_ids"]
    return prompt, [*ids, tokenizer.eos_token_id] if answer.finished else ids


def heal(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Answer],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """Trains a model (in place) on the answers' tokens: AdamW, plain cross-entropy."""
    encoded = [encode(one, tokenizer) for one in texts]
    encoded = [one for one in encoded if one[1]]
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    order: list[int] = []
    for step in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(encoded), generator=draw).tolist()
        batch, order = [encoded[i] for i in order[:batch_size]], order[batch_size:]
        loss = _cross_entropy(model, batch, "mean")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == steps - 1:
            say(f"  step {step}  loss {loss.item():.3f}")
    model.eval()


@torch.inference_mode()
def nats_per_character(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Answer]
) -> float:
    """Mean negative log-likelihood of the answers by character, which any tokenizer can say."""
    total = sum(
        _cross_entropy(model, [encode(one, tokenizer)], "sum").item() for one in texts if one.text
    )
    characters = sum(len(one.text) for one in texts)
    assert math.isfinite(total)
    return total / characters


def _cross_entropy(
    model: LlamaForCausalLM, batch: Sequence[tuple[list[int], list[int]]], reduction: str
) -> Tensor:
    """Of the answers' tokens, padded on the right."""
    width = max(len(prompt) + len(answer) for prompt, answer in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    attended = torch.zeros_like(ids)
    targets = torch.full_like(ids, _IGNORED)
    for row, (prompt, answer) in enumerate(batch):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        attended[row, :end] = 1
        targets[row, len(prompt) : end] = torch.tensor(answer)
    wanted = (targets[:, 1:] != _IGNORED).any(dim=0).nonzero().flatten()
    logits = model(input_ids=ids, attention_mask=attended, logits_to_keep=wanted).logits
    return F.cross_entropy(
        logits.flatten(0, 1).float(),
        targets[:, 1:][:, wanted].flatten(),
        ignore_index=_IGNORED,
        reduction=reduction,
    )
