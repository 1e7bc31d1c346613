"""The options of a run: immutable, and aware of which of them the user gave."""

import copy
import difflib
import os
from argparse import Namespace
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn


class Options:
    """The effective options of a script, read as attributes; nothing can write to them.

    Args:
        values: The value of every option.
        spelled: The flag that gave each option the user gave, as the user spelled it.

    Attributes:
        given: Names of the options that the user gave, on the command line or in a YAML file.
    """

    __slots__ = ('_spelled', '_values')
    __hash__ = None  # type: ignore[assignment]  # as of other mappings

    def __init__(self, values: Mapping[str, Any], spelled: Mapping[str, str] | None = None) -> None:
        object.__setattr__(self, '_values', copy.deepcopy(dict(values)))
        object.__setattr__(self, '_spelled', dict(spelled or {}))

    @property
    def given(self) -> frozenset[str]:
        return frozenset(self._spelled)

    def flag(self, name: str) -> str:
        """The flag of an option as the user spelled it, else its name with dashes."""
        return self._spelled.get(name) or f'--{name.replace("_", "-")}'

    def __getattr__(self, name: str) -> Any:
        if not name.startswith('_') and name in self._values:
            return self._values[name]
        raise AttributeError(f'there is no option {name!r}')

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f'cannot set {name}: options are immutable, use options.replace({name}=...)')

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f'cannot delete {name}: options are immutable')

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._values]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Options) and self._values == other._values

    def __repr__(self) -> str:
        return f'Options({", ".join(f"{name}={value!r}" for name, value in self._values.items())})'

    def __reduce__(self) -> tuple:
        return Options, (self._values, self._spelled)

    def replace(self, **changes: Any) -> 'Options':
        """A copy with other values, a ValueError for an unknown option; `given` is unchanged."""
        for name in changes.keys() - self._values.keys():
            raise ValueError(f'there is no option {name!r}{closest(name, self._values)}')
        return Options({**self._values, **changes}, self._spelled)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of all options, which the caller may change."""
        return copy.deepcopy(self._values)

    def with_data_path(self) -> 'Options':
        """The options with the full path of the dataset, as checkpoints and `args.yaml` keep it."""
        return self.replace(data_dir=os.path.abspath(self.data_dir)) if self.data_dir else self

    def to_namespace(self) -> Namespace:
        """The options as checkpoints store them and as timm's helpers take them."""
        return Namespace(**self.to_dict())


#: Flags of earlier versions, and what to do instead.
REMOVED = {'--head-parallel': 'shard the head with --parallel fsdp'}


def closest(name: str, names: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the closest known one, if any is close."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f', did you mean {close[0]}?' if close else ''
