"""Warnings about settings that are allowed and rarely meant."""

from megatron_oprd.config.schema import TapConfig


def warnings_of(taps: TapConfig) -> list[str]:
    """A sentence for each setting of the taps that leaves out what the user probably wants."""
    if taps.layers == "none" or taps.alignment == "predictor":
        return []
    warnings = [
        "taps.alignment = token leaves out the last position of each prompt, which predicts the "
        "first response token: training can break that token; predictor includes it"
    ]
    if taps.positions == "last":
        warnings.append(
            "taps.positions = last with taps.alignment = token supervises only the position that "
            "holds a response's last token, which predicts nothing; use predictor, or last_k"
        )
    return warnings
