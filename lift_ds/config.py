"""LiftConfig: the settings of LIFT, validated."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

LIFT_BLOCK = "lift"

#: Block of a DeepSpeed file with flags of launch/train.py that hold where the command line does not give them.
TRAIN_DEFAULTS_BLOCK = "train_defaults"

#: Named sets of target modules. A preset has to match at least one module of the model.
TARGET_PRESETS: dict[str, tuple[str, ...]] = {
    # The variant of the paper (section 5) that trains the feed-forward matrices alone.
    "LIFT_MLP": ("gate_proj", "up_proj", "down_proj"),
}

#: Solvers of the low-rank step; "auto" takes the faster of the last two for each matrix.
SOLVERS = ("auto", "svd", "gram", "chebyshev")

#: Share of a selection in which the solver "chebyshev" may differ from the exact ones.
SELECTION_TOLERANCE = 0.005

#: Share of each matrix that is trained where a command is told neither budget nor density; about that of the paper.
USUAL_DENSITY = 0.05

#: Where the index lives in ZeRO stages 1 and 2.
INDEX_PLACEMENTS = ("sharded", "replicated")


@dataclass(frozen=True)
class LiftConfig:
    """The settings of one LIFT run; one of `budget_rank` and `density` is given.

    Args:
        budget_rank: R; a matrix [m, n] trains min(R * (m + n), m * n) entries, as many as a LoRA of rank R.
        density: share of each matrix to train, in (0, 1]; k = round(density * m * n), at least 1.
        lra_rank: r, the rank of the approximation whose largest entries are selected. Where
            r >= min(m, n) the approximation is the matrix itself.
        refresh_interval: optimizer steps between two selections (T in Algorithm 1).
        refresh_parts: steps over which the matrices of a refresh are spread; 1 selects in all of them after the same
            step. Each matrix is refreshed every `refresh_interval` steps, the first time after at least as many.
        solver: how the low-rank approximation is computed: "svd" (the definition), "gram" (exact for the selection),
            "chebyshev" (up to `selection_tolerance`; faster for large matrices), "auto": the faster of these two.
        selection_tolerance: share of k in which a selection by "chebyshev" may differ from the exact one, by its own
            estimate, in (0, 1); where it cannot get there "gram" is used.
        block_shape: (p, q), the shape of the blocks of entries that are selected together, by the sum of their
            magnitudes; (1, 1) selects single entries. It has to divide every managed matrix.
        seed: of what "chebyshev" draws.
        target_modules: names of the linear layers to manage, matched against the last components of
            their dotted names ("q_proj", "self_attn.q_proj"), or the name of a preset ("LIFT_MLP").
            None manages every linear layer except the output head, a new head, and what was frozen before.
        exclude_modules: names of modules in which nothing is managed, matched against any components of dotted names
            ("vision_tower", "layers.0", "q_proj").
        extra_trainable: names of parameters or modules trained densely beside, matched against the last components
            of their dotted names ("bias", "norm.weight", "input_layernorm.weight", "score").
        index_placement: in ZeRO stages 1 and 2 each rank holds 1/N of every index and backward gathers it ("sharded"),
            or all of it ("replicated": 2 bytes an entry on every rank, no traffic).
        refresh_memory_gib: GiB a refresh may take on a rank beside what training holds (the largest matrix's low-rank
            factors, tiles of W', the weight it receives in ZeRO-3); None sets no bound. A device's allocator may
            reserve more than is in use.
        lr: learning rate, where no optimizer is given (Adam's other settings likewise).
        betas: decay rates of Adam's moments; the paper's are (0.9, 0.95).
        eps: term added to Adam's denominator.
        weight_decay: decoupled weight decay of the principal values.
        stall_timeout: seconds that a forward, a backward, a step, a part of a refresh, a save or a load may last on
            several ranks before the rank takes another one for lost and ends; None for any time.

    Raises:
        ValueError: for a setting that is out of range, naming it, its value and what would be valid.
    """

    budget_rank: int | None = None
    density: float | None = None
    lra_rank: int = 128
    refresh_interval: int = 200
    refresh_parts: int = 1
    solver: str = "auto"
    selection_tolerance: float = SELECTION_TOLERANCE
    block_shape: tuple[int, int] = (1, 1)
    seed: int = 0
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] = ()
    extra_trainable: tuple[str, ...] = ()
    index_placement: str = "sharded"
    refresh_memory_gib: float | None = None
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    stall_timeout: float | None = 1800.0

    def __post_init__(self) -> None:
        self._check_budget()
        _check_positive_int("lra_rank", self.lra_rank)
        _check_positive_int("refresh_interval", self.refresh_interval)
        _check_positive_int("refresh_parts", self.refresh_parts)
        if self.refresh_parts > self.refresh_interval:
            raise ValueError(
                f"refresh_parts={self.refresh_parts} is more than the {self.refresh_interval} steps of refresh_interval"
            )
        _check_choice("solver", self.solver, SOLVERS)
        if not (_is_number(self.selection_tolerance) and 0 < self.selection_tolerance < 1):
            raise ValueError(
                f"selection_tolerance={self.selection_tolerance!r} is not a share in (0, 1); 0.005 lets half a "
                "percent of a selection differ"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed={self.seed!r} is not a whole number of at least 0")
        _check_choice("index_placement", self.index_placement, INDEX_PLACEMENTS)
        if self.refresh_memory_gib is not None and not (
            _is_number(self.refresh_memory_gib) and self.refresh_memory_gib > 0
        ):
            raise ValueError(f"refresh_memory_gib={self.refresh_memory_gib!r} is not a number above 0")
        # Frozen, so the normal forms (tuples, as JSON knows only lists) are set past __setattr__.
        object.__setattr__(self, "target_modules", _target_modules(self.target_modules))
        object.__setattr__(self, "exclude_modules", _names("exclude_modules", self.exclude_modules))
        object.__setattr__(self, "extra_trainable", _names("extra_trainable", self.extra_trainable))
        object.__setattr__(self, "betas", _betas(self.betas))
        object.__setattr__(self, "block_shape", _block_shape(self.block_shape))
        _check_number("lr", self.lr, 0.0, math.inf)
        _check_number("eps", self.eps, 0.0, math.inf)
        _check_number("weight_decay", self.weight_decay, 0.0, math.inf)
        _check_stall_timeout(self.stall_timeout)

    def _check_budget(self) -> None:
        if (self.budget_rank is None) == (self.density is None):
            given = "both" if self.budget_rank is not None else "neither"
            raise ValueError(
                f"{given} of budget_rank={self.budget_rank} and density={self.density} given; give exactly one: "
                "budget_rank >= 1 (as many entries as a LoRA of that rank) or density in (0, 1]"
            )
        if self.budget_rank is not None:
            _check_positive_int("budget_rank", self.budget_rank)
        if self.density is not None and not (_is_number(self.density) and 0 < self.density <= 1):
            raise ValueError(f"density={self.density!r} is not a share in (0, 1]; 0.05 trains 5% of each matrix")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> LiftConfig:
        """Build a config from the keys of a `"lift"` block.

        Args:
            settings: setting name -> value, as in JSON.

        Returns:
            The validated config.

        Raises:
            ValueError: for an unknown key (the nearest known one is suggested) or an invalid value.
        """
        return cls(**cls.checked_block(settings))

    @classmethod
    def checked_block(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy of a `"lift"` block whose keys are settings; the values are not looked at.

        Raises:
            ValueError: for an unknown key (the nearest known one is suggested).
        """
        if not isinstance(settings, Mapping):
            raise ValueError(f'the "{LIFT_BLOCK}" block is {settings!r}; it must be an object of settings')
        known = [field.name for field in dataclasses.fields(cls)]
        for key in settings:
            if key not in known:
                hint = _nearest(key, known) or f"; the settings are {', '.join(known)}"
                raise ValueError(f'unknown setting {key!r} in the "{LIFT_BLOCK}" block{hint}')
        return dict(settings)

    @classmethod
    def from_ds_config(cls, ds_config: str | os.PathLike[str] | Mapping[str, Any]) -> LiftConfig:
        """Read the top-level `"lift"` block of a DeepSpeed configuration.

        Args:
            ds_config: path of a DeepSpeed JSON file, or its content.

        Returns:
            The validated config.

        Raises:
            ValueError: when the file or the block is missing or malformed, or a setting is invalid.
        """
        content = read_ds_config(ds_config)
        if LIFT_BLOCK not in content:
            raise ValueError(
                f'{_source(ds_config)} has no top-level "{LIFT_BLOCK}" block; '
                f'add for example "{LIFT_BLOCK}": {{"density": 0.05, "lra_rank": 128, "refresh_interval": 200}}'
            )
        return cls.from_dict(content[LIFT_BLOCK])

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values, the inverse of `from_dict`."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def entries(self, rows: int, columns: int) -> int:
        """Return k, the number of entries trained in a matrix of that shape (section 3 of the paper); whole blocks.

        Args:
            rows: m.
            columns: n.
        """
        if self.budget_rank is not None:
            budget = min(self.budget_rank * (rows + columns), rows * columns)
        else:
            assert self.density is not None
            budget = round(self.density * rows * columns)
        area = self.block_shape[0] * self.block_shape[1]
        return max(1, budget // area) * area


def read_ds_config(ds_config: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Read a DeepSpeed configuration.

    Args:
        ds_config: path of a JSON file, or its content.

    Returns:
        A fresh dict of its content.

    Raises:
        ValueError: when the file is missing or is no JSON object; the message has the file and the line.
    """
    if isinstance(ds_config, Mapping):
        return json.loads(json.dumps(dict(ds_config)))
    path = os.fspath(ds_config)
    if not os.path.isfile(path):
        raise ValueError(f"DeepSpeed configuration {path!r} does not exist; give the path of a JSON file")
    return read_json_object(path)


def read_json_object(path: str) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: when it holds none; the message has the file and, where it does not parse, the line.
    """
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: needs a JSON object, this is a {type(content).__name__}")
    return content


def _source(ds_config: object) -> str:
    return os.fspath(ds_config) if isinstance(ds_config, (str, os.PathLike)) else "the DeepSpeed configuration"


def _nearest(name: object, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}{_nearest(value, choices)}")


def _check_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} is not a whole number of at least 1")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if not (_is_number(value) and low <= value < high):
        raise ValueError(f"{name}={value!r} is not a number of at least {low:g} and below {high:g}")


def _check_stall_timeout(value: object) -> None:
    if value is not None and not (_is_number(value) and 0 < value < math.inf):
        raise ValueError(f"stall_timeout={value!r} is not a number of seconds above 0, or null for any time")


def _betas(value: object) -> tuple[float, float]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"betas={value!r} is not a pair of numbers in [0, 1)")
    for beta in value:
        _check_number("betas", beta, 0.0, 1.0)
    return (float(value[0]), float(value[1]))


def _block_shape(value: object) -> tuple[int, int]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"block_shape={value!r} is not a pair of whole numbers such as [4, 4]")
    for side in value:
        _check_positive_int("block_shape", side)
    return (value[0], value[1])


def _names(setting: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(v, str) and v for v in value):
        raise ValueError(f"{setting}={value!r} is not a list of names")
    return tuple(value)


def _target_modules(value: object) -> str | tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        if value not in TARGET_PRESETS:
            raise ValueError(
                f"target_modules={value!r} is not a preset; give a list of module names, leave it out for all "
                f"linear layers, or name one of {', '.join(TARGET_PRESETS)}{_nearest(value, list(TARGET_PRESETS))}"
            )
        return value
    names = _names("target_modules", value)
    if not names:
        raise ValueError("target_modules=[] matches nothing; leave it out for all linear layers")
    return names
