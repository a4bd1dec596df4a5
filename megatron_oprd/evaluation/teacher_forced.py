"""Measures of a student on its teacher's greedy continuations: no sampling noise.

The teacher continues held-out prompts greedily; then both models read the same prompt and
continuation and are compared at the continuation's tokens. Models are plain transformers ones.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_oprd.distill.layer_map import LayerPair
from megatron_oprd.distill.representation import token_cosine

_ROWS = 256  # positions whose distributions over the vocabulary are held at a time


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """A prompt and the teacher's greedy continuation of it.

    Attributes:
        prompt_ids: Token ids of the prompt, without padding; at least one.
        response_ids: Token ids of the continuation, the end-of-sequence token included when the
            teacher wrote it; at least one.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TeacherForcedMeasures:
    """A student against its teacher; every mean is over all response tokens of all sequences.

    Attributes:
        num_sequences: Continuations compared.
        num_positions: Response tokens in them.
        cosine: Mean of ``cosine_per_layer`` over the layers; None where none were compared.
        cosine_per_layer: Student layer (counted from 0, as text) -> mean cosine of the hidden
            states that hold the response tokens. The last layer's are those after the final norm.
        top1_agreement: Share of response tokens for which both models' most likely token is the
            same one, 0 to 1.
        reverse_kl: KL(student || teacher) of the next-token distributions, nats a token.
        forward_kl: KL(teacher || student), nats a token.
        student_perplexity: exp of the student's mean negative log-likelihood of a response token.
        teacher_perplexity: The same of the teacher: what a perfect student reaches.
    """

    num_sequences: int
    num_positions: int
    cosine: float | None
    cosine_per_layer: dict[str, float]
    top1_agreement: float
    reverse_kl: float
    forward_kl: float
    student_perplexity: float
    teacher_perplexity: float


@torch.inference_mode()
def teacher_continuations(
    teacher: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    eos_token_ids: Collection[int],
    max_new_tokens: int,
    batch_size: int = 8,
) -> list[Continuation]:
    """The teacher's greedy continuations.

    The most likely token follows each time, whatever the model's generation config asks for (a
    repetition penalty, say).

    Args:
        teacher: In evaluation mode.
        prompts: Token ids of each prompt, at least one a prompt.
        eos_token_ids: A continuation ends with the first of these; may be empty.
        max_new_tokens: It ends after so many tokens at the latest; at least 1.
        batch_size: Prompts that are continued at a time.

    Returns:
        One continuation a prompt, in the order of ``prompts``.

    Raises:
        ValueError: A prompt is empty, or ``max_new_tokens`` is below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
    if not all(prompts):
        raise ValueError("a prompt without tokens cannot be continued")
    ends = set(eos_token_ids)
    responses: dict[int, list[int]] = {}
    for indices in _batches_of_like_length([len(p) for p in prompts], batch_size):
        batch = [list(prompts[i]) for i in indices]
        for index, tokens in zip(
            indices, _greedy(teacher, batch, max_new_tokens, ends), strict=True
        ):
            end = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
            responses[index] = tokens[:end]
    return [
        Continuation(prompt_ids=tuple(prompt), response_ids=tuple(responses[index]))
        for index, prompt in enumerate(prompts)
    ]


@torch.inference_mode()
def teacher_forced_measures(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    sequences: Sequence[Continuation],
    pairs: Sequence[LayerPair],
    *,
    batch_size: int = 8,
) -> TeacherForcedMeasures:
    """Compares both models at the continuations' tokens.

    Hidden states are compared at the positions that hold the response tokens, distributions at
    the positions that predict them (one earlier). Distributions are computed in fp32, or fp64 for
    fp64 models. Memory grows with ``batch_size``, not with the number of sequences.

    Args:
        student: In evaluation mode.
        teacher: In evaluation mode, with the student's vocabulary size. The two may be one object.
        sequences: What is read, at least one.
        pairs: The layers whose hidden states are compared, which takes models of one width; none
            compares the distributions only.
        batch_size: Sequences that are read at a time.

    Returns:
        The measures; batching and padding do not change them beyond rounding.

    Raises:
        ValueError: No sequences, or the models' vocabulary sizes differ, or their widths where
            layers are to be compared.
    """
    if not sequences:
        raise ValueError("nothing to compare: no sequences")
    for field in ("hidden_size", "vocab_size") if pairs else ("vocab_size",):
        if (ours := getattr(student.config, field)) != (theirs := getattr(teacher.config, field)):
            raise ValueError(f"the student's {field} is {ours}, the teacher's {theirs}")

    sums = _Sums(len(pairs))
    lengths = [len(s.prompt_ids) + len(s.response_ids) for s in sequences]
    for indices in _batches_of_like_length(lengths, batch_size):
        batch = [sequences[i] for i in indices]
        student_hidden, student_logits = _read(student, batch, [pair.student for pair in pairs])
        teacher_hidden, teacher_logits = _read(teacher, batch, [pair.teacher for pair in pairs])
        for layer, (ours, theirs) in enumerate(zip(student_hidden, teacher_hidden, strict=True)):
            sums.cosine[layer] += _total(token_cosine(ours, theirs))
        tokens = torch.tensor([token for s in batch for token in s.response_ids])
        for rows in torch.arange(len(tokens)).split(_ROWS):
            sums.add_distributions(student_logits[rows], teacher_logits[rows], tokens[rows])

    n = sums.positions
    cosine_per_layer = {
        str(pair.student): total / n for pair, total in zip(pairs, sums.cosine, strict=True)
    }
    return TeacherForcedMeasures(
        num_sequences=len(sequences),
        num_positions=n,
        cosine=sum(cosine_per_layer.values()) / len(pairs) if pairs else None,
        cosine_per_layer=cosine_per_layer,
        top1_agreement=sums.agreements / n,
        reverse_kl=sums.reverse_kl / n,
        forward_kl=sums.forward_kl / n,
        student_perplexity=math.exp(sums.student_nll / n),
        teacher_perplexity=math.exp(sums.teacher_nll / n),
    )


class _Sums:
    """Sums over the response tokens seen so far."""

    def __init__(self, num_pairs: int) -> None:
        self.positions = 0
        self.cosine = [0.0] * num_pairs
        self.agreements = 0
        self.reverse_kl = self.forward_kl = 0.0
        self.student_nll = self.teacher_nll = 0.0

    def add_distributions(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> None:
        """Adds n positions: logits [n, V] of both models, and the tokens [n] that follow."""
        log_p, log_q = _log_softmax(student), _log_softmax(teacher)
        picked = tokens.to(log_p.device)[:, None]
        self.positions += len(tokens)
        self.agreements += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        self.reverse_kl += _total(log_p.exp() * (log_p - log_q))
        self.forward_kl += _total(log_q.exp() * (log_q - log_p))
        self.student_nll -= _total(log_p.gather(1, picked))
        self.teacher_nll -= _total(log_q.gather(1, picked))


def _read(
    model: PreTrainedModel, batch: Sequence[Continuation], layers: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """One forward pass over prompt + response, padded on the right.

    Returns:
        For each layer, its hidden states at the response tokens, [n, d]; and the logits [n, V]
        that predict these tokens. Rows are ordered by sequence, then position.
    """
    width = max(len(s.prompt_ids) + len(s.response_ids) for s in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    attended = torch.zeros_like(ids)
    holds_response = torch.zeros_like(ids, dtype=torch.bool)
    for row, sequence in enumerate(batch):
        start = len(sequence.prompt_ids)
        end = start + len(sequence.response_ids)
        ids[row, :end] = torch.tensor(sequence.prompt_ids + sequence.response_ids)
        attended[row, :end] = 1
        holds_response[row, start:end] = True

    # Logits only from the first column that predicts a response token; the last predicts none.
    first = min(len(s.prompt_ids) for s in batch) - 1
    predicting = torch.arange(first, width - 1, device=model.device)
    output = model(
        input_ids=ids.to(model.device),
        attention_mask=attended.to(model.device),
        output_hidden_states=True,
        use_cache=False,
        logits_to_keep=predicting,
    )
    holds_response = holds_response.to(model.device)
    # transformers' hidden_states[0] is the embedding.
    hidden = [output.hidden_states[layer + 1][holds_response] for layer in layers]
    return hidden, output.logits[holds_response[:, first + 1 :]]


def _greedy(
    model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, ends: set[int]
) -> list[list[int]]:
    """The most likely tokens one after the other; rows go on after their end of sequence."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    attended = torch.zeros(len(prompts), width + max_new_tokens, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attended[row, width - len(prompt) :] = 1
    ids, attended = ids.to(model.device), attended.to(model.device)
    positions = (attended.cumsum(dim=1) - 1).clamp(min=0)

    written: list[Tensor] = []
    finished = torch.zeros(len(prompts), dtype=torch.bool)
    cache, seen = None, 0
    for length in range(width, width + max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=attended[:, :length],
            position_ids=positions[:, seen:length],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        ids = output.logits[:, -1:].argmax(dim=-1)  # [b, 1]
        cache, seen = output.past_key_values, length
        written.append(ids.cpu())
        finished |= torch.tensor([token in ends for token in ids.flatten().tolist()])
        if finished.all():
            break
    return torch.cat(written, dim=1).tolist()


def _batches_of_like_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches, by length, so that little is padded."""
    by_length = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for start in range(0, len(by_length), batch_size):
        yield by_length[start : start + batch_size]


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def _total(values: Tensor) -> float:
    return values.sum(dtype=torch.float64).item()
