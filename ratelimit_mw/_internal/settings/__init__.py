"""The settings: what the file and the environment say, checked as a whole.

- `loader.py`: `Settings`. `sources.py`: the file and the environment. `locations.py`: lines and columns of a
  file.
- `tables.py`, `backend.py`, `operations.py`, `networks.py`, `keys.py`: the tables, each field with its
  meaning.
- `values.py`, `limits.py`, `units.py`, `url.py`, `url_options.py`: single values.
- `checks.py`: checks of several tables. `errors.py`, `findings.py`: what is said of mistakes.
- `schema.py`: the JSON schema. `salvage.py`: the sound part of a wrong file, for operators.
"""

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
