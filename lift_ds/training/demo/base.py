"""The base model of the run that needs no download: built once, cached, and shared by the ranks.

    python -m lift_ds.training.demo.base --output DIR      builds it in one process

The folder holds what a real run would be given: a Hugging Face model with its tokenizer, and data files.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import FrameType

from lift_ds.training.data import instruction_prompt
from lift_ds.training.demo import texts

CACHE_VARIABLE = "LIFT_DS_CACHE"
EOS = "<|endoftext|>"
PAD = "<|pad|>"

TRAIN_FILE = "problems_train.json"
HELD_OUT_FILE = "problems_held_out.json"
STORIES_FILE = "stories_held_out.json"

# What a launcher tells its ranks. The builder is one process and must not join the run's process group.
_LAUNCHER_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_RANK", "ROLE_RANK",
    "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
)  # fmt: skip


@dataclass(frozen=True)
class BaseSettings:
    """What the base model and its data are made of. Another value gives another entry of the cache."""

    hidden_size: int = 192
    layers: int = 4
    heads: int = 6  # half as many for keys and values
    intermediate_size: int = 512
    vocab_size: int = 1024  # of a byte-level BPE
    block_size: int = 128  # tokens of a row in the base's own training, which is dense
    batch_size: int = 16
    steps: int = 240
    learning_rate: float = 3e-3
    stories: int = 12_000  # that the base is trained on
    problems: int = 2_000  # training rows of the new task
    held_out: int = 128  # rows of either kind
    seed: int = 0


def cache_root() -> Path:
    """Return where bases are kept: $LIFT_DS_CACHE, or ~/.cache/lift_ds."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "lift_ds"


def base_folder(settings: BaseSettings) -> Path:
    """Return the folder of a base, named by everything that decides what is in it.

    Args:
        settings: of the base.

    Returns:
        The folder, whether or not it exists.
    """
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(settings), sort_keys=True).encode())
    for source in (Path(texts.__file__), Path(__file__)):
        digest.update(source.read_bytes())
    for package in ("torch", "transformers", "tokenizers"):
        digest.update(f"{package}={metadata.version(package)}".encode())
    return cache_root() / f"demo-base-{digest.hexdigest()[:16]}"


def ensure_base(settings: BaseSettings, *, build_here: bool, timeout: float = 900.0) -> Path:
    """Return the folder of a base that is ready for use, building it first where it is missing.

    Args:
        settings: of the base.
        build_here: True on the one rank of each machine that builds; the others wait for its result.
        timeout: seconds to build or to wait.

    Returns:
        The folder.

    Raises:
        ValueError: the cache cannot be written.
        RuntimeError: the build failed.
        TimeoutError: the base was not ready in time.
    """
    folder = base_folder(settings)
    if folder.is_dir():
        return folder
    if build_here:
        _build_into(folder, settings, timeout)
        return folder
    deadline = time.monotonic() + timeout
    while not folder.is_dir():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the base model {folder} was not built within {timeout:g} seconds")
        time.sleep(0.2)
    return folder


def _build_into(folder: Path, settings: BaseSettings, timeout: float) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ValueError(
            f"cannot write the base model's cache {folder.parent} ({error.strerror}); "
            f"set {CACHE_VARIABLE} to a folder that can be written"
        ) from error
    try:
        _run_builder(part, settings, timeout)
        with contextlib.suppress(OSError):  # another run was first, and its folder holds the same
            part.rename(folder)
        if not folder.is_dir():
            raise RuntimeError(f"the base model could not be moved to {folder}")
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _run_builder(part: Path, settings: BaseSettings, timeout: float) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER_VARIABLES}
    # The other ranks are waiting, so the cores they were given are free until the base is there.
    environment["OMP_NUM_THREADS"] = str(min(4, len(os.sched_getaffinity(0))))
    # A thread that spins while another job has its core holds up the rest: ten times slower on a shared machine.
    environment["OMP_WAIT_POLICY"] = "PASSIVE"
    environment["CUDA_VISIBLE_DEVICES"] = ""  # so that every machine builds the same kind of base
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "lift_ds.training.demo.base", "--output", str(part)]
    command += ["--settings", json.dumps(dataclasses.asdict(settings))]
    with _terminated_as_exception():
        try:
            done = subprocess.run(
                command, env=environment, timeout=timeout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the base model was not built within {timeout:g} seconds") from None
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-20:])
        raise RuntimeError(f"building the base model failed with code {done.returncode}:\n{tail}")


@contextlib.contextmanager
def _terminated_as_exception() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that the builder is ended with the process that waits for it."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def build_base(folder: Path, settings: BaseSettings) -> None:
    """Train the base in this process and write it with the data files.

    Args:
        folder: where to; it exists.
        settings: of the base.
    """
    told = texts.stories(settings.stories + settings.held_out, settings.seed)
    asked = texts.problems(settings.problems + settings.held_out, settings.seed + 1)
    _write_json(folder / TRAIN_FILE, asked[: settings.problems])
    _write_json(folder / HELD_OUT_FILE, asked[settings.problems :])
    _write_json(folder / STORIES_FILE, [{"text": text} for text in told[settings.stories :]])
    _train(folder, told[: settings.stories], asked[: settings.problems], settings)


def _write_json(path: Path, rows: object) -> None:
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _train(folder: Path, told: list[str], asked: list[texts.Problem], settings: BaseSettings) -> None:
    # Imported here: a process that only looks for a cached base pays for none of this.
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

    set_seed(settings.seed)
    tokenizer = _tokenizer(told, asked, settings.vocab_size)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads // 2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            adam_beta2=0.95,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            seed=settings.seed,
        )
        Trainer(model=model, args=arguments, train_dataset=_blocks(told, tokenizer, settings)).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(told: list[str], asked: list[texts.Problem], vocab_size: int):  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    # One token a digit: numbers never seen as a whole would have no token of their own.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    framed = [instruction_prompt(row["instruction"]) + row["output"] for row in asked[:500]]
    bpe.train_from_iterator([*told[:2000], *framed], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=PAD)


def _blocks(told: list[str], tokenizer, settings: BaseSettings) -> list[dict[str, list[int]]]:  # type: ignore[no-untyped-def]
    rng = random.Random(settings.seed)
    order = rng.sample(told, len(told))
    stream = [token for ids in tokenizer(order)["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
    size = settings.block_size
    rows = [stream[start : start + size] for start in range(0, len(stream) - size + 1, size)]
    return [{"input_ids": row, "labels": row} for row in rows]


def _main() -> None:
    parser = argparse.ArgumentParser(description="Build the base model of the run that needs no download.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--settings", type=json.loads, default={}, help="settings that differ, as JSON")
    chosen = parser.parse_args()
    chosen.output.mkdir(parents=True, exist_ok=True)
    build_base(chosen.output, BaseSettings(**chosen.settings))


if __name__ == "__main__":
    _main()
