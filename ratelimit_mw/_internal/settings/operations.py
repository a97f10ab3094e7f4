"""The table `[operations]`: what the usage path, the dashboard and its operators go by."""

from typing import Self

from pydantic import (
    SecretStr,
    model_validator,
)

from ratelimit_mw._internal.settings.errors import fault, faults
from ratelimit_mw._internal.settings.values import (
    CallerURL,
    Items,
    Label,
    OptionalPath,
    Table,
)


class OperatorSettings(Table):
    """`[[operations.dashboard_tokens]]`: one operator of the dashboard, whose changes bear this name."""

    name: Label
    """Name of the operator in the list of changes."""
    token: SecretStr
    """Token that opens the dashboard for this operator."""
    changes: bool = False
    """Whether this operator may change plans and counters, if `operations.dashboard_changes` is on.
    Default: false."""


class OperationsSettings(Table):
    """`[operations]`: what operators see."""

    usage_path: OptionalPath = None
    """Path at which a caller reads its own limits and usage, free of charge. Default: off."""
    dashboard_path: OptionalPath = None
    """Path of the dashboard; needs `dashboard_token`. Default: off."""
    dashboard_token: SecretStr = SecretStr("")
    """Token that opens the dashboard, best set as `RATELIMIT_OPERATIONS__DASHBOARD_TOKEN`. Default: none."""
    dashboard_tokens: Items[OperatorSettings] = ()
    """Tokens of operators with names, read-only or writing, beside or in place of `dashboard_token`.
    Default: none."""
    dashboard_changes: bool = False
    """Whether plans and counters can be changed from the dashboard. Default: false."""
    logs_url: CallerURL = None
    """URL of a caller's logs, in which `{caller}` stands for the caller's name: a link on the caller's page
    of the dashboard. Default: none."""

    @model_validator(mode="after")
    def _operators_differ(self) -> Self:
        found, names = [], set[str]()
        tokens = {self.dashboard_token.get_secret_value().strip()}
        for index, operator in enumerate(self.dashboard_tokens):
            path, token = ("dashboard_tokens", index), operator.token.get_secret_value().strip()
            if not token:
                found.append(((*path, "token"), fault("is empty", "a token")))
            elif token in tokens:
                found.append(
                    (
                        (*path, "token"),
                        fault("is also the token of another operator", "a different token for each operator"),
                    )
                )
            if operator.name in names:
                found.append(((*path, "name"), fault("is used twice", "a different name for each operator")))
            tokens.add(token)
            names.add(operator.name)
        if found:
            raise faults(found)
        return self

    @model_validator(mode="after")
    def _dashboard_is_closed(self) -> Self:
        dashboard = self.dashboard_path
        if dashboard is None:
            return self
        if not self.dashboard_token.get_secret_value().strip() and not self.dashboard_tokens:
            raise faults([(("dashboard_token",), fault("is missing", "one, since dashboard_path is set"))])
        if dashboard == "/":
            found = fault("'/' covers the whole app", 'a path such as "/dashboard"')
            raise faults([(("dashboard_path",), found)])
        if f"{self.usage_path}/".startswith(f"{dashboard}/"):
            raise faults([(("usage_path",), fault("lies under dashboard_path", "a path of its own"))])
        return self
