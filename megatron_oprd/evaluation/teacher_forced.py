"""Metrics of a student on its teacher's greedy continuations, without sampling noise.

The teacher continues held-out prompts greedily. Both models (from transformers) then read prompt
and continuation and are compared at the continuation's tokens.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_oprd.distill.layer_map import LayerPair
from megatron_oprd.distill.representation import token_cosine
from megatron_oprd.weights.progress import Progress

ROWS = 256  # positions per chunk of distributions; bounds memory


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """A prompt and the teacher's greedy continuation, both with at least one token."""

    prompt_ids: tuple[int, ...]  # without padding
    response_ids: tuple[int, ...]  # the end-of-sequence token included, if the teacher wrote it


@dataclass(frozen=True, kw_only=True)
class TeacherForcedMeasures:
    """Metrics of a student; means are over all response tokens of all sequences."""

    num_sequences: int  # compared continuations
    num_positions: int  # their response tokens
    cosine: float | None  # mean over the layers; None if no layers were compared
    # Student layer (from 0, as text) -> mean cosine of hidden states at the response tokens. The
    # last layer's are taken after the final norm.
    cosine_per_layer: dict[str, float]
    top1_agreement: float  # share of tokens with the same argmax in both models, 0 to 1
    reverse_kl: float  # KL(student || teacher) of next-token distributions, nats per token
    forward_kl: float  # KL(teacher || student), nats per token
    student_perplexity: float  # exp(mean negative log-likelihood of a response token)
    teacher_perplexity: float  # the teacher's own: the value of a perfect student


@torch.inference_mode()
def teacher_continuations(
    teacher: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    eos_token_ids: Collection[int],
    max_new_tokens: int,
    batch_size: int = 8,
) -> list[Continuation]:
    """Generates the teacher's greedy continuations, in the order of the prompts.

    The model must be in evaluation mode. Each token is the argmax: the model's generation config
    (e.g. a repetition penalty) is ignored. A continuation ends with the first of ``eos_token_ids``,
    which may be empty, or after ``max_new_tokens`` tokens. Raises ValueError if a prompt is empty
    or ``max_new_tokens`` is below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
    if not all(prompts):
        raise ValueError("a prompt without tokens cannot be continued")
    ends = set(eos_token_ids)
    responses: dict[int, list[int]] = {}
    with Progress("teacher's continuations", len(prompts), unit=" sequences") as progress:
        for indices in _batches_of_like_length([len(p) for p in prompts], batch_size):
            batch = [list(prompts[i]) for i in indices]
            for index, tokens in zip(
                indices, _greedy(teacher, batch, max_new_tokens, ends), strict=True
            ):
                end = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
                responses[index] = tokens[:end]
            progress.advance(len(indices))
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
    """Compares both models (or one with itself), in evaluation mode, at the continuations' tokens.

    Hidden states are compared at the positions of the response tokens, distributions at the
    positions that predict them (one earlier), in fp32 (fp64 for fp64 models). Memory grows with
    ``batch_size``, not with the number of sequences; batching and padding change results only by
    rounding. ``pairs`` are the compared layers; they require equal hidden sizes, and without them
    only distributions are compared.

    Raises ValueError for no sequences, different vocabulary sizes, or different hidden sizes with
    ``pairs``.
    """
    if not sequences:
        raise ValueError("nothing to compare: no sequences")
    for field in ("hidden_size", "vocab_size") if pairs else ("vocab_size",):
        if (ours := getattr(student.config, field)) != (theirs := getattr(teacher.config, field)):
            raise ValueError(f"the student's {field} is {ours}, the teacher's {theirs}")

    sums = _Sums(len(pairs))
    lengths = [len(s.prompt_ids) + len(s.response_ids) for s in sequences]
    with Progress("comparing with the teacher", len(sequences), unit=" sequences") as progress:
        for indices in _batches_of_like_length(lengths, batch_size):
            batch = [sequences[i] for i in indices]
            student_hidden, student_logits = _read(student, batch, [pair.student for pair in pairs])
            teacher_hidden, teacher_logits = _read(teacher, batch, [pair.teacher for pair in pairs])
            for layer, (ours, theirs) in enumerate(
                zip(student_hidden, teacher_hidden, strict=True)
            ):
                sums.cosine[layer] += _total(token_cosine(ours, theirs))
            tokens = torch.tensor([token for s in batch for token in s.response_ids])
            for rows in torch.arange(len(tokens)).split(ROWS):
                sums.add_distributions(student_logits[rows], teacher_logits[rows], tokens[rows])
            progress.advance(len(indices))

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
    """Sums over the response tokens processed so far."""

    def __init__(self, num_pairs: int) -> None:
        self.positions = 0
        self.cosine = [0.0] * num_pairs
        self.agreements = 0
        self.reverse_kl = self.forward_kl = 0.0
        self.student_nll = self.teacher_nll = 0.0

    def add_distributions(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> None:
        """Adds n positions: logits [n, V] of both models and the next tokens [n]."""
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
    """Runs prompts and responses, padded on the right, through the model.

    Returns each layer's hidden states at the response tokens, [n, d], and the logits [n, V] that
    predict these tokens. Rows are ordered by sequence, then position.
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

    # Saves memory: logits start at the first column that predicts a response token of any row. The
    # last column predicts none.
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
    # hidden_states[0] is the embedding.
    hidden = [output.hidden_states[layer + 1][holds_response] for layer in layers]
    # Column j of the logits predicts column first + 1 + j.
    return hidden, output.logits[holds_response[:, first + 1 :]]


def _greedy(
    model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, ends: set[int]
) -> list[list[int]]:
    """Greedy decoding; finished rows continue until all rows are finished."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    attended = torch.zeros(len(prompts), width + max_new_tokens, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        # To the end: the columns of generated tokens, too.
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
    """Batches of indices with similar lengths, to save padding."""
    by_length = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for start in range(0, len(by_length), batch_size):
        yield by_length[start : start + batch_size]


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def _total(values: Tensor) -> float:
    # fp64: sums run over many positions.
    return values.sum(dtype=torch.float64).item()
