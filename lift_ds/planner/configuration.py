"""A model's configuration: from a named size or a config.json, or refused where transformers would guess."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import transformers

from lift_ds.config import read_json_object
from lift_ds.planner.presets import PRESETS, preset_named

#: The sizes of a model, as the configurations of transformers name them. Each class has some of these fields. A default
#: that is a number is that of some other model, so a file has to name such a field. Where the default is None,
#: transformers computes the size from others (the n_inner of GPT-2 is 4 n_embd).
SIZES = (
    "hidden_size", "n_embd", "d_model", "emb_dim",
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers",
    "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads",
    "encoder_attention_heads", "decoder_attention_heads",
    "num_encoder_attention_heads", "num_decoder_attention_heads",
    "vocab_size",
    "intermediate_size", "ffn_dim", "d_ff", "dff", "d_inner", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim",
    "expand", "d_kv",
)  # fmt: skip

#: Names in older files for a field. Some classes of transformers still take them, others pass over them in silence.
OLDER_NAMES = {"hidden_size": "n_embed", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}

#: The section of a configuration that describes the language model, where it describes others too.
TEXT = "text_config"


def read_content(model: str) -> tuple[dict[str, Any], str]:
    """Return what a configuration says, and where it is written.

    Args:
        model: a named size, or a folder with a config.json, or such a file.

    Raises:
        ValueError: when there is no such size or file, or the file holds no JSON object.
    """
    preset = preset_named(model)
    if preset is not None:
        return preset.config, model
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"--model {model!r} is neither a size ({', '.join(PRESETS)}) nor a folder with a config.json")
    return read_json_object(str(path)), str(path)


def settings_of(content: dict[str, Any], source: str) -> Any:
    """Return the transformers configuration of a file's content.

    Args:
        content: of a config.json.
        source: where it is written, for messages.

    Raises:
        ValueError: when it leaves out what a plan needs, or transformers does not take it.
    """
    kind = content.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(f"{source}: model_type={kind!r} is no model of transformers {transformers.__version__}")
    config_class = transformers.CONFIG_MAPPING[kind]
    _check_sections(config_class, content, source)
    section = _text_section(config_class, content)
    if section is None:
        _check_sizes(_text_class(config_class), content, source)
    fields = {name: value for name, value in content.items() if name != "model_type"}
    try:
        # What JSON has no number for, as infinity, is written in a form of transformers' own.
        settings = transformers.AutoConfig.for_model(kind, **config_class._decode_special_floats(fields))
    except Exception as error:  # each class checks itself, and raises what it likes
        raise ValueError(f"{source}: transformers does not take it: {in_one_line(error)}") from error
    if section is not None:
        _check_text_section(settings, section, source)
    _check_taken(settings, content, source)
    return settings


def left_out(settings: Any, content: dict[str, Any]) -> tuple[str, ...]:
    """Return the sizes that the section of the language model leaves to its class, as "vocab_size (32000)".

    A section may leave out what is the default of its class: transformers saved sections so up to its version 4.

    Args:
        settings: the configuration.
        content: of the file that it was read from.
    """
    section = _text_section(type(settings), content)
    if section is None:
        return ()
    text = getattr(settings, TEXT)
    silent = [field for field in _needed(type(text)) if not _names(type(text), section, field)]
    return tuple(f"{field} ({vars(text)[field]})" for field in silent)


def in_one_line(error: Exception) -> str:
    """Return what an error of transformers says, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _text_section(config_class: Any, content: dict[str, Any]) -> Any:
    """Return the section of the language model; None where its sizes lie flat in the file."""
    return content.get(TEXT) if TEXT in config_class.sub_configs else None


def _text_class(config_class: Any) -> Any:
    """Return the class that the sizes in a flat file are those of."""
    return config_class.sub_configs.get(TEXT, config_class)


def _check_sections(config_class: Any, content: dict[str, Any], source: str) -> None:
    """Refuse a file without a section, which transformers would fill in; the language model's may lie flat in it."""
    needed = [name for name, section in (config_class.sub_configs_defaults or {}).items() if not section.optional]
    lies_flat = TEXT in needed and _lies_flat(config_class.sub_configs[TEXT], content)
    missing = [name for name in needed if content.get(name) is None and not (name == TEXT and lies_flat)]
    if missing:
        raise ValueError(f"{source}: has no {', '.join(missing)}; a plan needs {', '.join(needed)}")
    wrong = [name for name in needed if not isinstance(content.get(name), dict | None)]
    if wrong:
        raise ValueError(f"{source}: {wrong[0]} is no JSON object")


def _lies_flat(text: Any, content: dict[str, Any]) -> bool:
    """Tell whether a file has sizes of the language model beside its sections, as those of Qwen2-VL do."""
    return text is not transformers.AutoConfig and any(_names(text, content, field) for field in _needed(text))


def _needed(config_class: Any) -> list[str]:
    """Return the sizes that a file has to name, in the order of `SIZES`."""
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    return [name for name in SIZES if _is_count(defaults.get(name))]


def _names(config_class: Any, content: dict[str, Any], field: str) -> list[str]:
    """Return under which names a file has a field: its own, those that the class maps to it, an older one."""
    mapped = [name for name, own in config_class.attribute_map.items() if own == field]
    return [name for name in (field, *mapped, OLDER_NAMES.get(field)) if name in content]


def _check_sizes(config_class: Any, content: dict[str, Any], source: str) -> None:
    needed = _needed(config_class)
    missing = [field for field in needed if not _names(config_class, content, field)]
    if missing:
        raise ValueError(f"{source}: has no {', '.join(missing)}; a plan needs {', '.join(needed)}")
    _check_counts(config_class, content, source)


def _check_counts(config_class: Any, content: dict[str, Any], source: str) -> None:
    for field in _needed(config_class):
        for name in _names(config_class, content, field)[:1]:
            by_layer = content[name] if isinstance(content[name], list) else [content[name]]
            if not by_layer or not all(map(_is_count, by_layer)):
                raise ValueError(f"{source}: {name} is no whole number of at least 1, but {content[name]!r}")


def _check_taken(settings: Any, content: dict[str, Any], source: str) -> None:
    """Refuse a size that transformers passes over: it would build the size of some other model in its place."""
    section = _text_section(type(settings), content)
    named = content if section is None else section
    text = getattr(settings, TEXT) if TEXT in settings.sub_configs else settings
    lies_flat = section is None and text is not settings
    for field in _needed(type(text)):
        for name in _names(type(text), named, field)[:1]:
            taken = vars(text)[field]
            # Under its own name and in its own place a field is read; its class may adjust the value.
            if taken != named[name] and (lies_flat or name != field):
                raise ValueError(
                    f"{source}: transformers {transformers.__version__} passes over {name}={named[name]} of a model of "
                    f"type {settings.model_type!r} and takes {taken}; name "
                    + (field if text is settings else f"{TEXT}.{field}")
                )


def _check_text_section(settings: Any, section: dict[str, Any], source: str) -> None:
    """Refuse a section of the language model that names none of its sizes, or one that is no number."""
    text = type(getattr(settings, TEXT))
    needed = _needed(text)
    if not any(_names(text, section, field) for field in needed):
        raise ValueError(f"{source}: {TEXT} names none of {', '.join(needed)}; a plan needs those of the model")
    _check_counts(text, section, f"{source}: {TEXT}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
