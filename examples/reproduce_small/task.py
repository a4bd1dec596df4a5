"""The task: add two three-digit numbers, working first, answer behind "=".

``123+456:`` is a prompt and ``975=579`` its right response: the sum's digits from the last to the
first, in the order in which carries arise, then the sum.
"""

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"
MAX_NEW_TOKENS = 10  # four digits, "=", four digits, the end
_OPERANDS = range(100, 1000)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One addition.

    Attributes:
        left: The first number.
        right: The second one.
    """

    left: int
    right: int

    @property
    def prompt(self) -> str:
        """What the model reads."""
        return f"{self.left}+{self.right}:"

    @property
    def answer(self) -> str:
        """What has to stand behind "="."""
        return str(self.left + self.right)

    @property
    def response(self) -> str:
        """The response that the teacher learns."""
        return f"{self.answer[::-1]}={self.answer}"


@dataclass(frozen=True, kw_only=True)
class Split:
    """Problems that are drawn once, without repetition; no two parts share a problem.

    Attributes:
        train: What the teacher learns from, and the prompts of distillation.
        validation: Chooses learning rates.
        test: What is reported.
    """

    train: list[Problem]
    validation: list[Problem]
    test: list[Problem]


def make_split(*, num_train: int, num_held_out: int, seed: int = 0) -> Split:
    """Draws problems; validation and test have ``num_held_out`` each."""
    generator = torch.Generator().manual_seed(seed)
    side = len(_OPERANDS)
    drawn = torch.randperm(side * side, generator=generator)[: num_train + 2 * num_held_out]
    problems = [
        Problem(left=_OPERANDS[i // side], right=_OPERANDS[i % side]) for i in drawn.tolist()
    ]
    return Split(
        validation=problems[:num_held_out],
        test=problems[num_held_out : 2 * num_held_out],
        train=problems[2 * num_held_out :],
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each printable ASCII character, <pad> and <eos>: 97 tokens.

    The task uses 14 of them. A vocabulary of only those would make top-16 the full vocabulary.
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


@torch.no_grad()
def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]
) -> float:
    """Share of problems that a model solves with its most likely tokens, one batch for all."""
    # Every prompt has the same number of tokens, so nothing is padded.
    prompts = torch.tensor([tokenizer(problem.prompt).input_ids for problem in problems])
    was_training = model.training
    model.eval()
    sequences = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.train(was_training)
    responses = tokenizer.batch_decode(sequences[:, prompts.shape[1] :], skip_special_tokens=True)
    solved = [
        is_correct(text, problem.answer) for text, problem in zip(responses, problems, strict=True)
    ]
    return sum(solved) / len(solved)


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """Writes problems as the prompt file, or the benchmark, of a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(
            json.dumps({"prompt": p.prompt, "reward_model": {"ground_truth": p.answer}}) + "\n"
            for p in problems
        )
    )


def read_problems(path: Path) -> list[Problem]:
    """Reads what `write_problems` wrote."""
    problems = []
    for line in path.read_text().splitlines():
        left, right = json.loads(line)["prompt"].rstrip(":").split("+")
        problems.append(Problem(left=int(left), right=int(right)))
    return problems
