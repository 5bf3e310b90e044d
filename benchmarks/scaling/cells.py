"""Cells: what a study measures, one training run each, and the grid of them."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.measure.models import lora_rank, matrix_shapes

#: "lift_node" is LIFT with a copy of the frozen weights on each node.
METHODS = ("full", "lora", "lift", "lift_node")
STAGES = (0, 1, 2, 3)

#: Weak: every rank has as many tokens as one rank alone. Strong: all ranks together. The one rank is the base of both.
BASE, STRONG, WEAK = "base", "strong", "weak"

#: A cell that trains nothing: it measures how fast an all-reduce is, where no one has given the rate of the link.
PROBE = "probe"

#: Name of the link of a run on one node, whose ranks use none.
NO_LINK = "none"

#: Elements of DeepSpeed's buckets, or one matrix where that is more.
BUCKET = 5_000_000


@dataclass(frozen=True)
class Sizes:
    """What is trained.

    Args:
        hidden: h.
        intermediate: i.
        layers: L.
        vocabulary: V.
        sequence: tokens of a sequence.
        density: share of the managed matrices that LIFT trains; the LoRA trains nearest to as many numbers.
    """

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    sequence: int
    density: float

    @property
    def managed(self) -> int:
        """Parameters of the managed matrices."""
        return self.layers * sum(rows * columns for rows, columns in matrix_shapes(self.hidden, self.intermediate))

    @property
    def matrices(self) -> int:
        """How many matrices are managed."""
        return self.layers * len(matrix_shapes(self.hidden, self.intermediate))

    @property
    def lora_rank(self) -> int:
        """Rank of the LoRA, and of LIFT's low-rank approximation."""
        return lora_rank(self.density, self.hidden, self.intermediate)

    @property
    def bucket(self) -> int:
        """Elements of DeepSpeed's buckets."""
        return max(BUCKET, self.hidden * self.intermediate)


@dataclass(frozen=True)
class Cell:
    """One training run.

    Args:
        method: "full" (the managed matrices), "lora", "lift", "lift_node", or `PROBE`.
        stage: of ZeRO.
        nodes: how many.
        ranks: on all nodes together.
        link: name of the link between the nodes.
        scaling: `BASE`, `STRONG` or `WEAK`.
        batch: sequences of a rank and step.
        sizes: of the model.
        repetition: number of the run.
        gbit: given rate of the link in Gbit/s, one direction; None where nobody has given it.
        steps: timed.
    """

    method: str
    stage: int
    nodes: int
    ranks: int
    link: str
    scaling: str
    batch: int
    sizes: Sizes
    repetition: int
    gbit: float | None = None
    steps: int = 5

    @property
    def tokens(self) -> int:
        """Tokens of a rank and step."""
        return self.batch * self.sizes.sequence

    @property
    def trained_by(self) -> str:
        """The method without where its frozen weights are."""
        return self.method.removesuffix("_node")

    @property
    def copy_ranks(self) -> int:
        """Ranks that share a copy of the frozen weights; 0 for all."""
        return self.ranks // self.nodes if self.method == "lift_node" and self.stage == 3 and self.nodes > 1 else 0

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two runs measurements of the same thing; neither the link's rate nor how many steps are timed."""
        return (
            self.method, self.stage, self.nodes, self.ranks, self.link, self.scaling, self.batch,
            *dataclasses.astuple(self.sizes), self.repetition,
        )  # fmt: skip

    @property
    def name(self) -> str:
        """Name of its folder while it runs."""
        return (
            f"{self.method}-zero{self.stage}-{self.nodes}nodes-{self.ranks}ranks-{self.link}-{self.scaling}-"
            f"{self.tokens}tokens-{self.repetition}"
        )

    def __str__(self) -> str:
        where = f"{self.nodes} node{'s' * (self.nodes > 1)}, {self.ranks} rank{'s' * (self.ranks > 1)}"
        what = "all-reduce" if self.method == PROBE else f"{self.method} ZeRO-{self.stage} {self.scaling}"
        return f"{what}, {where}, link {self.link}, {self.tokens} tokens a rank, repetition {self.repetition}"


@dataclass(frozen=True)
class Grid:
    """What a study is asked for; every list without repetitions.

    Args:
        methods: to compare.
        stages: of ZeRO.
        ranks: on all nodes together.
        nodes: numbers of nodes; those that a number of ranks is a multiple of are combined with it.
        scaling: `STRONG`, `WEAK` or both.
        tokens: of a step: those of one rank (weak), of all ranks (strong).
        sizes: of the model.
        link: name of the link between nodes.
        gbit: its rate, where it is known.
        steps: timed steps of a run.
        repetitions: runs of each cell.
    """

    methods: Sequence[str]
    stages: Sequence[int]
    ranks: Sequence[int]
    nodes: Sequence[int]
    scaling: Sequence[str]
    tokens: int
    sizes: Sizes
    link: str
    gbit: float | None
    steps: int
    repetitions: int


def make_grid(grid: Grid) -> list[Cell]:
    """Return the cells of a grid in the order in which they run.

    One rank on one node comes first, of full fine-tuning (and of LIFT, where it is compared) whether asked for or not:
    predictions are calibrated by it. Methods alternate, and repetitions are the outermost loop, so that what else runs
    on the machines meets all of them.

    Raises:
        ValueError: for a grid that cannot be run; names the setting, its value and what would be valid.
    """
    check(grid)
    cells: list[Cell] = []
    for repetition in range(grid.repetitions):
        cells += _calibrating(grid, repetition)
        for stage, nodes, ranks in itertools.product(grid.stages, sorted(grid.nodes), sorted(grid.ranks)):
            if ranks % nodes:
                continue
            for scaling in (BASE,) if ranks == 1 else grid.scaling:
                cells += [_cell(grid, method, stage, nodes, ranks, scaling, repetition) for method in grid.methods]
    return list(dict.fromkeys(cells))


def check(grid: Grid) -> None:
    """Refuse a grid that cannot be run.

    Raises:
        ValueError: names the setting, its value and what would be valid.
    """
    sizes = grid.sizes
    numbers = {
        "--ranks": min(grid.ranks), "--nodes": min(grid.nodes), "--tokens": grid.tokens, "--steps": grid.steps,
        "--repetitions": grid.repetitions, "--hidden": sizes.hidden, "--intermediate": sizes.intermediate,
        "--layers": sizes.layers, "--vocabulary": sizes.vocabulary, "--sequence": sizes.sequence,
    }  # fmt: skip
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} {value}: take a whole number of at least 1")
    if not 0 < sizes.density <= 1:
        raise ValueError(f"--density {sizes.density}: take a share in (0, 1]")
    if not re.fullmatch(r"[\w.+-]+", grid.link) or grid.link == NO_LINK:
        raise ValueError(f"--link-name {grid.link!r}: take letters, digits, '.', '+', '-', '_'; and not {NO_LINK!r}")
    if grid.gbit is not None and not grid.gbit > 0:
        raise ValueError(f"--link-gbit {grid.gbit}: take a rate above 0")
    if sizes.hidden > 64 and sizes.hidden % 64:
        raise ValueError(f"--hidden {sizes.hidden}: take a multiple of 64, the width of a head, or less than 64")
    if max(grid.ranks) > sizes.matrices:
        raise ValueError(
            f"--ranks {max(grid.ranks)}: more ranks than the {sizes.matrices} managed matrices of --layers "
            f"{sizes.layers}: the rest would have nothing to select; take at most {sizes.matrices} or more layers"
        )
    idle = [ranks for ranks in grid.ranks if all(ranks % nodes for nodes in grid.nodes)]
    if idle:
        raise ValueError(f"--ranks {idle[0]}: is a multiple of none of --nodes {' '.join(map(str, grid.nodes))}")
    unused = [nodes for nodes in grid.nodes if all(ranks % nodes for ranks in grid.ranks)]
    if unused:
        raise ValueError(f"--nodes {unused[0]}: none of --ranks {' '.join(map(str, grid.ranks))} is a multiple of it")
    most = max(grid.ranks) if STRONG in grid.scaling else 1
    for ranks in grid.ranks if STRONG in grid.scaling else (1,):
        if grid.tokens % (ranks * sizes.sequence):
            raise ValueError(
                f"--tokens {grid.tokens}: {ranks} rank(s) cannot share it in sequences of {sizes.sequence}; take a "
                f"multiple of {most * sizes.sequence}, or a shorter --sequence"
            )


def _cell(grid: Grid, method: str, stage: int, nodes: int, ranks: int, scaling: str, repetition: int) -> Cell:
    sequences = grid.tokens // grid.sizes.sequence
    return Cell(
        method=method,
        stage=stage,
        nodes=nodes,
        ranks=ranks,
        link=grid.link if nodes > 1 else NO_LINK,
        scaling=scaling,
        batch=sequences // ranks if scaling == STRONG else sequences,
        sizes=grid.sizes,
        repetition=repetition,
        gbit=grid.gbit if nodes > 1 else None,
        steps=grid.steps,
    )


def _calibrating(grid: Grid, repetition: int) -> Iterable[Cell]:
    """Yield the runs that predictions are calibrated by: one rank, and probes of links whose rate is not given."""
    for method in ("full", "lift"):
        if method == "full" or method in grid.methods:
            yield _cell(grid, method, min(grid.stages), 1, 1, BASE, repetition)
    for nodes, ranks in itertools.product(sorted(grid.nodes), sorted(grid.ranks)):
        if ranks > 1 and ranks % nodes == 0 and (nodes == 1 or grid.gbit is None):
            yield _cell(grid, PROBE, 0, nodes, ranks, WEAK, repetition)
