"""The settings: what the file and the environment say, checked as a whole."""

from ratelimit_mw._internal.settings.backend import BackendSettings
from ratelimit_mw._internal.settings.errors import SettingsError, SettingsProblem
from ratelimit_mw._internal.settings.loader import Settings
from ratelimit_mw._internal.settings.networks import AddressSettings
from ratelimit_mw._internal.settings.operations import OperationsSettings
from ratelimit_mw._internal.settings.tables import (
    ApplicationSettings,
    IdentitySettings,
    KeySettings,
    PlanSettings,
    ResponseSettings,
    RouteSettings,
    SpendingSettings,
)
from ratelimit_mw._internal.settings.url import SecretURL

__all__ = [
    "AddressSettings",
    "ApplicationSettings",
    "BackendSettings",
    "IdentitySettings",
    "KeySettings",
    "OperationsSettings",
    "PlanSettings",
    "ResponseSettings",
    "RouteSettings",
    "SecretURL",
    "Settings",
    "SettingsError",
    "SettingsProblem",
    "SpendingSettings",
]
