"""Writes and prints what a comparison found so far."""

import json
from pathlib import Path

from figures import curves_figure, positions_figure, responses_figure
from plan import RL
from results import Comparison
from rich.console import Console
from tables import cell_table, responses_table, sweep_table


def report(comparison: Comparison, out: Path, console: Console) -> None:
    """Writes ``results.json`` and the pictures, and prints the tables."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(comparison.to_json(), indent=2, allow_nan=False)
    (out / "results.json").write_text(text + "\n")
    cells = [cell for cell in comparison.plan.cells if comparison.methods_of(cell)]
    for cell in comparison.plan.cells:
        if comparison.sweep_of(cell):
            console.print(sweep_table(comparison, cell))
    for cell in cells:
        console.print(cell_table(comparison, cell))
    if not cells:
        return
    # The first cell has all methods; the same number of responses shows what the pair changes.
    first = cells[0]
    alike = [cell for cell in cells if cell.responses == first.responses]
    curves_figure(comparison, alike).savefig(out / "curves.png")
    positions_figure(comparison, first).savefig(out / "positions.png")
    of_pair = [cell for cell in cells if cell.pair == RL]
    if len(of_pair) > 1:
        console.print(responses_table(comparison, of_pair))
        responses_figure(comparison, of_pair).savefig(out / "responses.png")
    console.print(f"wrote {out}/results.json and the pictures", highlight=False, soft_wrap=True)
