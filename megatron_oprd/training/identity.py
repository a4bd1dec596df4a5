"""What makes a resumed run the same run: its name, its day, its schedule, and what it reads.

Settings name files; a file can be moved, which changes nothing, or rewritten in place, which
changes the run. So checkpoints keep digests of the contents.
"""

import dataclasses
import datetime
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import xxhash

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.data.tokenizers import tokenizer_files
from megatron_oprd.training.plan import RunPlan
from megatron_oprd.weights.checksum import sampled_checksum
from megatron_oprd.weights.source import WeightSource


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What a run keeps from its first start to its last resume.

    Attributes:
        name: A random name, which its checkpoints and its exported student carry.
        day: The day of its first start, ISO 8601; chat templates that write a date get this one.
        lr_decay_iters: The length of its learning-rate schedule.
        contents: Digests of what it reads, by what it is (see `contents_of`).
    """

    name: str
    day: str
    lr_decay_iters: int
    contents: dict[str, str]

    @classmethod
    def new(cls, plan: RunPlan) -> Self:
        """That of a run that starts now; its contents are not known yet."""
        return cls(
            name=uuid.uuid4().hex,
            day=datetime.date.today().isoformat(),
            lr_decay_iters=plan.config.decay_iters,
            contents={},
        )

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any]) -> Self:
        """That of the run that wrote a checkpoint's manifest."""
        return cls(**manifest["run"])

    def as_json(self) -> dict[str, Any]:
        """What `of_manifest` reads."""
        return dataclasses.asdict(self)

    @property
    def date(self) -> datetime.date:
        """The day of the first start."""
        return datetime.date.fromisoformat(self.day)


def contents_of(plan: RunPlan, prompts: Sequence[Prompt]) -> dict[str, str]:
    """Digests of what a run reads, by what a message can call it.

    Of weights these are the files' sizes and samples of their bytes, not all of them.

    Args:
        plan: The run.
        prompts: Its prompts, tokenized.
    """
    contents = {
        "the prompts (data.prompts, rendered and tokenized)": _digest(_prompt_bytes(prompts)),
        **_of_model("model.student", plan.student_checkpoint),
    }
    for number, teacher in enumerate(plan.teachers):
        setting, bridge = "model.teacher", "bridge.path"
        if number:
            setting, bridge = (f"extra_teachers[{number - 1}].{x}" for x in ("model", "bridge"))
        contents |= _of_model(setting, teacher.checkpoint)
        if (path := teacher.layout.config.bridge.path) is not None:
            contents[f"the bridge ({bridge})"] = _files_digest(_files_below(Path(path)))
    return contents


def _of_model(setting: str, checkpoint: WeightSource) -> dict[str, str]:
    return {
        f"the tokenizer or its chat template ({setting})": _digest(
            content
            for file in tokenizer_files(checkpoint.hf_folder)
            for content in (file.name.encode(), file.read_bytes())
        ),
        # config.json is compared field by field, as the architecture.
        f"the weights ({setting})": _files_digest(
            file for file in checkpoint.files() if file.suffix != ".json"
        ),
    }


def _prompt_bytes(prompts: Sequence[Prompt]) -> Iterable[bytes]:
    for prompt in prompts:
        yield repr((prompt.index, prompt.token_ids, prompt.teacher_ids)).encode()


def _files_below(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _files_digest(files: Iterable[Path]) -> str:
    return _digest(
        content
        for file in sorted(files)
        for content in (file.name.encode(), sampled_checksum(file).encode())
    )


def _digest(parts: Iterable[bytes]) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
