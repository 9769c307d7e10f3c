"""The results as a page for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.item import Item, Row
from benchmarks.gpu.processes import shown
from benchmarks.gpu.results import Results

REHEARSED = (
    "**A rehearsal on a CPU: every item has run its code at a tiny size. No figure here is a "
    "result.**"
)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Make a Markdown table: the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    cells = ([cell.replace("|", "\\|") for cell in row] for row in (header, rule, *rows))
    return ["| " + " | ".join(row) + " |" for row in cells]


def section_tables(found: Sequence[tuple[str, Row]]) -> list[str]:
    """Make a table of the rows of each kind: those that have the same columns."""
    kinds: dict[tuple[str, ...], list[list[str]]] = {}
    for item, row in found:
        columns = tuple(name for name, value in row.items() if value is not None)
        kinds.setdefault(columns, []).append([item, *(shown(row[name]) for name in columns)])
    lines: list[str] = []
    for columns, rows in kinds.items():
        lines += ["", *table(["item", *columns], rows)]
    return lines


def to_markdown(items: Sequence[Item], results: Results) -> str:
    """Return the page of what is known so far."""
    machines = results.machines()
    ends, rows = results.ends(), results.rows()
    lines = [f"# {machines[-1]['device'] if machines else 'No machine'}", ""]
    if results.dry:
        lines += [REHEARSED, ""]
    if machines:
        lines += table(["what", "value"], [[k, v] for k, v in machines[-1].items()])
    missing = [item for item in items if item.name not in ends or ends[item.name].status != "done"]
    if missing:
        lines += ["", "## Not done", ""]
        told = []
        for item in missing:
            end = ends.get(item.name)
            told.append(
                [item.name, "not run" if end is None else end.status, end.message if end else ""]
            )
        lines += table(["item", "status", "why"], told)
    for section in dict.fromkeys(item.section for item in items):
        found = [
            (item.name, row)
            for item in items
            if item.section == section
            for row in rows.get(item.name, [])
        ]
        if found:
            lines += ["", f"## {section}", *section_tables(found)]
    times = [[item.name, f"{ends[item.name].seconds:.1f}"] for item in items if item.name in ends]
    if times:
        lines += ["", "## Time taken", "", *table(["item", "s"], times)]
    return "\n".join(lines) + "\n"


def write_page(items: Sequence[Item], results: Results) -> Path:
    """Write `results.md` beside the results; it is replaced whole."""
    page = results.path.with_suffix(".md")
    beside = page.with_name(page.name + ".tmp")
    beside.write_text(to_markdown(items, results), encoding="utf-8")
    beside.replace(page)
    return page
