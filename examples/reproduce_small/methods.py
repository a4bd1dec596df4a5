"""The methods that are compared: what each one changes in the settings of a run."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method.

    Attributes:
        name: What the table calls it.
        key: Its name in paths and in JSON.
        settings: Settings of `megatron_oprd.train` by group. Where both losses are on,
            ``loss.coefficient`` is `runs.Budget.mu`.
        lr: Peak learning rate that the sweep chose (README.md).
    """

    name: str
    key: str
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    lr: float


_NO_TAPS = {"layers": "none"}
_ALL_TAPS = {"layers": "all"}

METHODS = (
    Method(name="OPRD-Vanilla", key="oprd", settings={"taps": _ALL_TAPS}, lr=1e-4),
    Method(
        name="OPD top-1",
        key="top1",
        settings={"taps": _NO_TAPS, "output_loss": {"kind": "sampled_token"}},
        lr=1e-4,
    ),
    Method(
        name="OPD top-16",
        key="top16",
        settings={"taps": _NO_TAPS, "output_loss": {"kind": "top_k", "k": 16}},
        lr=1e-4,
    ),
    Method(
        name="OPD full",
        key="full",
        settings={"taps": _NO_TAPS, "output_loss": {"kind": "reverse_kl"}},
        lr=1e-4,
    ),
    Method(
        name="top-1 + mu OPRD",
        key="top1_oprd",
        settings={"taps": _ALL_TAPS, "output_loss": {"kind": "sampled_token"}},
        lr=1e-4,
    ),
)
