"""The settings: what the file and the environment say, checked as a whole.

`Settings.load` reads the TOML file and the environment; `Settings()` is the built-in defaults. What is
wrong comes as one `SettingsError` that lists everything.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler

from ratelimit_mw._internal.settings.backend import BackendSettings
from ratelimit_mw._internal.settings.checks import SoundParts, cross_check, sound_parts
from ratelimit_mw._internal.settings.errors import (
    SettingsError,
    SettingsProblem,
    in_our_words,
    problems_of,
)
from ratelimit_mw._internal.settings.keys import ListedKeys, hash_listed_keys
from ratelimit_mw._internal.settings.networks import AddressSettings
from ratelimit_mw._internal.settings.operations import OperationsSettings
from ratelimit_mw._internal.settings.sources import (
    ENVIRONMENT,
    SECTIONS,
    Environment,
    read_environment,
    read_file,
)
from ratelimit_mw._internal.settings.tables import (
    BUILT_IN_PLANS,
    ApplicationSettings,
    IdentitySettings,
    KeySettings,
    LimitSettings,
    PlanSettings,
    ResponseSettings,
    RouteSettings,
    built_in_plans,
)
from ratelimit_mw._internal.settings.values import Items, PlanName

_BUILT_IN = "built-in defaults"


class Settings(BaseModel):
    """Everything that can be set. Immutable; equal if everything in it is."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        strict=True, extra="forbid", frozen=True, hide_input_in_errors=True, defer_build=True
    )

    shadow: bool = False
    """Decide and report, never refuse. Default: false."""
    paths: Literal["exact", "loose"] = "exact"
    """Spellings of a path that a route's rule is for: "exact", as Starlette's router reads it, or "loose",
    with trailing and double slashes and letters of any case, for routers that run a route for those.
    Default: "exact"."""
    backend: BackendSettings = Field(default_factory=BackendSettings)
    """Backend that keeps the counts."""
    identity: IdentitySettings = Field(default_factory=IdentitySettings)
    """Identification of callers."""
    response: ResponseSettings = Field(default_factory=ResponseSettings)
    """Responses to clients."""
    operations: OperationsSettings = Field(default_factory=OperationsSettings)
    """Usage path and dashboard."""
    application: ApplicationSettings = Field(default_factory=ApplicationSettings)
    """Limits that all callers share."""
    plans: dict[PlanName, PlanSettings] = Field(default_factory=built_in_plans)
    """The limits that callers have, by name; always has "default" and "anonymous"."""
    keys: Items[KeySettings] = ()
    """API keys with a plan, an account or limits of their own."""
    addresses: Items[AddressSettings] = ()
    """Plans of callers who are counted by an address, by network; the longest prefix counts."""
    routes: Items[RouteSettings] = ()
    """Route rules: costs of paths, and limits on top of the plan's; the first match wins."""
    limits: dict[PlanName, LimitSettings] = Field(default_factory=dict)
    """Amounts and switches of limits that the app declares in its code, by their names."""

    _source: str = PrivateAttr(_BUILT_IN)
    _file: str | None = PrivateAttr(None)

    @property
    def source(self) -> str:
        """The file these settings came from; "built-in defaults" if none."""
        return self._source

    @property
    def file(self) -> str | None:
        """Absolute path of the file that says all of this but what the environment does; None where the
        app's own code has a part in it, too.
        """
        return self._file

    @property
    def units(self) -> frozenset[str]:
        """Names of all metered units that anything here limits."""
        limited = [self.application.units, *[plan.units for plan in self.plans.values()]]
        limited += [key.units for key in self.keys if key.units is not None]
        return frozenset([unit for units in limited for unit in units])

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy, with some values replaced; it is then no longer what its file says."""
        copy = super().model_copy(update=update, deep=deep)
        if update:
            copy._file = None  # noqa: SLF001  # its own
        return copy

    def with_backend_of(self, running: "Settings") -> Self:
        """These settings with what applies at restart as in `running`: the backend and the hash secret.

        Under another secret the listed hashes are other ones, so the keys wait with it. Raises
        `SettingsError` where that doesn't fit together.
        """
        values = {name: getattr(self, name) for name in type(self).model_fields}
        values["backend"] = running.backend
        if self.identity.hash_secret != running.identity.hash_secret:
            secret = {"hash_secret": running.identity.hash_secret}
            values["identity"] = self.identity.model_copy(update=secret)
            values["keys"] = running.keys
        kept = type(self)(**values)
        kept._source, kept._file = self._source, self._file  # noqa: SLF001  # its own
        return kept

    def _parts(self) -> SoundParts:
        keys, routes = dict(enumerate(self.keys)), dict(enumerate(self.routes))
        return SoundParts(self.identity, self.plans, keys, routes, dict(enumerate(self.addresses)))

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None) -> Self:
        """Return the settings of the file at `path`, else of the one that `RATELIMIT_SETTINGS` names, else
        the built-in defaults; the environment's values replace those of any of them.

        Raises `SettingsError` with everything that is wrong.
        """
        named = os.environ.get("RATELIMIT_SETTINGS") or None if path is None else os.fspath(path)
        return cls.of_file(named, {} if named is None else read_file(named))

    @classmethod
    def of_file(cls, named: str | None, tables: Mapping[str, Any]) -> Self:
        """Return the settings of a file of this name that has these tables, as `load` does."""
        source = _BUILT_IN if named is None else named
        environment = read_environment(os.environ)
        settings, problems = cls._checked(environment.over(tables))
        problems = [*environment.problems, *(_located(problem, source, environment) for problem in problems)]
        if settings is None or problems:
            raise SettingsError(problems)
        settings.comes_from(named)
        return settings

    def comes_from(self, named: str | None) -> None:
        """Note which file says this, None for the built-in defaults."""
        self._source = _BUILT_IN if named is None else named
        self._file = None if named is None else str(Path(named).absolute())

    @classmethod
    def _checked(cls, values: dict[str, Any]) -> tuple[Self | None, list[SettingsProblem]]:
        try:
            return cls.model_validate(values), []
        except SettingsError as error:
            return None, _in_file_order(list(error.problems), values)

    @model_validator(mode="wrap")
    @classmethod
    def _check_as_a_whole(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, dict):
            return handler(data)
        data, listed = prepared(data)
        settings, problems = None, list(listed.problems)
        try:
            settings = handler(data)
        except ValidationError as error:
            problems += problems_of(in_our_words(error, cls.model_fields), "")
        parts = sound_parts(data) if settings is None else settings._parts()  # noqa: SLF001  # its own
        problems += cross_check(parts, listed)
        if settings is None or problems:
            raise SettingsError(problems)
        return settings


def prepared(data: dict[str, Any]) -> tuple[dict[str, Any], ListedKeys]:
    """Return the tables with the built-in plans and without clear keys."""
    # What is missing is an empty table: the checks of all tables, which exist now, are run on it. Its own
    # class would have to make the same checks once more.
    data = {name: {} for name in (*SECTIONS, "application")} | data
    identity = data["identity"]
    if isinstance(identity, dict):
        secret = identity.get("hash_secret")
    else:
        secret = getattr(identity, "hash_secret", "")
    if isinstance(secret, SecretStr):
        secret = secret.get_secret_value()
    listed = hash_listed_keys(data.get("keys", ()), secret if isinstance(secret, str) else "")
    data["keys"] = listed.entries
    if isinstance(data.setdefault("plans", {}), dict):
        data["plans"] = {**BUILT_IN_PLANS, **data["plans"]}
    return data, listed


def _in_file_order(problems: list[SettingsProblem], data: dict[str, Any]) -> list[SettingsProblem]:
    tables = list(data)

    def order(problem: SettingsProblem) -> tuple[int, int]:
        table, _, rest = problem.path.partition("[")
        table, index = table.partition(".")[0], rest.partition("]")[0]
        entry = int(index) if table in ("keys", "addresses", "routes") and index.isdigit() else 0
        return tables.index(table) if table in tables else len(tables), entry

    return sorted(problems, key=order)


def _located(problem: SettingsProblem, source: str, environment: Environment) -> SettingsProblem:
    """Return the problem with the file it is in, or with the variable that set the value."""
    for path, variable in environment.variables.items():
        rest = problem.path.removeprefix(path)
        if rest != problem.path and rest[:1] in ("", "[", "."):
            return problem._replace(file=ENVIRONMENT, path=variable + rest)
    return problem._replace(file=source)
