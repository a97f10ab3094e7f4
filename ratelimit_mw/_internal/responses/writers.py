"""Writers of answers, for one state of the settings."""

from ratelimit_mw._internal.responses.headers import HeaderWriter
from ratelimit_mw._internal.responses.refusals import RefusalWriter
from ratelimit_mw._internal.settings import Settings


class Writers:
    """Both writers of the `[response]` table, which change together with all else."""

    __slots__ = ("has_own_paths", "headers", "refusals", "settings")

    def __init__(self, settings: Settings) -> None:
        self.settings: Settings = settings
        self.headers: HeaderWriter = HeaderWriter(settings.response)
        self.refusals: RefusalWriter = RefusalWriter(settings.response)
        operations = settings.operations
        self.has_own_paths: bool = operations.usage_path is not None or operations.dashboard_path is not None
        """Whether some requests are answered by the middleware itself."""
