"""Bridges from SmolLM2-135M to narrower and shallower students, with its tokenizer and with others.

    python examples/bridge_real/run.py --teacher .cache/smollm2/SmolLM2-135M-Instruct \
        --out runs/bridge_real

Each student is made of the teacher's own weights, trained for a short while on the teacher's
answers, and then distilled through a bridge. README.md beside this file says what came out.
"""

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from results import Outcome, cosines, outcome_table, write_results
from slim import Sizes, slim
from stages import Budget, evaluate, run_bridge, train
from texts import Answer, answers, encode, heal, nats_per_character, read_prompts
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerBase
from vocabularies import byte_level, sentence_piece, with_vocabulary

from checkpoint_tools.prune_depth import evenly_spaced_layers, prune_depth
from megatron_oprd.console import make_console
from megatron_oprd.data.tokenizers import load_tokenizer
from megatron_oprd.weights.hf_files import HFCheckpoint

_DATA = Path(__file__).parents[1] / "data"
_TOKENIZERS: dict[str, Callable[[list[str], int, Path], PreTrainedTokenizerBase]] = {
    "byte_level": byte_level,
    "sentence_piece": sentence_piece,
}
_STANDS_STILL = 1e-12  # a learning rate that changes no fp32 weight to speak of
_FULL = Budget(
    layers=8, sizes=Sizes(hidden_size=384, key_value_heads=2, intermediate_size=768),
    num_prompts=64, max_new_tokens=24, answers=1, vocab_size=2000,
    heal_steps=40, heal_batch=8, heal_lr=1e-3,
    bridge_prompts=32, ranks=(1, 4, 16, 64), rank=16,
    steps=24, prompts_per_step=8, lr=1e-4,
)  # fmt: skip
_SMALL = Budget(
    layers=2, sizes=Sizes(hidden_size=16, key_value_heads=1, intermediate_size=32),
    num_prompts=8, max_new_tokens=8, answers=1, vocab_size=400,
    heal_steps=2, heal_batch=4, heal_lr=1e-3,
    bridge_prompts=8, ranks=(1, 4), rank=4,
    steps=2, prompts_per_step=4, lr=1e-3,
)  # fmt: skip


def main() -> None:
    """Makes the students, bridges them to the teacher, trains them and prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, required=True, help="SmolLM2-135M's folder")
    parser.add_argument("--out", type=Path, required=True, help="is replaced")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--kinds", nargs="+", choices=("same", *_TOKENIZERS), default=["same", *_TOKENIZERS],
        help="the students' tokenizers: the teacher's, or one that is trained here",
    )  # fmt: skip
    parser.add_argument("--small", action="store_true", help="two steps of everything, for a test")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    budget = _SMALL if args.small else _FULL
    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - start:5.0f} s] {line}", flush=True)

    is_other = args.out.is_dir() and any(args.out.iterdir())
    if is_other and not (args.out / "results.json").exists():
        parser.error(f"--out {args.out} is not empty, and has no results.json of an earlier run")
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    torch.manual_seed(args.seed)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(args.teacher)
    prompts = read_prompts(_DATA / "math_train.jsonl")[: budget.num_prompts]
    texts = answers(
        teacher, tokenizer, prompts, max_new_tokens=budget.max_new_tokens, sampled=budget.answers
    )
    held_out = answers(
        teacher, tokenizer, read_prompts(_DATA / "math_heldout.jsonl"),
        max_new_tokens=budget.max_new_tokens,
    )  # fmt: skip
    say(f"the teacher wrote {len(texts)} answers to train on and {len(held_out)} to measure on")

    shallow = args.out / "shallow"
    keep = evenly_spaced_layers(teacher.config.num_hidden_layers, budget.layers)
    prune_depth(args.teacher, shallow, keep, force=True)
    teachers = nats_per_character(teacher, tokenizer, held_out)
    outcomes: list[Outcome] = []
    for kind in args.kinds:
        began = time.perf_counter()
        student = _slimmed(shallow, tokenizer, texts, budget)
        folder = args.out / kind
        own = _give_tokenizer(student, kind, tokenizer, texts, budget, shallow, folder / "start")
        student.save_pretrained(folder / "start")
        nats = {"start": nats_per_character(student, own, held_out)}
        say(f"{kind}: {student.num_parameters():,} parameters, {len(own)} tokens; brief training")
        heal(
            student, own, texts, steps=budget.heal_steps, batch_size=budget.heal_batch,
            lr=budget.heal_lr, seed=args.seed, say=say,
        )  # fmt: skip
        shutil.copytree(folder / "start", folder / "before")
        student.save_pretrained(folder / "before")
        nats["before"] = nats_per_character(student, own, held_out)
        say(f"{kind}: bridge")
        bridge = run_bridge(folder, args.teacher, budget, seed=args.seed, own=kind != "same")
        say(f"{kind}: training through the bridge")
        records = train(folder, args.teacher, budget, seed=args.seed, own=kind != "same")
        say(f"{kind}: the same steps, of no length")
        still = train(
            folder, args.teacher, budget, seed=args.seed, own=kind != "same",
            name="control", lr=_STANDS_STILL,
        )  # fmt: skip
        trained = AutoModelForCausalLM.from_pretrained(folder / "run" / "student")
        nats["after"] = nats_per_character(trained.float().eval(), own, held_out)
        measures = None
        if kind == "same":
            say(f"{kind}: evaluation against the teacher")
            measures = evaluate(folder, args.teacher, budget.max_new_tokens)
        outcomes.append(
            Outcome(
                kind=kind,
                parameters=student.num_parameters(),
                vocabulary=len(own),
                bridge_cosine=cosines(bridge),
                loss=[record["loss"] for record in records],
                cosine=[record["cosine"] for record in records],
                control_cosine=[record["cosine"] for record in still],
                paired_share=[record.get("paired_share") for record in records],
                nats_per_character=nats,
                against_teacher=measures,
                seconds=time.perf_counter() - began,
            )
        )
        # After each student, so that an interrupted run leaves what it has.
        write_results(
            args.out / "results.json", outcomes, budget, seed=args.seed, teachers=teachers
        )
    make_console().print(outcome_table(outcomes, budget, teachers))
    say(f"the numbers: {args.out}/results.json")


def _slimmed(
    shallow: Path, tokenizer: PreTrainedTokenizerBase, texts: list[Answer], budget: Budget
) -> LlamaForCausalLM:
    """The shallower model, narrower; use is measured on 16 of the teacher's answers."""
    model = AutoModelForCausalLM.from_pretrained(shallow, dtype=torch.float32).eval()
    read = [[*prompt, *answer] for prompt, answer in (encode(t, tokenizer) for t in texts[:16])]
    return slim(model, read, budget.sizes)


def _give_tokenizer(
    student: LlamaForCausalLM,
    kind: str,
    old: PreTrainedTokenizerBase,
    texts: list[Answer],
    budget: Budget,
    shallow: Path,
    folder: Path,
) -> PreTrainedTokenizerBase:
    """Writes the student's tokenizer to ``folder``; a trained one changes its embeddings, too."""
    folder.mkdir(parents=True)
    if kind == "same":
        for file in HFCheckpoint(shallow).companion_files():
            shutil.copy(file, folder / file.name)
        return load_tokenizer(folder)
    read = [message["content"] for text in texts for message in text.messages]
    read += [text.text for text in texts]
    new = _TOKENIZERS[kind](read, budget.vocab_size, folder)
    with_vocabulary(student, old, new)
    return new


if __name__ == "__main__":
    main()
