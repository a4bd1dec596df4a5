"""The tasks: sums, working first, answer behind "=".

``sums``: ``123+456:`` is a prompt and ``975=579`` its right response: the sum's digits from the
last to the first, in the order in which carries arise, then the sum.

``chains``: a prompt ends with two digits, as in ``1234+5+6``, and its response has 52 sums of one
digit, each the last digit of the sum of the two before it: ``=1b7c8...Z7`` (5+6, 6+1, 1+7 ...).
The letters count them. With the end these are 105 tokens, and all of them are the answer. There
are only 100 chains: what is new in the problems of the test stands in front of the two digits.
"""

import json
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"
_OPERANDS = range(100, 1000)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem.

    Attributes:
        prompt: What the model reads.
        response: The response that the teacher learns.
    """

    prompt: str
    response: str

    @property
    def answer(self) -> str:
        """What has to stand behind the last "="."""
        return self.response.rpartition("=")[2]


def addition(left: int, right: int) -> Problem:
    """A problem of ``sums``."""
    answer = str(left + right)
    return Problem(prompt=f"{left}+{right}:", response=f"{answer[::-1]}={answer}")


def chain(left: int, right: int) -> Problem:
    """A problem of ``chains``."""
    digits, response = [right // 10 % 10, right % 10], ""
    for sign in "=" + string.ascii_letters[1:]:
        digits.append(sum(digits[-2:]) % 10)
        response += f"{sign}{digits[-1]}"
    return Problem(
        prompt=f"{left}{right // 100}+{right // 10 % 10}+{right % 10}", response=response
    )


TASKS = {"sums": addition, "chains": chain}


def max_new_tokens(problems: Sequence[Problem]) -> int:
    """Tokens of the longest right response: its characters and the end."""
    return 1 + max(len(problem.response) for problem in problems)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Problems that are drawn once, without repetition; no two parts share a problem.

    Attributes:
        train: What the teachers learn from, and the prompts of distillation.
        validation: Chooses the student, the end of RL and learning rates.
        test: What is reported.
    """

    train: list[Problem]
    validation: list[Problem]
    test: list[Problem]


def make_split(
    task: str, *, num_train: int, num_validation: int, num_test: int, seed: int = 0
) -> Split:
    """Draws problems of a task."""
    generator = torch.Generator().manual_seed(seed)
    side, num_held_out = len(_OPERANDS), num_validation + num_test
    drawn = torch.randperm(side * side, generator=generator)[: num_train + num_held_out]
    problems = [TASKS[task](_OPERANDS[i // side], _OPERANDS[i % side]) for i in drawn.tolist()]
    return Split(
        validation=problems[:num_validation],
        test=problems[num_validation:num_held_out],
        train=problems[num_held_out:],
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each printable ASCII character, <pad> and <eos>: 97 tokens.

    Sums use 14 of them. A vocabulary of only those would make top-16 the full vocabulary.
    """
    characters = string.digits + string.ascii_letters + string.punctuation + " "
    vocab = {token: i for i, token in enumerate([PAD, EOS, *characters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def is_correct(response: str, answer: str) -> bool:
    """Whether exactly the answer stands behind the last "=" of a response without special tokens.

    The working in front of it does not count.
    """
    _, equals, found = response.rpartition("=")
    return bool(equals) and found == answer


def encode_prompts(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Token ids [n, s]; every prompt has the same number of tokens, so nothing is padded."""
    return torch.tensor(tokenizer([problem.prompt for problem in problems]).input_ids)


@torch.no_grad()
def respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Tensor,
    *,
    max_new_tokens: int,
    do_sample: bool,
    batch_size: int = 1000,
) -> Tensor:
    """Responses [n, max_new_tokens], padded behind their end.

    They are the most likely tokens, or samples at temperature 1 from torch's global generator.
    """
    was_training = model.training
    model.eval()
    responses = torch.full((len(prompts), max_new_tokens), tokenizer.pad_token_id)
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        generated = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            # transformers would otherwise sample from the 50 most likely tokens only.
            top_k=0 if do_sample else None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )[:, prompts.shape[1] :]
        responses[first : first + len(batch), : generated.shape[1]] = generated
    model.train(was_training)
    return responses


def solved(
    responses: Tensor, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]
) -> Tensor:
    """Whether each response is right, 1 or 0: [n]."""
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    right = [is_correct(text, p.answer) for text, p in zip(texts, problems, strict=True)]
    return torch.tensor(right, dtype=torch.float32)


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]
) -> float:
    """Share of problems that a model solves with its most likely tokens."""
    prompts = encode_prompts(problems, tokenizer)
    responses = respond(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens(problems), do_sample=False
    )
    return solved(responses, tokenizer, problems).mean().item()


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """Writes problems as the prompt file, or the benchmark, of a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {**asdict(problem), "reward_model": {"ground_truth": problem.answer}}
        for problem in problems
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_problems(path: Path) -> list[Problem]:
    """Reads what `write_problems` wrote."""
    rows = map(json.loads, path.read_text().splitlines())
    return [Problem(prompt=row["prompt"], response=row["response"]) for row in rows]
