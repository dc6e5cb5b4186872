"""Recipes' settings for photographs, where the defaults are for digits."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from . import augment

Config = TypeVar("Config")


def presets() -> dict[str, augment.Strength]:
    """The augmentations that have a name, such as ``PHOTO_STRONG``."""
    return {name: value for name, value in vars(augment).items() if isinstance(value, augment.Strength)}


def for_photographs(config: Config, network: str | None = None) -> Config:
    """``config`` with each augmentation for digits replaced by its counterpart for photographs.

    DeepCluster, where it is that one's config, sees edges instead of colours, as in its paper.

    Args:
        network: replaces the small network, where that is the one set; ``None`` keeps it.

    >>> from clustops.recipes import supervised
    >>> for_photographs(supervised.Config()).strong == augment.PHOTO_STRONG
    True
    """
    named = presets()
    digits = [name for name in named if name.startswith("DIGITS")]
    photo = {named[name]: named[name.replace("DIGITS", "PHOTO")] for name in digits}

    def swapped(value: Any) -> Any:
        return tuple(swapped(part) for part in value) if isinstance(value, tuple) else photo.get(value, value)

    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    changes = {name: swapped(v) for name, v in values.items() if isinstance(v, (tuple, augment.Strength))}
    if "sobel" in values:
        changes["sobel"] = True
    if network is not None and values.get("network") == "small":
        changes["network"] = network
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]
