"""LiftConfig: the settings of LIFT, validated."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LIFT_BLOCK = "lift"

#: Block of a DeepSpeed file with flags of launch/train.py that hold where the command line does not give them.
TRAIN_DEFAULTS_BLOCK = "train_defaults"

#: Named sets of target modules. A preset has to match at least one module of the model.
TARGET_PRESETS: dict[str, tuple[str, ...]] = {
    # The variant of the paper (section 5) that trains the feed-forward matrices alone.
    "LIFT_MLP": ("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
}

#: Solvers of the low-rank step; "auto" takes the faster of the last two for each matrix.
SOLVERS = ("auto", "svd", "gram", "chebyshev")

#: By which score entries are selected: see lift_ds/selection/criteria.py, which adds those that are registered there.
CRITERIA = ["principal", "magnitude", "smallest", "random", "gradient"]

#: Share of a selection in which the solver "chebyshev" may differ from the exact ones.
SELECTION_TOLERANCE = 0.005

#: Share of each matrix that is trained where a command is told neither budget nor density; about that of the paper.
USUAL_DENSITY = 0.05

#: Where the index lives in ZeRO stages 1 and 2.
INDEX_PLACEMENTS = ("sharded", "replicated")


#: Takes the name of a setting and its value; returns the value in its normal form, or raises ValueError.
Check = Callable[[str, Any], Any]


def _is(valid: Callable[[Any], bool], what: str, kinds: tuple[type, ...] = (int, float)) -> Check:
    def check(name: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, kinds) or not valid(value):
            raise ValueError(f"{name}={value!r} is not {what}")
        return value

    return check


def _whole(at_least: int) -> Check:
    return _is(lambda value: value >= at_least, f"a whole number of at least {at_least}", (int,))


def _number_from_0(below: float) -> Check:
    return _is(lambda value: 0 <= value < below, f"a number of at least 0 and below {below:g}")


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not true or false")
    return value


def _or_none(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _choice(choices: Collection[str]) -> Check:
    def check(name: str, value: Any) -> str:
        if value not in choices:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}{did_you_mean(value, choices)}")
        return value

    return check


def _pair(kind: type, check_each: Check, valid: str) -> Check:
    def check(name: str, value: Any) -> tuple[Any, Any]:
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
            raise ValueError(f"{name}={value!r} is not a pair of {valid}")
        first, second = (kind(check_each(name, part)) for part in value)
        return first, second

    return check


def _names(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(v, str) and v for v in value):
        raise ValueError(f"{name}={value!r} is not a list of names")
    return tuple(value)


def _preset_or_names(name: str, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str):
        if value not in TARGET_PRESETS:
            raise ValueError(
                f"{name}={value!r} is not a preset; give a list of module names, leave it out for all matrices, "
                f"or name one of {', '.join(TARGET_PRESETS)}{did_you_mean(value, TARGET_PRESETS)}"
            )
        return value
    names = _names(name, value)
    if not names:
        raise ValueError(f"{name}=[] matches nothing; leave it out for all matrices")
    return names


def _frozen_weights(name: str, value: Any) -> str:
    number = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(number, str) and (number in ("auto", "all", "node") or (number.isdecimal() and int(number) > 0)):
        return number
    raise ValueError(f"{name}={value!r} is none of auto, all and node, and no number of ranks such as 8")


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return the end of an error message: the known name that is nearest to a wrong one, or nothing."""
    match = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def _setting(default: Any, check: Check, help: str, more: str = "", *, flag: bool = True) -> Any:
    """Define one setting: this is the only place that says what it means.

    Args:
        default: where it is not given.
        check: what a value has to be.
        help: one line, without a full stop; the trainer's `--help` shows it.
        more: what the table of the documentation says after that line, as Markdown.
        flag: whether the trainer has a flag of this name. False where the Trainer has a flag of its own, and for what
            a program asks of LIFT by itself.
    """
    return dataclasses.field(default=default, metadata={"check": check, "help": help, "more": more, "flag": flag})


@dataclass(frozen=True)
class LiftConfig:
    """The settings of one LIFT run. Exactly one of `budget_rank` and `density` is given.

    What each setting means stands beside it, in its `help` and `more`; docs/settings.md shows all of them as a table.

    Raises:
        ValueError: for a setting that is out of range. It names the setting, its value and what would be valid.
    """

    budget_rank: int | None = _setting(
        None,
        _or_none(_whole(1)),
        "Train as many entries of each matrix as a LoRA of this rank has",
        "With R, these are min(R·(m+n), m·n) of a matrix [m, n]. Give this or `density`.",
    )
    density: float | None = _setting(
        None,
        _or_none(_is(lambda value: 0 < value <= 1, "a share in (0, 1]; 0.05 trains 5% of each matrix")),
        "Share of each matrix to train, in (0, 1]",
    )
    criterion: str = _setting(
        "principal",
        _choice(CRITERIA),
        f"Which entries are trained: {', '.join(CRITERIA)}",
        '`"principal"`: the largest of the low-rank approximation, which is LIFT. `"magnitude"`: the largest of the '
        'matrix itself. `"smallest"`: the smallest of the approximation. `"random"`: drawn by the seed, the same ones '
        'at every refresh. `"gradient"`: the largest mean of abs(dL/dW) over some batches. You can add '
        "one: see [Criteria](#criteria-which-entries).",
    )
    gradient_batches: int = _setting(
        4, _whole(1), "Batches on which the criterion gradient measures gradients, where a Trainer gives them"
    )
    lra_rank: int = _setting(
        128,
        _whole(1),
        "Rank of the approximation whose largest entries are trained",
        "Where it is not below min(m, n), the entries of the matrix itself are ranked.",
    )
    refresh_interval: int = _setting(200, _whole(1), "Applied optimizer steps between two selections in one matrix")
    refresh_parts: int = _setting(
        1,
        _whole(1),
        "Steps over which the matrices of one refresh are spread",
        "With 1, all matrices are selected after the same step. With 50 of 200 steps, a fiftieth of them is selected "
        "in every fourth step, so that no step waits for all.",
    )
    solver: str = _setting(
        "auto",
        _choice(SOLVERS),
        f"How the low-rank approximation is computed: {', '.join(SOLVERS)}",
        '`"svd"` is the definition. `"gram"` solves a smaller eigenproblem and is exact for the selection. '
        '`"chebyshev"` iterates until its selection is right up to `selection_tolerance`; where it does not get there, '
        '`"gram"` takes over. `"auto"` takes the faster of these two for each matrix.',
    )
    selection_tolerance: float = _setting(
        SELECTION_TOLERANCE,
        _is(lambda value: 0 < value < 1, "a share in (0, 1); 0.005 lets half a percent of a selection differ"),
        "Share of a selection in which chebyshev may differ from the exact one",
        "The share is its own estimate.",
    )
    block_shape: tuple[int, int] = _setting(
        (1, 1),
        _pair(int, _whole(1), "whole numbers such as [4, 4]"),
        "Rows and columns of the blocks of entries that are selected together",
        "With `[4, 4]`, blocks of 4 x 4 entries are ranked by the sum of their magnitudes, and the index is 16 times "
        "smaller. The shape has to divide every managed matrix.",
    )
    seed: int = _setting(
        0, _whole(0), "Seed of the vectors that chebyshev starts from, and of the criterion random", flag=False
    )
    target_modules: str | tuple[str, ...] | None = _setting(
        None,
        _or_none(_preset_or_names),
        f"Matrices to train, by name, or a preset: {', '.join(TARGET_PRESETS)} (default: all but the head)",
        "A name is the end of a dotted name, such as `q_proj`, `self_attn.q_proj` or `experts.down_proj`. The preset "
        "takes the feed-forward matrices gate, up and down.",
    )
    exclude_modules: tuple[str, ...] = _setting(
        (),
        _names,
        "Modules in which nothing is trained, by any part of their dotted names",
        'Everything below them is left out too. For example `["vision_tower"]` or `["layers.3"]`.',
    )
    extra_trainable: tuple[str, ...] = _setting(
        (),
        _names,
        "Parameters or modules to train in full beside, by the end of their names",
        'For example `["norm.weight", "bias"]`.',
    )
    index_placement: str = _setting(
        "sharded",
        _choice(INDEX_PLACEMENTS),
        f"Where the index lives in ZeRO 1 and 2: {' or '.join(INDEX_PLACEMENTS)}",
        '`"sharded"`: each of N ranks holds 1/N of every index, and backward gathers it a layer ahead. '
        '`"replicated"`: every rank holds all of it, at 2 bytes an entry, and nothing is sent.',
    )
    frozen_weights: str = _setting(
        "auto",
        _frozen_weights,
        "Ranks that share a copy of the frozen weights in ZeRO-3: auto, all, node, or how many in a row",
        '`"all"`: each of N ranks holds 1/N. `"node"`: each node has a copy, and each of its n ranks holds 1/n of it. '
        "Then forward and backward fetch no weight from another node. A rank holds 2/n bytes of a weight in bf16. "
        'Checkpoints are the same. `"auto"` is `"node"` on several nodes if that takes at most half of a device.',
    )
    refresh_memory_gib: float | None = _setting(
        None,
        _or_none(_is(lambda value: value > 0, "a number above 0")),
        "Most GiB that a refresh may take on a rank, beside what training holds (default: any)",
        "A bound that cannot be kept is refused at the start, with one that can. The device's allocator may reserve "
        "more than is in use.",
    )
    keep_base: bool = _setting(
        False,
        _switch,
        "Record the weights before training, for lift_ds.base_weights",
        "It takes 4 bytes for each entry that was ever trained, in bf16: on every rank in ZeRO 0 to 2, 1/N of them on "
        "each of N ranks in ZeRO-3. Parameters that are trained in full are kept in full.",
        flag=False,
    )
    track_changes: bool = _setting(
        False,
        _switch,
        "Record what leaves the selection, for lift_ds.changed_entries",
        "It takes 4 bytes for each entry that was trained and is not any more, shared out as those of `keep_base`.",
        flag=False,
    )
    lr: float = _setting(2e-4, _number_from_0(math.inf), "Learning rate of AdamW", flag=False)
    betas: tuple[float, float] = _setting(
        (0.9, 0.95), _pair(float, _number_from_0(1.0), "numbers in [0, 1)"), "Decay rates of both moments", flag=False
    )
    eps: float = _setting(1e-8, _number_from_0(math.inf), "Term added to AdamW's denominator", flag=False)
    weight_decay: float = _setting(
        0.0, _number_from_0(math.inf), "Decoupled decay of the trained entries themselves", flag=False
    )
    stall_timeout: float | None = _setting(
        1800.0,
        _or_none(_is(lambda value: 0 < value < math.inf, "a number of seconds above 0, or null for any time")),
        "Seconds without progress after which a rank takes another one for lost, and ends",
        "It limits each forward, backward, step, part of a refresh, save and load of several ranks. `null`: no limit.",
    )

    def __post_init__(self) -> None:
        self._check_budget()
        for field in dataclasses.fields(self):
            # Frozen, so normal forms (tuples, where JSON has lists) are set past __setattr__.
            object.__setattr__(self, field.name, field.metadata["check"](field.name, getattr(self, field.name)))
        if self.refresh_parts > self.refresh_interval:
            raise ValueError(
                f"refresh_parts={self.refresh_parts} is more than the {self.refresh_interval} steps of refresh_interval"
            )

    def _check_budget(self) -> None:
        if (self.budget_rank is None) == (self.density is None):
            given = "both" if self.budget_rank is not None else "neither"
            raise ValueError(
                f"{given} of budget_rank={self.budget_rank} and density={self.density} given; give exactly one: "
                "budget_rank >= 1 (as many entries as a LoRA of that rank) or density in (0, 1]"
            )

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
                hint = did_you_mean(key, known) or f"; the settings are {', '.join(known)}"
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
            source = "the DeepSpeed configuration" if isinstance(ds_config, Mapping) else os.fspath(ds_config)
            raise ValueError(
                f'{source} has no top-level "{LIFT_BLOCK}" block; '
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
