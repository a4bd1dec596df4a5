"""Makes the two pairs: one student, and two teachers.

python examples/reproduce_small/pretrain.py --out runs/reproduce_small/models [--task chains]

The student is a checkpoint of a pretraining from scratch. The teacher ``early`` is the end of that
pretraining, and the teacher ``rl`` is made from the student by reinforcement learning. The task
``chains`` has no teacher ``rl``.

It writes ``student``, ``early`` and ``rl`` (Hugging Face folders with tokenizer), ``train.jsonl``,
``validation.jsonl`` and ``test.jsonl`` (problems that no part shares) and ``pretrain.json``.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from reinforce import Reinforcement, reinforce
from task import TASKS, Problem, Split, accuracy, make_split, make_tokenizer, write_problems
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_oprd.errors import UserError, run_entry_point

MODELS_RECORD = "pretrain.json"
_IGNORED = -100  # what cross_entropy leaves out


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the models are made.

    Attributes:
        task: One of `task.TASKS`.
        layers: Layers of all models.
        hidden_size: Their width; the feed-forward width is three times that.
        heads: Attention heads.
        steps: Optimizer steps of pretraining.
        batch_size: Problems in a step.
        lr: Peak learning rate; warm-up over 5% of the steps, then cosine down to a tenth.
        interval: Steps between evaluations.
        student_accuracy: The student is the first checkpoint, of those at an evaluation, that
            solves at least this share of the validation problems.
        num_train: Problems to learn from.
        num_validation: Problems that choose.
        num_test: Problems that are reported.
        seed: Seed of weights and of the order of problems.
        rl: How the teacher ``rl`` is made; None: there is none.
    """

    task: str = "sums"
    layers: int = 3
    hidden_size: int = 64
    heads: int = 4
    steps: int = 1500
    batch_size: int = 128
    lr: float = 2e-3
    interval: int = 25
    student_accuracy: float = 0.35
    num_train: int = 100_000
    num_validation: int = 1000
    num_test: int = 4000
    seed: int = 0
    rl: Reinforcement | None = field(default_factory=Reinforcement)


CHAINS = Settings(
    task="chains",
    steps=600,
    batch_size=32,
    lr=3e-3,
    interval=20,
    num_train=20_000,
    num_validation=200,
    num_test=1000,
    rl=None,
)

# Learns nothing worth measuring; it is for the tests.
SMALL = Settings(
    layers=2,
    hidden_size=32,
    heads=2,
    steps=20,
    batch_size=32,
    interval=10,
    student_accuracy=0.0,
    num_train=1000,
    num_validation=16,
    num_test=16,
    rl=Reinforcement(steps=2, interval=1),
)


def main() -> int:
    """Parses the command line, trains and writes everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the models")
    parser.add_argument("--task", choices=list(TASKS), default="sums", help="see task.py")
    parser.add_argument("--small", action="store_true", help="seconds, for the tests")
    arguments = parser.parse_args()
    settings = {"sums": Settings(), "chains": CHAINS}[arguments.task]
    if arguments.small:
        settings = replace(SMALL, task=settings.task, rl=settings.rl and SMALL.rl)
    pretrain(arguments.out, settings)
    return 0


def pretrain(out: Path, settings: Settings) -> None:
    """Writes the models, the problems and ``pretrain.json``.

    Raises:
        UserError: No checkpoint before the last one is good enough for a student.
    """
    split = make_split(
        settings.task,
        num_train=settings.num_train,
        num_validation=settings.num_validation,
        num_test=settings.num_test,
    )
    for name, problems in vars(split).items():
        write_problems(out / f"{name}.jsonl", problems)
    tokenizer = make_tokenizer()
    started, curve, student = time.perf_counter(), [], None
    for reached in from_scratch(settings, split, tokenizer):
        model = reached.model
        curve.append({name: getattr(reached, name) for name in ("step", "loss", "accuracy")})
        if student is None and reached.accuracy >= settings.student_accuracy:
            student = reached.step
            save(model, tokenizer, out / "student")
    if student in (None, settings.steps):
        raise UserError(
            f"no checkpoint before step {settings.steps} solved {settings.student_accuracy:.0%} of "
            "the validation problems; give the pretraining more steps"
        )
    save(model, tokenizer, out / "early")
    rl_curve = []
    if settings.rl is not None:
        model = LlamaForCausalLM.from_pretrained(out / "student", local_files_only=True)
        rl_curve = reinforce(model, tokenizer, split, settings.rl)
        save(model, tokenizer, out / "rl")
    record = {
        "settings": asdict(settings),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "student_step": student,
        "curve": curve,
        "rl_curve": rl_curve,
        "seconds": time.perf_counter() - started,
    }
    (out / MODELS_RECORD).write_text(json.dumps(record, indent=2) + "\n")
    print(f"student after {student} steps of {settings.steps}, and its teachers: {out}")


@dataclass(frozen=True, kw_only=True)
class Reached:
    """A model at an evaluation of its pretraining.

    Attributes:
        step: Steps done.
        loss: Of the last one.
        accuracy: Share of the validation problems that are solved.
        model: The model, which is trained further when the next one is asked for.
    """

    step: int
    loss: float
    accuracy: float
    model: LlamaForCausalLM


def from_scratch(
    settings: Settings, split: Split, tokenizer: PreTrainedTokenizerFast
) -> Iterator[Reached]:
    """Trains a model from scratch, and yields it at each evaluation and at the end."""
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(model_config(settings, tokenizer))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    inputs, targets = _encode(split.train, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _lr_factor(step, settings.steps)
    )
    order: list[Tensor] = []
    for step in range(1, settings.steps + 1):
        if not order:
            order = list(torch.randperm(len(inputs)).split(settings.batch_size))
        batch = order.pop()
        logits = model(input_ids=inputs[batch]).logits
        loss = F.cross_entropy(
            logits.flatten(0, 1), targets[batch].flatten(), ignore_index=_IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % settings.interval and step != settings.steps:
            continue
        solved = accuracy(model, tokenizer, split.validation)
        print(f"step {step}  loss {loss.item():.3f}  accuracy {solved:.3f}", flush=True)
        yield Reached(step=step, loss=loss.item(), accuracy=solved, model=model)


def model_config(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The models' shape."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _encode(problems: list[Problem], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Token ids [n, s] and next tokens [n, s], which count behind the prompt only."""
    rows = tokenizer(
        [p.prompt + p.response + tokenizer.eos_token for p in problems],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    ).input_ids
    targets = rows[:, 1:].clone()
    targets[targets == tokenizer.pad_token_id] = _IGNORED
    targets[:, : len(problems[0].prompt) - 1] = _IGNORED
    return rows[:, :-1], targets


def _lr_factor(step: int, steps: int) -> float:
    """Warm-up over 5% of the steps, then cosine from 1 to 0.1."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a Hugging Face folder with the tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    run_entry_point(main)
