"""The quality of a bridge by layer and rank, as a table and a picture to choose r by."""

import io
from collections.abc import Sequence
from statistics import mean

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from megatron_oprd.distill.bridge_file import Manifest


def cosine_table(manifest: Manifest) -> Table:
    """The cosine after the fit by pair and rank, and the mean over pairs before and after."""
    table = Table(
        title="Cosine of the projected states",
        caption=f"{manifest.data['held_out_sequences']} held-out sequences, "
        f"{manifest.data['held_out_rows']} rows; fitted on {manifest.data['rows']}",
    )
    table.add_column("student <- teacher layer")
    for rank in manifest.cosine:
        table.add_column(f"r = {rank}", justify="right")
    of_ranks = manifest.cosine.values()
    for number, (student, teacher) in enumerate(manifest.layer_pairs):
        after = [f"{one['after'][number]:.3f}" for one in of_ranks]
        last = number == len(manifest.layer_pairs) - 1
        table.add_row(f"{student} <- {teacher}", *after, end_section=last)
    for name, when in (("mean", "after"), ("mean before the fit", "before")):
        table.add_row(name, *(f"{mean(one[when]):.3f}" for one in of_ranks))
    return table


def cosine_picture(manifest: Manifest) -> bytes:
    """A PNG with 1 - cosine by layer for each rank, and its mean over layers by rank.

    On a log axis, where ranks differ visibly although their cosines are all close to 1.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_layer, by_rank = figure.subplots(1, 2)
    layers = [student for student, _ in manifest.layer_pairs]
    for rank, cosine in manifest.cosine.items():
        gaps = _gaps(cosine["after"])
        by_layer.plot(layers, gaps, marker="o", markersize=3, label=f"r = {rank}")
    by_layer.set(xlabel="student layer", ylabel="1 - cosine, held-out (less is better)")
    by_layer.set_title("After the fit, by layer")
    by_layer.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_layer.legend()
    ranks = [int(rank) for rank in manifest.cosine]
    for name, style in (("after", "o-"), ("before", "s--")):
        means = [mean(_gaps(one[name])) for one in manifest.cosine.values()]
        by_rank.plot(ranks, means, style, label=name)
    by_rank.set(xlabel="rank r", xscale="log")
    by_rank.set_xticks(ranks, [str(rank) for rank in ranks])
    by_rank.minorticks_off()
    by_rank.set_title("Mean over the layers")
    by_rank.legend()
    for axes in (by_layer, by_rank):
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def _gaps(cosines: Sequence[float]) -> list[float]:
    """What each cosine lacks to 1; at least the rounding of one in fp32."""
    # A log axis cannot show 0.
    return [max(1 - cosine, torch.finfo(torch.float32).eps) for cosine in cosines]
