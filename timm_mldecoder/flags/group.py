"""What groups of options have in common: immutable, and aware of which of their options the user gave."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

_Group = TypeVar('_Group', bound='Group')


@dataclass(frozen=True)
class Group:
    """A group of options: a field for each, which is a row of the table of flags; see `flags.flag.flag`.

    The options of a script have the fields of all groups, so that they are each of them. The first line of a group's
    docstring is its title in `--help`.
    """

    #: The flag that gave each option the user gave, as the user spelled it.
    spelled: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False, kw_only=True)
    #: The script that they are of, `train` or `validate`.
    script: str = field(default='train', repr=False, kw_only=True)

    @property
    def given(self) -> frozenset[str]:
        """Names of the options that the user gave, on the command line or in a YAML file."""
        return frozenset(self.spelled)

    def flag(self, name: str) -> str:
        """The flag of an option as the user spelled it, else its name with dashes."""
        return self.spelled.get(name) or f'--{name.replace("_", "-")}'

    def replace(self: _Group, **changes: Any) -> _Group:
        """A copy with other values, a ValueError for an unknown option; `given` is unchanged."""
        for name in changes.keys() - vars(self).keys():
            raise ValueError(f'there is no option {name!r}{closest(name, vars(self))}')
        return dataclasses.replace(self, **changes)


#: Flags of earlier versions, and what to do instead.
REMOVED = {'--head-parallel': 'shard the head with --parallel fsdp'}


def closest(name: str, names: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the closest known one, if any is close."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f', did you mean {close[0]}?' if close else ''
