"""The import graph of the house as a picture: which room stands on which, and what imports in a circle.

    python -m docs.imports OUT.svg [--tree FOLDER] [--commit COMMIT]

Counted are all imports, at a file's head, inside functions and for types alone. A room is a folder of a floor, deeper
folders with it; `rooms` says what becomes of files beside the folders.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

FLOORS = ("model", "platform", "serve", "jobs")  # from the ground up
Graph = dict[str, set[str]]

# Sizes in the picture, in pixels
WIDTH, LEFT, ROW, BOX, GAP, CHARACTER = 1000, 100, 64, 30, 20, 7.4


def modules(root: Path) -> dict[str, Path]:
    """Name -> file of every module of the floors, `model.generation.engine`; a package is its folder's name."""
    found = {}
    for floor in FLOORS:
        for file in sorted((root / floor).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def graph(files: Mapping[str, Path]) -> Graph:
    """Module -> the modules of ours that it imports."""
    return {name: {one for one in _imported(file, files) if one != name} for name, file in files.items()}


def _imported(file: Path, files: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("calumma."):
                inner = name.removeprefix("calumma.")
                known = inner if inner in files else inner.rpartition(".")[0]
                if known in files:
                    yield known


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan), each sorted, the largest first."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            found.append(sorted(group))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return sorted((group for group in found if len(group) > 1), key=lambda group: (-len(group), group))


def rooms(files: Mapping[str, Path], edges: Graph) -> Graph:
    """Room -> the rooms that it imports from.

    A module's room is its folder of the second level. Beside those folders it is itself in `platform`; on another floor
    it shares a box with the files of the same row (see `layers`), and the box has their names. An empty `__init__` has
    none.
    """
    folders = {".".join(name.split(".")[:2]) for name, file in files.items() if len(_folders(name, file)) > 1}
    second = {name: ".".join(name.split(".")[:2]) for name in files}
    alone = _between(edges, {name: second[name] if second[name] in folders else name for name in files})
    row = layers(alone)
    used = {other for others in edges.values() for other in others}
    together: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name in files:
        if second[name] not in folders and _floor(name) != "platform" and (edges[name] or name in used):
            together[_floor(name), row[name]].append(name)
    box = {name: f"{floor}.{_names(names)}" for (floor, _), names in together.items() for name in names}
    return _between(edges, {name: box.get(name, second[name]) for name in files if name in box or "." in name})


def _between(edges: Graph, of: Mapping[str, str]) -> Graph:
    """The graph of groups, each module in that which `of` names."""
    found: Graph = {name: set() for name in of.values()}
    for name in of:
        found[of[name]] |= {of[other] for other in edges[name]} - {of[name]}
    return found


def _names(modules: list[str]) -> str:
    """A label for files that share a box."""
    names = [name.partition(".")[2] or "__init__" for name in modules]
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"


def _folders(name: str, file: Path) -> list[str]:
    """The folders that a module stands in, from its floor down."""
    parts = name.split(".")
    return parts if file.name == "__init__.py" else parts[:-1]


def _reach(node: str, edges: Graph) -> set[str]:
    """All that is imported from a node, directly or not."""
    seen: set[str] = set()
    waiting = [node]
    while waiting:
        for other in edges[waiting.pop()] - seen:
            seen.add(other)
            waiting.append(other)
    return seen


@dataclass(frozen=True)
class Box:
    name: str
    label: str
    x: float
    y: float
    width: float
    circular: bool


@dataclass(frozen=True)
class Arrow:
    path: str
    wrong: bool


def layers(edges: Graph) -> dict[str, int]:
    """Room -> row within its floor, from 0: above what it imports on the same floor. Rooms of a circle share one."""
    group = {node: node for node in edges}
    for circle in circles(edges):
        group |= dict.fromkeys(circle, circle[0])
    below: Graph = defaultdict(set)
    for node, others in edges.items():
        below[group[node]] |= {group[other] for other in others if _floor(other) == _floor(node)} - {group[node]}

    def depth(node: str) -> int:
        return max((depth(other) + 1 for other in below[node]), default=0)

    return {node: depth(group[node]) for node in edges}


def reduced(edges: Graph) -> Graph:
    """Without the imports that follow from others: A to C where A to B to C. Those within a circle stay."""
    group = {node: index for index, circle in enumerate(circles(edges)) for node in circle}
    kept: Graph = {}
    for node, others in edges.items():
        beyond: set[str] = set()
        for other in others:
            if node not in group or group.get(other) != group[node]:
                beyond |= _reach(other, edges) - {other} if other not in group else set()
        kept[node] = {
            other for other in others if other not in beyond or (node in group and group.get(other) == group[node])
        }
    return kept


def draw(root: Path, title: str) -> str:
    """The picture of a tree, as SVG."""
    files = modules(root)
    edges = graph(files)
    between = rooms(files, edges)
    row = layers(between)
    bad = {node for circle in circles(between) for node in circle}
    boxes: dict[str, Box] = {}
    bands: list[dict[str, object]] = []
    height = 0.0
    order: dict[str, float] = {}
    for floor in FLOORS:
        rows = defaultdict(list)
        for node in sorted(between):
            if _floor(node) == floor:
                rows[row[node]].append(node)
        bottom = height
        for _, nodes in sorted(rows.items()):
            for line in _lines(nodes, between, order):
                height += ROW
                width = sum(_width(node) for node in line) + GAP * (len(line) - 1)
                x = LEFT + max(GAP, (WIDTH - LEFT - width) / 2)
                for node in line:
                    boxes[node] = Box(node, _label(node), x, -height, _width(node), node in bad)
                    order[node] = x + _width(node) / 2
                    x += _width(node) + GAP
        height += GAP
        bands.append({"name": f"{floor}/", "top": -height, "height": height - bottom})
    arrows = [
        _arrow(boxes[node], boxes[other], boxes)
        for node, others in sorted(reduced(between).items())
        for other in sorted(others)
    ]
    loops = circles(edges)
    facts = [
        f"{len(files)} files, {sum(map(len, edges.values()))} imports between them",
        f"{len(loops)} circle{'s' * (len(loops) != 1)} of files"
        + (f", {sum(map(len, loops))} files in them" if loops else ""),
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("imports.svg.j2").render(
        title=title, facts=facts, bands=bands, boxes=boxes.values(), arrows=arrows, width=WIDTH, height=height, box=BOX
    )


def _lines(nodes: list[str], edges: Graph, order: Mapping[str, float]) -> Iterator[list[str]]:
    """The rooms of a row, each near what it stands on; in several lines where they are too many for the width."""

    def place(node: str) -> float:
        below = [order[other] for other in edges[node] if other in order]
        return sum(below) / len(below) if below else WIDTH / 2

    line: list[str] = []
    for node in sorted(nodes, key=lambda node: (place(node), node)):
        if line and sum(_width(one) + GAP for one in [*line, node]) > WIDTH - LEFT - GAP:
            yield line
            line = []
        line.append(node)
    yield line


def _floor(node: str) -> str:
    return node.partition(".")[0]


def _label(node: str) -> str:
    return node.partition(".")[2]


def _width(node: str) -> float:
    return CHARACTER * len(_label(node)) + 24


def _arrow(above: Box, below: Box, boxes: Mapping[str, Box]) -> Arrow:
    """From the importing room to the imported one: down is right, sideways and up is not. A right one goes around what
    lies between as far as it can."""
    x1, x2 = above.x + above.width / 2, below.x + below.width / 2
    if above.y < below.y:
        y1, y2 = above.y + BOX, below.y - 4
        bend = (y2 - y1) / 2 if y2 - y1 < 2 * ROW else (y2 - y1) / 3
        others = [box for box in boxes.values() if box not in (above, below) and y1 <= box.y <= y2]

        def hits(shift: float) -> int:
            curve = ((x1, y1), (x1 + shift, y1 + bend), (x2 + shift, y2 - bend), (x2, y2))
            return sum(any(_within(_at(curve, step / 40), box) for step in range(1, 40)) for box in others)

        shift = min((0, 70, -70, 140, -140, 220, -220, 320, -320), key=lambda shift: (hits(shift), abs(shift)))
        x3, x4 = x1 + shift, x2 + shift
        path = f"M{x1:.0f},{y1:.0f} C{x3:.0f},{y1 + bend:.0f} {x4:.0f},{y2 - bend:.0f} {x2:.0f},{y2:.0f}"
        return Arrow(path, False)
    side = BOX if above.y == below.y else 0
    y1, y2 = above.y + side, below.y + BOX
    return Arrow(f"M{x1:.0f},{y1:.0f} C{x1:.0f},{y1 + 34:.0f} {x2:.0f},{y2 + 34:.0f} {x2:.0f},{y2 + 4:.0f}", True)


def _at(curve: Sequence[tuple[float, float]], t: float) -> tuple[float, float]:
    """The point of a cubic Bézier curve at t of [0, 1]."""
    weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
    x, y = (sum(weight * point[axis] for weight, point in zip(weights, curve, strict=True)) for axis in (0, 1))
    return x, y


def _within(point: tuple[float, float], box: Box) -> bool:
    return box.x <= point[0] <= box.x + box.width and box.y <= point[1] <= box.y + BOX


def tree_of(commit: str, root: Path, folder: Path) -> Path:
    """The floors as they were at a commit, below `folder`."""
    packed = subprocess.run(["git", "archive", commit, *FLOORS], cwd=root, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def main() -> None:
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(prog="python -m docs.imports", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the SVG file to write")
    parser.add_argument("--title", default="What imports what")
    parser.add_argument("--commit", help="draw the tree of a commit; default: the working tree")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="calumma-imports-") as folder:
        tree = tree_of(given.commit, root, Path(folder)) if given.commit else root
        given.out.write_text(draw(tree, given.title), encoding="utf-8")


if __name__ == "__main__":
    main()
