"""Reads a Dockerfile: its stages, and what their instructions set for those that follow."""

import dataclasses
import json
import re
import shlex
from string import Template

# Others, such as ADD or VOLUME, are refused, since what they do would be missing without a word.
KNOWN = ["ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "LABEL", "RUN", "SHELL", "USER"]
KNOWN += ["WORKDIR"]


class Mistake(Exception):
    """In arguments or in a Dockerfile: what was found, and what would be right."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One instruction, its continued lines joined and comments left out."""

    line: int  # its first
    name: str
    text: str

    def words(self) -> list[str]:
        """Of the form that is a JSON list, as in ``CMD ["python"]``."""
        try:
            return [str(word) for word in json.loads(self.text)]
        except ValueError:
            raise Mistake(f"line {self.line}: {self.name} has to be a JSON list") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What stands below a FROM."""

    name: str
    base: str  # another stage, or an image
    steps: list[Step]


@dataclasses.dataclass(kw_only=True)
class State:
    """What the steps so far have set for those that follow."""

    environment: dict[str, str]
    arguments: dict[str, str] = dataclasses.field(default_factory=dict)
    folder: str = "/"
    user: str = "0"
    shell: list[str] = dataclasses.field(default_factory=lambda: ["/bin/sh", "-c"])
    entrypoint: list[str] = dataclasses.field(default_factory=list)
    command: list[str] = dataclasses.field(default_factory=list)

    def set(self, step: Step, given: dict[str, str]) -> None:
        """Follows a step that runs nothing; ``given`` are the build arguments."""
        match step.name:
            case "ARG":
                name, default = argument(step)
                self.arguments[name] = given.get(name, default)
            case "ENV":
                for word in shlex.split(self.expand(step)):
                    name, _, value = word.partition("=")
                    self.environment[name] = value
            case "WORKDIR":
                self.folder = self.expand(step)
            case "USER":
                self.user = self.expand(step)
                if not self.user.isdigit():
                    raise Mistake(f"line {step.line}: USER {self.user} has to be a number here")
            case "SHELL":
                self.shell = step.words()
            case "ENTRYPOINT":
                self.entrypoint = step.words()
            case "CMD":
                self.command = step.words()
            case _:
                raise AssertionError(f"{step.name} sets nothing")

    def expand(self, step: Step) -> str:
        """The step's text with its variables, which Docker puts in everywhere but in RUN."""
        return substitute(step, self.arguments | self.environment)


def argument(step: Step) -> tuple[str, str]:
    """Name and default of an ARG."""
    name, _, default = shlex.split(step.text)[0].partition("=")
    return name, default


def substitute(step: Step, values: dict[str, str]) -> str:
    """Replaces ``$NAME`` and ``${NAME}``."""
    try:
        return Template(step.text).substitute(values)
    except KeyError as error:
        raise Mistake(f"line {step.line}: no ARG or ENV above it sets {error.args[0]}") from None
    except ValueError:
        # As ${NAME:-default}.
        raise Mistake(f"line {step.line}: of variables only ${{NAME}} is known here") from None


def read(dockerfile: str) -> list[Step]:
    """All steps in order; refuses what is not known."""
    steps: list[Step] = []
    text, start = "", 0
    for number, line in enumerate(dockerfile.splitlines(), 1):
        # Docker drops comments between continued lines too.
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        start = start if text else number
        text += " " + line.strip()
        if text.endswith("\\"):
            text = text.removesuffix("\\").rstrip()
            continue
        name, _, rest = text.strip().partition(" ")
        steps.append(Step(line=start, name=name, text=rest.strip()))
        text = ""
    for step in steps:
        if step.name not in KNOWN:
            raise Mistake(f"line {step.line}: {step.name} is not known here, only {KNOWN}")
        if re.match(r"--\w|.*<<", step.text):
            raise Mistake(f"line {step.line}: options and here-documents are not known here")
    return steps


def split(steps: list[Step], given: dict[str, str]) -> list[Stage]:
    """The stages. Adds the arguments above the first FROM to ``given``, the build arguments."""
    declared = sorted({argument(step)[0] for step in steps if step.name == "ARG"})
    if unknown := sorted(set(given) - set(declared)):
        raise Mistake(f"--arg {unknown[0]}: the Dockerfile has {', '.join(declared)}")
    stages: list[Stage] = []
    for step in steps:
        if step.name == "FROM":
            base, _, name = substitute(step, given).partition(" AS ")
            stages.append(Stage(name=name, base=base, steps=[]))
        elif stages:
            stages[-1].steps.append(step)
        else:
            given.setdefault(*argument(step))
    return stages


def in_order(stages: list[Stage]) -> list[Stage]:
    """The stages of the images that can be built, as they can share one root.

    First what `docker build` makes, the last stage on those below it, then the others. A base that
    is not chosen is in none.
    """
    by_name = {stage.name: stage for stage in stages}
    ordered: list[Stage] = []
    for stage in reversed(stages):
        chain = [stage]
        while chain[0].base in by_name:
            chain.insert(0, by_name[chain[0].base])
        if stage.steps:
            ordered += [below for below in chain if below not in ordered]
    return ordered
