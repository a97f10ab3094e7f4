"""Both writers of one `[response]` table, which change together."""

from ratelimit_mw.settings import ResponseSettings
from ratelimit_mw.wire.headers import HeaderWriter
from ratelimit_mw.wire.refusals import RefusalWriter


class Writers:
    """What writes answers as `response` says."""

    __slots__ = ("headers", "refusals", "response")

    def __init__(self, response: ResponseSettings) -> None:
        self.response = response
        self.headers = HeaderWriter(response)
        self.refusals = RefusalWriter(response)
