"""The peak of known GPUs, for the share of it that a run reaches."""

# Dense bf16 matrix products, in 10^12 operations per second, from NVIDIA's data sheets; where these
# give the number with sparsity, half of it. By words of the name that the driver reports. The
# first line whose words are all in the name holds, so that a variant stands before its family.
_PEAKS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("H100", "PCIe"), 756),
    (("H100", "NVL"), 835),
    (("H100",), 989),
    (("H800", "PCIe"), 756),
    (("H800",), 989),
    (("H200", "NVL"), 835),
    (("H200",), 989),
    (("GH200",), 989),
    (("H20",), 148),
    (("A100",), 312),
    (("A800",), 312),
    (("B200",), 2250),
    (("GB200",), 2500),
    (("L40S",), 362),
)


def peak_tflops(name: str) -> float | None:
    """The bf16 peak of a GPU by its name, in 10^12 operations per second; None if unknown.

    A part of a GPU (MIG) is unknown too.
    """
    # A name such as "NVIDIA A100-SXM4-80GB": whole words, so that H20 is not found in H200.
    words = set(name.replace("-", " ").split())
    if "MIG" in words:
        return None
    return next((peak for wanted, peak in _PEAKS if words.issuperset(wanted)), None)
