"""Identities that an app's code names, made safe: from `identify=`, and from `Limiter.acquire`."""

from dataclasses import replace

from ratelimit_mw._internal.live.key_entries import sound_entry
from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from ratelimit_mw._internal.policy.client_address import canonical_address
from ratelimit_mw._internal.policy.identity import HASH, Identity, account_partition, partition_of
from ratelimit_mw._internal.policy.key_entry import KeyEntry
from ratelimit_mw._internal.settings import KeySettings, Settings, SettingsError
from ratelimit_mw._internal.settings.errors import nearest_name


def adopt(identity: Identity, settings: Settings) -> Identity:
    """Return the identity with its name hashed, so that nothing in it is taken for a partition as it is.

    An identity that the package handed out keeps its partition. Raises ValueError for a plan that doesn't
    exist and for overrides that can't be used, and TypeError for what is not an identity.
    """
    _check_types(identity)
    plan = settings.plans.get(identity.plan)
    if plan is None:
        nearest = nearest_name(identity.plan, settings.plans)
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        raise ValueError(f"an Identity names the plan {identity.plan!r}, which doesn't exist{hint}")
    secret = settings.identity.hash_secret.get_secret_value()
    account = identity.account
    if account is None and identity.overrides is not None:
        account = identity.overrides.account
    if identity.partition == identity.counted_as:
        partition = identity.partition
    elif plan.share == "account" and account is not None:
        partition = account_partition(account)
    else:
        partition = partition_of(identity.partition, secret)
    api_key_hash = identity.api_key_hash
    if api_key_hash is not None and not HASH.fullmatch(api_key_hash):
        api_key_hash = hash_api_key(_bytes(api_key_hash), secret)
    limits = identity.limits
    if identity.overrides is not None:
        limits = _limits_of(identity, identity.overrides, account, settings)
    return Identity(
        partition,
        identity.plan,
        api_key_hash,
        account,
        None if identity.address is None else canonical_address(identity.address),
        identity.overrides,
        limits=limits,
        counted_as=partition,
    )


def _limits_of(
    identity: Identity, overrides: KeyEntry, account: str | None, settings: Settings
) -> KeySettings | None:
    """Return the overrides as the settings would have them; None where they leave all to the plan."""
    for name, said, own in (
        ("plan", identity.plan, overrides.plan),
        ("account", account, overrides.account or account),
    ):
        if said != own:
            raise ValueError(f"an Identity's overrides name the {name} {own!r}, but the Identity {said!r}")
    name_hash = hash_api_key(_bytes(identity.partition), settings.identity.hash_secret.get_secret_value())
    try:
        key = sound_entry(replace(overrides, account=account), name_hash, settings)
    except SettingsError as error:
        raise ValueError(f"an Identity's overrides can't be used: {error.problems[0]}") from None
    own_limits = (key.requests, key.units, key.concurrent, key.spending)
    return key if any(each is not None for each in own_limits) else None


def _check_types(identity: object) -> None:
    if not isinstance(identity, Identity):
        raise TypeError(f"the caller must be named by an Identity, not by {type(identity).__name__}")
    for name in ("partition", "plan", "api_key_hash", "account", "address"):
        value = getattr(identity, name)
        if not isinstance(value, str) and (value is not None or name in ("partition", "plan")):
            raise TypeError(f"Identity.{name} must be a string, not {type(value).__name__}")
    overrides: object = identity.overrides
    if not isinstance(overrides, KeyEntry | None):
        raise TypeError(f"Identity.overrides must be a KeyEntry, not {type(overrides).__name__}")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
