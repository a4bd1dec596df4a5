"""A whole training step by method, and beside TRL: seconds by phase, memory, and what it learns.

    python examples/benchmarks/step.py --student .demo/student \
        --teacher .cache/smollm2/SmolLM2-135M-Instruct
    python examples/benchmarks/step.py ... --trl /venv-with-trl/bin/python

Each method is a run of `megatron_oprd.train` in a process of its own, on one rank, from the same
student, with the demo's prompts, lengths and learning rate. TRL's DistillationTrainer
(`trl_step.py`) takes the same; it needs an environment of its own, whose Python ``--trl`` names.
Then all students are compared with the teacher on held-out prompts. ``make demo`` has made the
folders above.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NO_STATES = ["taps.layers=none", "loss.coefficient=1"]
# Name -> settings; the demo's are those of its file.
METHODS = {
    "OPRD": ["output_loss.kind=none"],
    "OPRD, last 16 tokens": [
        "output_loss.kind=none",
        "taps.positions=last_k",
        "taps.k=16",
    ],
    # The next step's rollouts too are generated at once, with this step's weights.
    "OPRD, rollouts up to 1 update old": ["output_loss.kind=none", "rollout.max_staleness=1"],
    "OPRD and reverse KL (the demo)": [],
    "top-16": ["output_loss.kind=top_k", "output_loss.k=16", *NO_STATES],
    "reverse KL": [*NO_STATES],
}
TRL = "TRL, reverse KL"
PHASES = ("rollout", "teacher", "student", "optimizer", "weight_sync")


def main() -> None:
    """Runs all methods and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl", type=Path, metavar="PYTHON", help="of an environment with TRL")
    parser.add_argument("--method", action="append", choices=[*METHODS, TRL], help="only these")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/step"), help="keeps earlier methods' results"
    )
    parser.add_argument(
        "overrides", nargs="*", help="settings of all runs, as in rollout.engine=vllm"
    )
    args = parser.parse_intermixed_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "steps.json"
    found = json.loads(results.read_text()) if results.exists() else {}
    for name in args.method or [*METHODS, TRL]:
        if name == TRL and args.trl is None:
            print(f"{TRL}: left out, --trl is not given", file=sys.stderr)
            continue
        print(name, file=sys.stderr, flush=True)
        found[name] = of_trl(args) if name == TRL else of_method(name, args)
        # At once, so that a method that fails loses nothing of the others.
        results.write_text(json.dumps(found, indent=1))
    quality = evaluate({name: one["exported"] for name, one in found.items()}, args)
    (args.out / "quality.json").write_text(json.dumps(quality, indent=1))
    print_table(found, quality)


def of_method(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains with a method; the means over all steps but the first, which warms up."""
    folder = args.out / name.replace(" ", "_").replace(",", "")
    start = time.perf_counter()
    run(
        args,
        [
            *(sys.executable, "-m", "megatron_oprd.train", "--config", "examples/demo.yaml"),
            f"output_dir={folder.absolute()}",
            f"model.student={args.student.absolute()}",
            f"model.teacher={args.teacher.absolute()}",
            f"train_iters={args.steps}",
            "parallel.pipeline_model_parallel_size=1",
            *METHODS[name],
            *args.overrides,
        ],
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines][1:]
    return {
        "seconds": statistics.mean(one["seconds_step"] for one in steps),
        **{phase: statistics.mean(one[f"seconds_{phase}"] for one in steps) for phase in PHASES},
        "tokens_per_second": sum(one["num_tokens"] for one in steps)
        / sum(one["seconds_step"] for one in steps),
        "memory_gb": max(one["peak_memory_gb"] for one in steps),
        "whole_run": time.perf_counter() - start,
        "exported": str(folder / "student"),
    }


def of_trl(args: argparse.Namespace) -> dict[str, Any]:
    """The same of TRL, without phases."""
    folder = args.out / "trl"
    start = time.perf_counter()
    run(
        args,
        [
            *(str(args.trl), str(HERE / "trl_step.py")),
            *("--student", str(args.student.absolute()), "--teacher", str(args.teacher.absolute())),
            *("--steps", str(args.steps), "--out", str(folder.absolute())),
        ],
    )
    measured = json.loads((folder / "measured.json").read_text())
    whole_run = time.perf_counter() - start
    return {**measured, "whole_run": whole_run, "exported": str(folder / "student")}


def evaluate(students: dict[str, str], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Agreement and KL of each student, and of the one before, on held-out prompts."""
    names = {f"m{number}": name for number, name in enumerate(students)}
    output = args.out / "evaluation.json"
    run(
        args,
        [
            *(sys.executable, "-m", "megatron_oprd.evaluate", "--teacher", str(args.teacher)),
            *("--student", f"before={args.student}"),
            *(
                word
                for key, name in names.items()
                for word in ("--student", f"{key}={students[name]}")
            ),
            *("--prompts", "examples/data/math_heldout.jsonl", "--max-new-tokens", "48"),
            *("--output", str(output)),
        ],
    )
    found = {one["name"]: one["measures"] for one in json.loads(output.read_text())["students"]}
    return {names.get(key, key): measures for key, measures in found.items()}


def run(args: argparse.Namespace, command: list[str]) -> None:
    """Runs a command from the project's root, with its output in a log."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(ROOT)}
    log = args.out / "log.txt"
    with log.open("a") as output:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, check=False
        )
    if done.returncode:
        tail = "\n".join(log.read_text().splitlines()[-20:])
        sys.exit(f"{' '.join(command)}\nended with exit code {done.returncode}:\n{tail}")


def print_table(found: dict[str, Any], quality: dict[str, Any]) -> None:
    """Prints a Markdown table."""
    columns = [
        "method",
        "s a step",
        *PHASES,
        "tokens/s",
        "GB",
        "whole run, s",
        "top-1",
        "reverse KL",
    ]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for name, one in {"before": {}, **found}.items():
        cells = [
            name,
            *(f"{one[key]:.2f}" if key in one else "" for key in ("seconds", *PHASES)),
            f"{one['tokens_per_second']:.1f}" if one else "",
            f"{one['memory_gb']:.2f}" if one else "",
            f"{one['whole_run']:.0f}" if one else "",
            f"{quality[name]['top1_agreement']:.1%}",
            f"{quality[name]['reverse_kl']:.3f}",
        ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
