"""Options of a request for samples, as its own fields declare them."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import docstring_parser
import tyro

from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.cli.options import numbers
from ddpm_engine.diffusion.guidance import Guidance
from ddpm_engine.errors import UserError
from ddpm_engine.generation.generate import request_from_files
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_engine.samplers.request import SampleRequest

T = TypeVar("T")

Numbers = Annotated[str | None, tyro.conf.arg(metavar="K,K,...")]
ClassLabels = Annotated[str | None, tyro.conf.arg(metavar="C,C,...|all|none")]

RENAMED = {
    "sampling.": "",
    "guidance.": "guidance_",
    "classes": "class_labels",
    "guidance": "guidance_scale",
    "repeats": "draws",
    "augmentation_level": "augmentation",
}
"""Fields of a run, and of a request for samples, whose options have other names."""

_FIELDS = {"draws": "repeats", "augmentation": "augmentation_level"}
"""Option → field of the request, where they differ."""

_GUIDANCE = "guidance_"


def options_of_request(*names: str) -> Callable[[type[T]], type[T]]:
    """Make a class a section of options: a dataclass in which the request declares most fields.

    Type, default and help of an option are those of the field of `SampleRequest`, or of
    `SamplingConfig`, in which case the default is the run's; `guidance_scale` and the like are
    those of `Guidance`.

    Args:
        names: of the section's options in their order. Those that the class declares itself stay as
            they are.
    """

    def decorate(section: type[T]) -> type[T]:
        own = inspect.get_annotations(section)
        annotations: dict[str, Any] = {}
        help_texts = []
        for name in names:
            if name in own:
                annotations[name] = own[name]
                continue
            annotations[name], default, text = _option(name)
            setattr(section, name, default)
            help_texts.append(f"    {name}: {text}")
        assert annotations.keys() >= own.keys(), "every option has its place"
        section.__annotations__ = annotations
        section.__doc__ = "\n".join([f"{section.__doc__}\n", "Args:", *help_texts])
        return dataclasses.dataclass(frozen=True)(section)

    return decorate


def request_of(model: LoadedModel, options: Mapping[str, Any]) -> SampleRequest:
    """Build the request that options describe.

    Args:
        model: that it is for.
        options: as `fields_of` takes them.

    Raises:
        UserError: a list that cannot be read, or whatever `request_from_files` refuses.
    """
    return request_from_files(model, **fields_of(options))


def fields_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a request that options describe.

    Args:
        options: values by name; those that are None stand for the default. `interpolate` and
            `prompts` are the field's values, everything else as on the command line.

    Raises:
        UserError: a list that cannot be read, or guidance without a scale.
    """
    fields = {name: value for name, value in options.items() if value is not None}
    guidance = {
        name.removeprefix(_GUIDANCE): fields.pop(name)
        for name in list(fields)
        if name.startswith(_GUIDANCE)
    }
    two_passes = fields.pop("two_passes", False) or None
    if guidance:
        if "scale" not in guidance:
            option = f"{_GUIDANCE}{next(iter(guidance))}"
            raise UserError(f"`{option}` needs `guidance_scale`; give that too", option)
        fields["guidance"] = Guidance(**guidance, two_passes=two_passes)
    elif two_passes:
        raise UserError("`two_passes` needs `guidance_scale`; give that too", "two_passes")
    if "timesteps" in fields:
        fields["timesteps"] = numbers("timesteps", fields["timesteps"])
    label, labels = fields.pop("class_label", None), fields.pop("class_labels", None)
    if label is not None:
        fields["classes"] = (label,)
    elif labels is not None:
        named = labels in ("all", "none")
        fields["classes"] = labels if named else numbers("class-labels", labels)
    return {_FIELDS.get(name, name): value for name, value in fields.items()}


def prompts_of(listed: Sequence[str], file: Path | None) -> tuple[str, ...] | None:
    """Return the prompts of a command; None if there are none.

    Args:
        listed: on the command line.
        file: of one prompt a line; lines of blanks are passed over.

    Raises:
        UserError: a file that cannot be read, is not UTF-8 or has no prompts.
    """
    if file is None:
        return tuple(listed) or None
    try:
        lines = file.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"`prompts` {file} is not UTF-8 ({error.reason} at byte {error.start}); save it as "
            "UTF-8",
            "prompts",
        ) from error
    except OSError as error:
        raise UserError(
            f"`prompts` {file} cannot be read: {error.strerror}; give a file of one prompt a line",
            "prompts",
        ) from error
    found = tuple(text for line in lines if (text := line.strip()))
    if not found:
        raise UserError(f"`prompts` {file} holds no prompts; give one a line", "prompts")
    return found


def _option(name: str) -> tuple[Any, Any, str]:
    """Type, default and help of an option."""
    field = _FIELDS.get(name, name)
    if field in {one.name for one in dataclasses.fields(SamplingConfig)}:
        text = re.sub(r"; None: [^.]*", "", _help(SamplingConfig, field))
        return _type(SamplingConfig, field) | None, None, f"{text.rstrip('.')}; default: the run's."
    if field.startswith(_GUIDANCE):
        field = field.removeprefix(_GUIDANCE)
        return _type(Guidance, field) | None, None, _help(Guidance, field)
    kind, default = _type(SampleRequest, field), getattr(SampleRequest, field)
    if kind == tuple[int, ...] | None:
        kind = Numbers
    return kind, default, _help(SampleRequest, field)


def _type(source: type[Any], field: str) -> Any:
    return get_type_hints(source, include_extras=True)[field]


def _help(source: type[Any], field: str) -> str:
    texts = docstring_parser.parse_from_object(source).params
    (text,) = (part.description or "" for part in texts if part.arg_name == field)
    return " ".join(text.split())
