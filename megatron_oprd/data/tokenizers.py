"""Hugging Face tokenizers: loading, end-of-sequence tokens, and the comparison of two."""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_oprd.errors import UserError

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_MORE_TOKENIZER_FILES = (
    "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja",
    "chat_template.json", "generation_config.json",
)  # fmt: skip


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a Hugging Face folder from local files, or raises a UserError."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        found = "has no tokenizer" if folder.is_dir() else "is not a folder"
        raise UserError(
            f"{folder} {found}; give a Hugging Face model folder that has one of "
            f"{', '.join(_TOKENIZER_FILES)}"
        )
    # AutoTokenizer rebuilds some families' tokenizers (Qwen2's, Phi-3's) from the vocabulary alone,
    # and splits text differently if the tokenizer.json is not the family's. So a tokenizer.json is
    # taken as is.
    from_file = (folder / "tokenizer.json").is_file()
    loader = PreTrainedTokenizerFast if from_file else AutoTokenizer
    try:
        return loader.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise UserError(f"cannot read the tokenizer of {folder}: {error}") from error


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that determine tokens, chat template and the end of a response."""
    return sorted(
        path
        for path in [
            *(folder / name for name in (*_TOKENIZER_FILES, *_MORE_TOKENIZER_FILES)),
            *folder.glob("additional_chat_templates/*"),
        ]
        if path.is_file()
    )


def check_same_tokenizer(
    student_folder: Path, teacher_folder: Path, *, otherwise: str = ""
) -> None:
    """Checks that token ids mean the same text to student and teacher.

    The vocabularies, the added tokens and which of them are special must be equal. The chat
    template may differ, because both models read the student's. So may the end-of-sequence token,
    which only determines where rollouts stop: base and instruct models of a family differ in it.
    That difference is logged. ``otherwise`` is added to the error, as advice.

    Raises:
        UserError: The tokenizers differ; the message names the first difference.
    """
    student, teacher = load_tokenizer(student_folder), load_tokenizer(teacher_folder)
    difference = _first_difference(student, teacher)
    if difference is not None:
        raise UserError(
            f"the tokenizers of the student ({student_folder}) and the teacher ({teacher_folder}) "
            f"differ: {difference}{otherwise}"
        )
    if student.eos_token_id != teacher.eos_token_id:
        logger.warning(
            "the student's end-of-sequence token is %r, the teacher's %r: rollouts stop at the "
            "student's",
            student.eos_token,
            teacher.eos_token,
        )


def eos_token_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end a response, sorted.

    As in transformers, they are those of generation_config.json, or else of config.json, and the
    tokenizer's own. Raises a UserError if there is none, a file cannot be read, or an id is not one
    of the model's.
    """
    config = _read_json(folder / "config.json")
    configured, file = None, folder / "generation_config.json"
    for name, content in ((file.name, _read_json(file)), ("config.json", config)):
        if (configured := content.get("eos_token_id")) is not None:
            file = folder / name
            break
    ids = configured if isinstance(configured, list) else [configured]
    found = {i for i in [*ids, tokenizer.eos_token_id] if i is not None}
    if not found:
        raise UserError(
            f"{folder} names no end-of-sequence token; set eos_token in tokenizer_config.json or "
            "eos_token_id in generation_config.json"
        )
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in found):
        raise UserError(
            f"eos_token_id in {file} is {configured!r}; it must be a token id or a list of them"
        )
    size = config.get("vocab_size")
    if not isinstance(size, int):
        size = max(tokenizer.get_vocab().values()) + 1
    if wrong := sorted(i for i in found if not 0 <= i < size):
        raise UserError(
            f"eos_token_id in {file} is {configured!r} (the tokenizer's own is "
            f"{tokenizer.eos_token_id}), but {wrong[0]} is not a token of the model, which has "
            f"ids 0 to {size - 1}; correct it"
        )
    return tuple(sorted(found))


def _read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file, {} without a file; raises a UserError for anything else."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {file}: {error}; it must be a JSON object") from error
    if not isinstance(content, dict):
        raise UserError(f"cannot read {file}: it must be a JSON object")
    return content


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's padding token, or else its end-of-sequence token, or a UserError."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise UserError(
        f"the tokenizer of {tokenizer.name_or_path} has neither a padding nor an end-of-sequence "
        "token; set pad_token in tokenizer_config.json"
    )


def _first_difference(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> str | None:
    """The lowest token id at which the two differ, described, or None."""
    student_tokens = {i: token for token, i in student.get_vocab().items()}
    teacher_tokens = {i: token for token, i in teacher.get_vocab().items()}
    for i in sorted(student_tokens.keys() | teacher_tokens.keys()):
        ours, theirs = student_tokens.get(i), teacher_tokens.get(i)
        if ours != theirs:
            sizes = f"{len(student_tokens)} and {len(teacher_tokens)} tokens in all"
            return (
                f"token id {i} is {ours!r} for the student and {theirs!r} for the teacher ({sizes})"
            )
    student_added, teacher_added = student.added_tokens_decoder, teacher.added_tokens_decoder
    for i in sorted(student_added.keys() | teacher_added.keys()):
        ours, theirs = (
            "not an added token"
            if i not in added
            else ("a special token" if added[i].special else "an added token")
            for added in (student_added, teacher_added)
        )
        if ours != theirs:
            return (
                f"token id {i} ({student_tokens[i]!r}) is {ours} for the student and {theirs} for "
                "the teacher"
            )
    return None
