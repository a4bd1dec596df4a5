"""The methods that are compared: what each one changes in the settings of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Settings = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method.

    Attributes:
        name: What tables call it.
        key: Its name in paths and in JSON.
        settings: Settings of `megatron_oprd.train` by group.
        lr: Peak learning rate that the sweep chose (README.md).
        lr_of: Another method, whose learning rate this one takes; it is not swept then.
        switch: Share of the steps after which the loss on distributions takes the place of the loss
            on hidden states; None: there is no switch.
        fade: Share of the steps that it takes for this; 0: it does so at once.
        ride: Strength of the extrapolation from the student to the teacher; None: there is none.
    """

    name: str
    key: str
    settings: Settings = field(default_factory=dict)
    lr: float = 0.0
    lr_of: str | None = None
    switch: float | None = None
    fade: float = 0.0
    ride: float | None = None

    def settings_of_run(self, *, steps: int, student: str) -> dict[str, dict[str, Any]]:
        """The settings of a run of this length that starts from this folder."""
        settings = {group: dict(values) for group, values in self.settings.items()}
        if self.switch is not None:
            # The last step of hidden states alone, and the first one without them.
            begin = round(self.switch * steps) - 1
            end = begin + max(1, round(self.fade * steps))
            for group, factors in (("loss", (1, 0)), ("output_loss", (0, 1))):
                settings.setdefault(group, {})["coefficient_points"] = [
                    [begin, factors[0]],
                    [end, factors[1]],
                ]
        if self.ride is not None:
            settings["ride"] = {"base": student, "lambda": self.ride}
        return settings


_TOKEN: Settings = {"taps": {"alignment": "token"}}
_LAST_LAYER: Settings = {"taps": {"layers": "last"}}
_NO_TAPS: Settings = {"taps": {"layers": "none"}}
_TOP_1: Settings = {"output_loss": {"kind": "sampled_token"}}
_TOP_16: Settings = {"output_loss": {"kind": "top_k", "k": 16}}
_TOP_16_REFERENCE: Settings = {
    "output_loss": {"kind": "top_k", "k": 16, "top_k_variant": "reference"}
}
_BF16: Settings = {"model": {"params_dtype": "bf16"}}

METHODS = (
    Method(name="OPRD", key="oprd", lr=1e-3),
    Method(name="OPRD, token", key="oprd_token", settings=_TOKEN, lr=1e-3),
    Method(name="OPRD, last layer", key="oprd_last", settings=_LAST_LAYER, lr=1e-3),
    Method(name="OPD top-1", key="top1", settings=_NO_TAPS | _TOP_1, lr=3e-4),
    Method(name="OPD top-16", key="top16", settings=_NO_TAPS | _TOP_16, lr=3e-4),
    Method(
        name="OPD top-16, reference",
        key="top16_reference",
        settings=_NO_TAPS | _TOP_16_REFERENCE,
        lr=3e-4,
    ),
    Method(
        name="OPD full vocabulary",
        key="full",
        settings=_NO_TAPS | {"output_loss": {"kind": "reverse_kl"}},
        lr=3e-4,
    ),
    Method(name="top-1 + 1 OPRD", key="top1_oprd1", settings=_TOP_1, lr=3e-4),
    Method(
        name="top-1 + 10 OPRD",
        key="top1_oprd10",
        settings={"loss": {"coefficient": 10.0}} | _TOP_1,
        lr=3e-4,
    ),
    Method(
        name="OPRD, then top-1",
        key="oprd_then_top1",
        settings=_TOP_1,
        switch=0.75,
        lr=1e-3,
    ),
    Method(name="RIDE", key="ride", ride=1.5, lr=1e-3),
    Method(
        name="OPRD, bf16",
        key="oprd_bf16",
        settings=_BF16,
        lr_of="oprd",
    ),
    Method(
        name="OPD top-16, bf16",
        key="top16_bf16",
        settings=_BF16 | _NO_TAPS | _TOP_16,
        lr_of="top16",
    ),
)

# What long responses are for; the others' learning rates.
ON_CHAINS = (
    *(
        Method(
            name=f"OPRD, {where} {k} tokens",
            key=f"oprd_{where}_{k}",
            settings={"taps": {"positions": f"{where}_k", "k": k}},
            lr_of="oprd",
        )
        for where, k in (("last", 32), ("last", 8), ("first", 32))
    ),
    Method(
        name="OPRD, then top-16",
        key="oprd_then_top16",
        settings=_TOP_16,
        switch=0.25,
        fade=0.05,
        lr_of="oprd",
    ),
)
# Rollouts of older weights (`rollout.max_staleness`): of the rollouts of n + 1 steps, which are
# generated at once, the last are n updates old.
STALE = tuple(
    Method(
        name=f"{name}, staleness up to {age}",
        key=f"{key}_stale{age}",
        settings={"rollout": {"max_staleness": age}} | settings,
        lr_of=key,
    )
    for key, name, settings in (("oprd", "OPRD", {}), ("top1", "OPD top-1", _NO_TAPS | _TOP_1))
    for age in (1, 4, 8)
)
BY_KEY = {method.key: method for method in (*METHODS, *ON_CHAINS, *STALE)}


def chosen_lr(method: Method, chosen: Mapping[str, float] | None = None) -> float:
    """A method's learning rate: from ``chosen`` where it has one, otherwise from the table."""
    key = method.lr_of or method.key
    return (chosen or {}).get(key, BY_KEY[key].lr)
