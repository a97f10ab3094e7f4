"""The interface of backends, their errors, and the figures of their work."""

from collections.abc import Callable, Generator, Sequence
from enum import Enum, IntEnum
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.metered import Units
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import Reservation

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Known(Generic[T]):
    """An answer that is known already. Awaiting it waits for nothing."""

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value: T = value

    def __await__(self) -> Generator[None, None, T]:
        yield from ()
        return self.value

    def tell(self, listener: Callable[[T], object]) -> None:
        """Call `listener` with it, now."""
        listener(self.value)


class UnderWay(Protocol[T_co]):
    """An operation that is under way to the backend, or over. Awaiting it waits for the answer."""

    def __await__(self) -> Generator[Any, None, T_co]:
        """Wait for the answer. Raises `BackendError`."""

    def tell(self, listener: "Callable[[T_co | BackendError], object]") -> None:
        """Call `listener` with the answer, or with the error in its place, once that is there: now, if it is.

        In place of awaiting it. The listener must not raise.
        """


class EstimateAction(IntEnum):
    """Action on an estimate when its request has ended. The values are the script's."""

    UNTOUCHED = 0
    KEEP = 1
    GIVE_BACK = 2


class Settlement(Enum):
    """Result of a settle. The values are the script's."""

    UNKNOWN = 0
    """No record: it ended undetached, was given back, or its life is over. Nothing was charged."""
    SETTLED = 1
    REPEATED = 2
    """Settled before with the same amount."""
    DIFFERENT = 3
    """Settled before with another amount, which stands."""


class BackendError(Exception):
    """The backend could not be asked, did not answer in time or refused; nobody was decided about."""


class OperationRefusedError(BackendError):
    """The backend is there, and refused this one operation: a key of another type, no memory."""


WAITS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
"""Seconds by which the calls of a backend are told apart."""


class Load(NamedTuple):
    """Load of a backend's connections: operations carried, and operations that wait."""

    batches: int = 0
    """Calls of the script and plain commands, and in `operations` what they were for."""
    operations: int = 0
    owed: int = 0
    """Releases and settles that wait to be written, and are sent until they arrive."""
    failed: int = 0
    """Operations that the server answered with an error of their own."""
    waited: float = 0.0
    """Seconds that calls took, from the first operation's wait on; all together."""
    waits: tuple[int, ...] = (0,) * (len(WAITS) + 1)
    """Calls by how long they took: up to each of `WAITS`, and longer."""
    mended: int = 0
    """Stored values that could not be true, and were mended."""

    def plus(self, other: "Load") -> "Load":
        """Both together."""
        return Load(
            self.batches + other.batches,
            self.operations + other.operations,
            self.owed + other.owed,
            self.failed + other.failed,
            self.waited + other.waited,
            tuple(map(sum, zip(self.waits, other.waits, strict=True))),
            self.mended + other.mended,
        )


class ReservationStore(Protocol):
    """Store of reservations, from their admission on."""

    async def renew(self, reservation: Reservation, seconds: float) -> bool:
        """Let the slots last `seconds` from now; false where one of them was lost before.

        An estimate that has neither lapsed nor been kept lasts for the own lease of its reservation from now.
        """

    async def renew_all(
        self, renewals: Sequence[tuple[Reservation, float]]
    ) -> "Sequence[bool | BackendError]":
        """Renew many reservations, each for its own time, as one operation. Raises nothing.

        The answer to each, or the reason why there is none.
        """

    def finish(self, reservation: Reservation, action: EstimateAction) -> UnderWay[object]:
        """Free the slots and, unless it was settled, decide about the estimate. Idempotent.

        It is under way when this returns, whatever becomes of the caller; awaiting waits for the backend.
        """

    def settle(self, reservation: Reservation, amount: int, *, replace: bool = False) -> UnderWay[Settlement]:
        """Put the actual price in place of the estimate, in the periods of the admission. Idempotent.

        It is under way when this returns, as `finish` is: so it takes effect before an end that comes later.
        """

    def settle_units(
        self, reservation: Reservation, units: Units, *, replace: bool = False
    ) -> UnderWay[Settlement]:
        """Put what was used of metered units in place of their estimates. Idempotent.

        Of a unit that was settled before the first amount stands, unless `replace` says otherwise. It is
        under way when this returns.
        """

    def give_back(self, charge: Charge, reservation: Reservation, times: Sequence[int]) -> None:
        """Undo an admitted charge: windows by its time or times, the rest by its reservation.

        A charge on several nodes has several times; a time of 0 is not known. To be called once. Waits for
        nothing.
        """

    def hold_estimate(self, reservation: Reservation) -> UnderWay[object]:
        """Hold the estimate until it is settled, whether its lease is renewed or not. Idempotent.

        It is under way when this returns, as `finish` is.
        """


class PendingCharge(Protocol):
    """A charge on its way to a backend."""

    def __await__(self) -> Generator[Any, None, Outcome]:
        """Wait for the outcome. Raises `BackendError`."""

    def give_up(self) -> None:
        """The request was cancelled: undo the charge, whether its outcome is here or still to come."""


class Backend(ReservationStore, Protocol):
    """Store of counts. Every method that fails raises `BackendError` and nothing else."""

    call_observers: list[Callable[[float], None]]
    """Told of each call to a server, in seconds, when its answer is here. They raise nothing."""

    @property
    def load(self) -> Load:
        """Load of the backend's connections: operations carried, and operations that wait."""

    @property
    def is_away(self) -> bool:
        """Whether it is thought to be away; false where it was not asked yet."""

    async def open(self) -> None:
        """Connect ahead of the first request; without it the first request connects."""

    async def close(self) -> None:
        """Send what still waits and close; a closed backend may be opened again."""

    def ask(self, charge: Charge, lease_id: bytes, price: int = 0) -> Outcome | PendingCharge:
        """Charge all of `charge`'s counters, or none: the outcome, or what to await for it."""

    def take_over(self) -> None:
        """Send what event loops that have ended still owed. Waits for nothing."""

    async def acquire(self, charge: Charge, lease_id: bytes, price: int = 0) -> Outcome:
        """Charge all of `charge`'s counters, or none, and wait for the outcome."""

    async def restore(self, charge: Charge, lease_id: bytes, price: int) -> Outcome:
        """Charge slots and allowances that were admitted elsewhere, once however often it is asked for.

        What may have been charged though its answer was lost is not given back: it is asked for again.
        """

    async def peek(self, charge: Charge, price: int = 0) -> Outcome:
        """Answer as `acquire` would, and charge nothing."""

    async def reset(self, charge: Charge) -> None:
        """Forget what was counted under the counters of `charge`."""
