"""Logits of an LM head's output: some models divide it, and some put a softcap on it."""

from dataclasses import dataclass

from torch import Tensor

from megatron_oprd.models.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class LogitForm:
    """What a model makes of its LM head's output: a division, then a softcap."""

    divisor: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, architecture: Architecture) -> "LogitForm":
        """An architecture's."""
        return cls(divisor=architecture.logits_divisor, softcap=architecture.logits_softcap)

    def logits(self, output: Tensor) -> Tensor:
        """Turns the head's output, of any shape, into logits, in place."""
        logits = output.div_(self.divisor)
        if self.softcap is None:
            return logits
        return logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def gradient_of_output(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Turns the gradient of ``logits`` into that of the head's output, in place."""
        gradient.div_(self.divisor)
        if self.softcap is None:
            return gradient
        # Of c tanh(x / c) the derivative is 1 - tanh(x / c)^2.
        return gradient.mul_(1 - (logits.to(gradient.dtype) / self.softcap).square())
