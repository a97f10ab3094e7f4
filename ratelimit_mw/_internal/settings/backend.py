"""The table `[backend]` of the settings file: where counts are kept, and how the server is reached."""

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from ratelimit_mw._internal.model.limits import OnFailure
from ratelimit_mw._internal.settings.errors import fault, faults
from ratelimit_mw._internal.settings.url import BackendURL, SecretURL, may_use_tls, options_of
from ratelimit_mw._internal.settings.url_options import check_tls, kind_of_url
from ratelimit_mw._internal.settings.values import Namespace, OptionalFile, Share, Table

TLS_FILES = {"tls_ca_file": "ssl_ca_certs", "tls_cert_file": "ssl_certfile", "tls_key_file": "ssl_keyfile"}
"""The TLS files among the settings, with redis-py's names for them."""


class BackendSettings(Table):
    """`[backend]`: where counts are kept. Applies at restart."""

    url: BackendURL = SecretURL("memory://")
    """URL of the backend. `memory://` counts in this process alone. `redis://`, `rediss://` (TLS) and
    `unix://` lead to one server, `redis+sentinel://` to the primary that sentinels name, `redis+cluster://`
    to a cluster, each also with `valkey`. Default: "memory://"."""
    namespace: Namespace = "ratelimit"
    """Prefix of every key in the backend: deployments with different ones share no counts. Default:
    "ratelimit"."""
    timeout: Annotated[float, Field(gt=0, le=60, allow_inf_nan=False)] = 0.1
    """Seconds that a request may wait for the backend; connecting itself may take a second. Default: 0.1."""
    on_failure: OnFailure = "local"
    """Decision while the backend is away: "local" lets this process count on its own, "allow" admits
    everything, without headers, and "deny" answers 503. Default: "local"."""
    local_share: Share = 1.0
    """Share of each limit that one process grants under "local", rounded up: with 4 workers, 0.25 keeps their
    sum at the limit. Default: 1.0."""
    tls_ca_file: OptionalFile = None
    """File with the certificates to trust. Default: those of the system."""
    tls_cert_file: OptionalFile = None
    """File with the client certificate; needs `tls_key_file`. Default: none."""
    tls_key_file: OptionalFile = None
    """File with the key of the client certificate. Default: none."""

    @property
    def safe_url(self) -> str:
        """The URL without user, password and query, for logs and messages."""
        return str(self.url)

    @property
    def is_shared(self) -> bool:
        """Whether several processes can count there together."""
        return not self.safe_url.startswith("memory:")

    @property
    def tls_options(self) -> dict[str, str]:
        """The TLS files under redis-py's names for them."""
        return {option: file for name, option in TLS_FILES.items() if (file := getattr(self, name))}

    @property
    def is_encrypted(self) -> bool:
        """Whether connections use TLS: by the URL's scheme, or by TLS options or files for several hosts."""
        url = self.url.get_secret_value()
        if not may_use_tls(url):
            return False
        options = {**options_of(url), **self.tls_options}
        return kind_of_url(url.partition("://")[0]) == "server with TLS" or any(
            name.startswith("ssl_") for name in options
        )

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        files = [name for name in TLS_FILES if getattr(self, name)]
        if files and not may_use_tls(self.safe_url):
            found = fault("has no effect, since the backend's URL has no TLS", 'a URL such as "rediss://…"')
            raise faults([((files[0],), found)])
        if self.tls_cert_file and not self.tls_key_file:
            raise faults([(("tls_key_file",), fault("is missing", "the key of tls_cert_file"))])
        if self.tls_key_file and not self.tls_cert_file:
            raise faults([(("tls_cert_file",), fault("is missing", "the certificate of tls_key_file"))])
        if may_use_tls(self.safe_url):
            self._check_tls(files)
        return self

    def _check_tls(self, files: Sequence[str]) -> None:
        options = options_of(self.url.get_secret_value())
        for name in files:
            if TLS_FILES[name] in options:
                found = fault(f"is set by option '{TLS_FILES[name]}' of the URL, too", "one of the two")
                raise faults([((name,), found)])
        options |= self.tls_options
        try:
            check_tls(options)
        except PydanticCustomError as error:
            raise faults([((files[0] if files else "url",), error)]) from None
