"""Print a table of the results of benchmark_step.py, one task a row, and draw it.

python tools/step_table.py steps/*.json --plot docs/images/steps
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from options import command
from slzo.plots.style import lines, new_figure, save, style_axis
from slzo.utils.errors import SlzoError
from slzo.utils.files import read_json
from tables import markdown_table

# Names of the variants in the plot, from slow to fast.
VARIANTS = {
    "mezo": "published MeZO step",
    "mezo-layer": "published step, one layer",
    "forward2": "two forward passes",
    "spsa": "SPSA",
    "default": "LayerOutputPerturbation",
}


def ratio(result: dict[str, Any], slow: str, fast: str) -> str:
    """Return the ratio of two variants' medians, with that of their means in parentheses."""
    variants = result["variants"]
    if slow not in variants:
        return "-"
    of_medians, of_means = (variants[slow][key] / variants[fast][key] for key in ("median_s", "mean_s"))
    return f"{of_medians:.3g} ({of_means:.3g})"


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table: seconds of slzo's steps, and how many times as long the others take."""
    rows = []
    for result in results:
        variants = result["variants"]
        rows.append(
            {
                "task": result["task"],
                "batches": str(len(variants["spsa"]["seconds"])),
                "tokens per batch": f"{sum(result['tokens']) / len(result['tokens']):.0f}",
                "default, s": f"{variants['default']['median_s']:.2f}",
                "mezo / default": ratio(result, "mezo", "default"),
                "SPSA, s": f"{variants['spsa']['median_s']:.2f}",
                "mezo / SPSA": ratio(result, "mezo", "spsa"),
                "mezo-layer / SPSA": ratio(result, "mezo-layer", "spsa"),
                "forward2 / SPSA": ratio(result, "forward2", "spsa"),
                "forward2-onednn / SPSA": ratio(result, "forward2-onednn", "spsa"),
                "cold / warm": f"{variants['spsa-cold']['median_s'] / variants['spsa']['median_s']:.2f}",
            }
        )
    return markdown_table(list(rows[0]), [list(row.values()) for row in rows])


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the median seconds of a step, on a logarithmic axis."""
    figure = new_figure(8, 0.45 * len(results) + 1.8, "Seconds of a training step")
    axis = figure.subplots()
    for (name, label), (colour, _) in zip(VARIANTS.items(), lines(len(VARIANTS)), strict=True):
        found = [(row, result["variants"][name]) for row, result in enumerate(results) if name in result["variants"]]
        axis.scatter(
            [variant["median_s"] for _, variant in found], [row for row, _ in found], color=colour, label=label
        )
    axis.set_xscale("log")
    style_axis(axis, "seconds, logarithmic", "", whole=False)
    axis.set_yticks(range(len(results)), [result["task"] for result in results])
    axis.invert_yaxis()
    axis.legend(fontsize=8, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.subplots_adjust(top=1 - 0.85 / figure.get_figheight())
    save(figure, path.parent, path.name)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="JSON files of benchmark_step.py")
    parser.add_argument("--plot", help="also draw the seconds to this path, without suffix")
    args = parser.parse_args(argv)
    results = [read_json(Path(file)) for file in args.files]
    for file, result in zip(args.files, results, strict=True):
        if "tokens" not in result:
            raise SlzoError(f"{file!r}: not a result of benchmark_step.py on a CPU; give files that its --json wrote")
    results.sort(key=lambda result: sum(result["tokens"]) / len(result["tokens"]))
    print(table(results))
    if args.plot:
        draw(results, Path(args.plot))


if __name__ == "__main__":
    sys.exit(main())
