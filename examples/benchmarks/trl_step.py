"""TRL's DistillationTrainer on the demo's prompts, for `step.py`; in an environment with TRL 1.16.

Nothing of the project is imported here.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

ROOT = Path(__file__).parents[2]


class Clock(TrainerCallback):
    """The seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        """Stops it."""
        self.seconds.append(time.perf_counter() - self._start)


def main() -> None:
    """Trains, saves the student, and writes what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    lines = (ROOT / "examples/data/math_train.jsonl").read_text().splitlines()
    clock = Clock()
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (args.student, args.teacher)
    )
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
        callbacks=[clock],
        # As examples/demo.yaml has it.
        args=DistillationConfig(
            output_dir=str(args.out),
            beta=1.0,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            gradient_checkpointing=False,
            max_completion_length=48,
            temperature=1.0,
            learning_rate=3e-4,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr": 3e-5},
            warmup_steps=round(0.2 * args.steps),
            weight_decay=0.0,
            max_grad_norm=1.0,
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            seed=1,
        ),
    )
    trainer.train()
    trainer.save_model(str(args.out / "student"))
    tokenizer.save_pretrained(args.out / "student")
    seconds = clock.seconds[1:]  # the first step warms up
    # Of the last record, the number of tokens in all steps.
    tokens = next(
        (one["num_tokens"] for one in reversed(trainer.state.log_history) if "num_tokens" in one), 0
    )
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated() / 1e9
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    measured = {
        "seconds": sum(seconds) / len(seconds),
        "tokens_per_second": tokens / sum(clock.seconds),
        "memory_gb": memory,
    }
    (args.out / "measured.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
