"""What is compared: studies, each with its tasks, methods, learning rates and seeds, all fixed before the first run."""

from __future__ import annotations

from dataclasses import dataclass, replace

#: What can decide: the share of exact matches, or the loss on outputs.
EXACT_MATCH, TARGET_LOSS = "exact_match", "target_loss"


@dataclass(frozen=True)
class Method:
    """A way to train.

    Args:
        name: in tables.
        flags: of `lift-ds train`.
        learning_rates: that are tried, ascending; of the series 1, 3, 10, 30, ...
        seeds: how many of the study's counted seeds, the first ones; None for all. Those with all come first.
    """

    name: str
    flags: tuple[str, ...]
    learning_rates: tuple[float, ...]
    seeds: int | None = None


@dataclass(frozen=True)
class Task:
    """What is learned, and what of.

    Args:
        name: in tables.
        source: a skill of `benchmarks.methods.skill`, or "math" for the word problems of the data folder.
        test_file: of the data folder, whose answers are asked for in the test; None: those of the rows held out.
        train_rows: that are trained on.
        validation_rows: by which learning rates are chosen.
        test_rows: by which methods are compared.
        longest: most characters of a row's question and output together; longer rows are left out.
        steps: of the optimizer.
        batch: rows of a step.
        max_length: tokens of a row.
        new_tokens: most that are generated for an answer.
        flags: of `lift-ds train`, the same for every method.
        decides: EXACT_MATCH, or where too few answers are right for that TARGET_LOSS; of the validation rows for a
            learning rate, of the test rows for a method.
    """

    name: str
    source: str
    test_file: str | None
    train_rows: int
    validation_rows: int
    test_rows: int
    longest: int
    steps: int
    batch: int
    max_length: int
    new_tokens: int
    flags: tuple[str, ...] = ()
    decides: str = EXACT_MATCH


@dataclass(frozen=True)
class Study:
    """A comparison.

    Args:
        name: of the command line.
        tasks: each is learned by each method.
        methods: that are compared.
        tuning_seed: of the runs by which learning rates are chosen; it is not counted.
        counted_seeds: of the runs that are compared.
        flags: of `lift-ds train`, the same for every task and method.
        evaluation: flags of `lift-ds evaluate`.
        extensions: by how many rates a grid is made longer at most, while the best is the first or the last of it.
        texts: windows of general text whose loss is measured.
        window: characters of one.
        prompts: questions of other tasks on which the divergence from the base is measured.
        commonsense: tasks of lm-evaluation-harness, asked after the counted runs.
        limit: questions of each.
    """

    name: str
    tasks: tuple[Task, ...]
    methods: tuple[Method, ...]
    tuning_seed: int
    counted_seeds: tuple[int, ...]
    flags: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ("--batch_size", "32")
    extensions: int = 1
    texts: int = 24
    window: int = 1000
    prompts: int = 40
    commonsense: tuple[str, ...] = ()
    limit: int = 50

    def task(self, name: str) -> Task:
        """Return the task of a name."""
        return next(task for task in self.tasks if task.name == name)

    def method(self, name: str) -> Method:
        """Return the method of a name."""
        return next(method for method in self.methods if method.name == name)


#: As many entries as a LoRA of this rank has: in SmolLM2-135M 4.9% of the managed ones. LIFT_MLP has as many in all.
_RANK, _RANK_MLP = "17", "27"
_DENSE_RATES = (1e-5, 3e-5, 1e-4, 3e-4)
_SPARSE_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
#: Of methods that are beside the point: two rates around the middle of the others' grids, and two counted seeds.
_FEWER_RATES, _FEWER_SEEDS = (3e-4, 1e-3), 2


def _lift(*flags: str, budget: tuple[str, str] = ("--budget_rank", _RANK), rank: int = 128) -> tuple[str, ...]:
    return ("--method", "lift", *budget, "--lra_rank", str(rank), *flags)


_REFRESHED = ("--refresh_interval", "15")
_NEVER = ("--refresh_interval", "1000000")
_LORA = ("--method", "lora", "--lora_rank", _RANK)

MAIN = (
    Method("full", ("--method", "full"), _DENSE_RATES),
    Method("lora", _LORA, _SPARSE_RATES),
    Method("lift", _lift(*_REFRESHED), _SPARSE_RATES),
    Method("magnitude", _lift(*_REFRESHED, "--criterion", "magnitude"), _SPARSE_RATES),
    Method("random", _lift(*_REFRESHED, "--criterion", "random"), _SPARSE_RATES),
)

FURTHER = tuple(
    Method(name, flags, _FEWER_RATES, _FEWER_SEEDS)
    for name, flags in {
        "smallest": _lift(*_REFRESHED, "--criterion", "smallest"),
        "gradient": _lift(*_NEVER, "--criterion", "gradient", "--gradient_batches", "2", "--refresh_memory_gib", "1"),
        "lift_no_refresh": _lift(*_NEVER),
        "lift_rank_8": _lift(*_REFRESHED, rank=8),
        "lift_mlp": _lift(*_REFRESHED, "--target_modules", "LIFT_MLP", budget=("--budget_rank", _RANK_MLP)),
        "lift_blocks": _lift(*_REFRESHED, "--block_shape", "4", "4"),
        "lift_1_percent": _lift(*_REFRESHED, budget=("--density", "0.01")),
        "lift_20_percent": _lift(*_REFRESHED, budget=("--density", "0.2")),
        "rslora": (*_LORA, "--use_rslora", "true"),
        "dora": (*_LORA, "--use_dora", "true"),
    }.items()
)

#: bf16 weights with a float32 master, as on a GPU; the trained model is saved in float32, so that merging adapters
#: rounds nothing, and evaluated in it.
_FLAGS = (
    *("--deepspeed", "ds_configs/lift_zero2.json", "--bf16", "true", "--gradient_accumulation_steps", "1"),
    *("--gradient_checkpointing", "false"),
)
_EVALUATION = ("--dtype", "float32", "--batch_size", "50")
_COMMONSENSE = ("arc_easy", "piqa")

SKILL = Study(
    name="skill",
    tasks=(
        Task(
            "dates", source="later_date", test_file=None, train_rows=320, validation_rows=100, test_rows=200,
            longest=1000, steps=40, batch=8, max_length=96, new_tokens=44,
        ),
    ),
    methods=(*MAIN, *FURTHER),
    tuning_seed=0,
    counted_seeds=(1, 2, 3, 4),
    flags=_FLAGS,
    evaluation=_EVALUATION,
    texts=24,
    window=400,
    prompts=24,
    commonsense=_COMMONSENSE,
    limit=60,
)  # fmt: skip

MATH = replace(
    SKILL,
    name="math",
    tasks=(
        Task(
            "math", source="math", test_file="svamp_test.json", train_rows=160, validation_rows=100, test_rows=200,
            longest=300, steps=40, batch=4, max_length=200, new_tokens=100, decides=TARGET_LOSS,
        ),
    ),
    methods=MAIN,
)  # fmt: skip

#: Whether everything works, in a minute, on a model as small as one likes; it says nothing of the methods.
SMOKE = Study(
    name="smoke",
    tasks=(
        Task(
            "units", source="units", test_file=None, train_rows=16, validation_rows=4, test_rows=4, longest=1000,
            steps=4, batch=2, max_length=128, new_tokens=4,
        ),
    ),
    methods=(
        Method("full", ("--method", "full"), (3e-3,)),
        Method("lift", ("--budget_rank", "2", "--lra_rank", "4", "--refresh_interval", "2"), (3e-3,)),
    ),
    tuning_seed=0,
    counted_seeds=(1, 2),
    flags=("--bf16", "false", "--gradient_checkpointing", "false"),
    extensions=0,
    texts=2,
    window=100,
    prompts=2,
)  # fmt: skip

STUDIES = {study.name: study for study in (SKILL, MATH, SMOKE)}
