"""The results of verify as tables for the terminal."""

from collections.abc import Sequence

from rich.table import Table

from checkpoint_tools.hidden_states import StateDifference
from megatron_oprd.weights.compare import KeyDifference, ValueDifference
from megatron_oprd.weights.manifest import ChecksumDifference

_MAX_ROWS = 30  # per table; the JSON report has all differences


def checksums_table(differences: Sequence[ChecksumDifference]) -> Table:
    """A row for each tensor or chunk that does not match the manifest."""
    table = _table("Checksums", len(differences))
    table.add_column("tensor, or chunk of one", overflow="fold")
    table.add_column("on disk", no_wrap=True)
    for one in differences[:_MAX_ROWS]:
        found = "other values" if one.expected is not None else "not in the manifest"
        table.add_row(one.name, "missing" if one.found is None else found)
    return table


def keys_table(differences: Sequence[KeyDifference]) -> Table:
    """A row for each different name, shape, dtype, config field or companion file."""
    table = _table("Keys", len(differences))
    for title in ("what", "name", "in A", "in B"):
        table.add_column(title, overflow="fold")
    for one in differences[:_MAX_ROWS]:
        table.add_row(one.kind, one.name, one.a or "missing", one.b or "missing")
    return table


def values_table(differences: Sequence[ValueDifference]) -> Table:
    """A row for each tensor with different values."""
    table = _table("Values", len(differences))
    table.add_column("tensor, and where it differs first", overflow="fold")
    table.add_column("differ", justify="right")
    table.add_column("largest", justify="right")
    for one in differences[:_MAX_ROWS]:
        index = ", ".join(map(str, one.index))
        table.add_row(
            f"{one.name}\n  at {index or 'its only value'}: A {one.a:.6g}, B {one.b:.6g}",
            f"{one.num_different / one.num_values:.2%}",
            f"{one.largest:.3g}",
        )
    return table


def states_table(differences: Sequence[StateDifference], tolerance: float) -> Table:
    """Rows for the layers, the final norm and the logits; red if over the tolerance."""
    table = Table(
        title="Hidden states and logits",
        caption="relative: to the largest magnitude at the position, or to 1",
    )
    table.add_column("place", no_wrap=True)
    for title in ("relative", "absolute", "at sequence,\nposition, channel", "in A", "in B"):
        table.add_column(title, justify="right")
    for one in differences:
        table.add_row(
            one.place,
            f"{one.relative:.3g}",
            f"{one.absolute:.3g}",
            f"{one.sequence}, {one.position}, {one.channel}",
            f"{one.a:.6g}",
            f"{one.b:.6g}",
            style=None if one.relative <= tolerance else "red",
        )
    return table


def _table(what: str, count: int) -> Table:
    shown = f"the first {_MAX_ROWS} of {count}" if count > _MAX_ROWS else f"{count}"
    return Table(title=f"{what} that differ: {shown}")
