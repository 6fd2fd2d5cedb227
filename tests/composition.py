"""Hydra's work on ``conf/``, done once per choice of groups: it was most of many tests.

Values of single options are put in by Hydra every time. Files of a test may change, so nothing of
a search path beside ``conf/`` is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository

from cki_rec.cli import CONF

OURS = (f"file://{CONF}", f"file://{CONF.parent}/experiments/", "pkg://hydra.conf", "structured:")
"""Beginnings of places of files that no test changes."""
LOAD, LIST = ConfigRepository.load_config, config_loader_impl.create_defaults_list
MERGE = ConfigLoaderImpl._compose_config_from_defaults_list


@contextmanager
def done_once() -> Iterator[None]:
    """Keep files, lists of defaults and trees of groups that are composed in this block."""
    kept: dict[Any, Any] = {}

    def once(key: Any, make: Callable[[], Any]) -> Any:
        if key not in kept:
            kept[key] = make()
        return kept[key]

    def load_config(repository, config_path):
        key = (config_path, *places(repository))
        if key not in kept:
            result = LOAD(repository, config_path)
            if result is None or not result.path.startswith(OURS):
                return result
            kept[key] = result
        return copy.deepcopy(kept[key])

    def create_defaults_list(repo, config_name, overrides_list, **options):
        groups = [o for o in overrides_list if repo.group_exists(o.key_or_group)]
        if not all(place.startswith(OURS) for place in places(repo)):
            return LIST(repo, config_name, overrides_list, **options)
        choices = [o.input_line for o in groups]
        key = ("defaults", config_name, *places(repo), *choices, *options.items())
        listed = once(key, lambda: LIST(repo, config_name, groups, **options))
        values = [o for o in overrides_list if o not in groups and not o.is_sweep_override()]
        return replace(listed, config_overrides=[*listed.config_overrides, *values])

    def compose(loader, defaults, repo):
        if not all(place.startswith(OURS) for place in places(repo)):
            return MERGE(loader, defaults, repo)
        listed = ((d.config_path, d.parent, d.package, d.is_self) for d in defaults)
        key = ("tree", *places(repo), *listed)
        return copy.deepcopy(once(key, lambda: MERGE(loader, defaults, repo)))

    with hydra_with(load_config, create_defaults_list, compose):
        yield


@contextmanager
def hydra_with(load: Callable, list_defaults: Callable, merge: Callable) -> Iterator[None]:
    """Let Hydra use these functions; ``LOAD``, ``LIST`` and ``MERGE`` are its own."""
    with (
        patch.object(ConfigRepository, "load_config", load),
        patch.object(config_loader_impl, "create_defaults_list", list_defaults),
        patch.object(ConfigLoaderImpl, "_compose_config_from_defaults_list", merge),
    ):
        yield


def places(repository: Any) -> list[str]:
    """Return the places of the files that a repository reads."""
    return [source.full_path() for source in repository.get_sources()]
