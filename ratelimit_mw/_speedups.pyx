# cython: language_level=3, binding=False
"""Compiled twins of the steps that every request takes, for CPython with a C compiler at installation.

Each does what its twin in Python does, which is where the rules are explained, and is compared with it by
property tests. What is not plain (a duplicate header, a proxy, a window that refuses) answers None, changes
nothing, and is left to the twin. Numbers are 64-bit: quotas are at most a thousand million, and a cost
beyond 2**62 fits into none.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_Copy, PyDict_GetItemWithError
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.pythread cimport (
    NOWAIT_LOCK, WAIT_LOCK, PyThread_acquire_lock, PyThread_allocate_lock, PyThread_free_lock,
    PyThread_get_thread_ident, PyThread_release_lock, PyThread_type_lock,
)
from cpython.ref cimport Py_INCREF, PyObject
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_SET_ITEM
from cython cimport no_gc
from libc.math cimport llrint
from libc.string cimport memcmp, memcpy, memmove

import os
import time  # its clocks are looked up each time, as in Python: tests of apps put others in their place
from asyncio import InvalidStateError, get_running_loop
from itertools import repeat

from ratelimit_mw.room import make_room

ctypedef long long i64

cdef extern from "Python.h":
    ctypedef struct PyTypeObject:
        object (*tp_new)(type, tuple, void *)

cdef extern from *:
    """
    static PyObject *empty_row(PyTypeObject *kind, Py_ssize_t size) {
        PyObject *made = PyType_GenericAlloc(kind, size);
    #if PY_VERSION_HEX >= 0x030E0000
        if (made != NULL) ((PyTupleObject *)made)->ob_hash = -1;  /* tuples remember theirs from 3.14 on */
    #endif
        return made;
    }
    """
    object empty_row(type kind, Py_ssize_t size)

cdef extern from *:
    """
    static long long little_endian(const char *text) {
        unsigned long long found = 0;
        for (int byte = 0; byte < 8; byte++) found |= (unsigned long long)(unsigned char)text[byte] << (8 * byte);
        return (long long)found;
    }
    """
    i64 little_endian(const char *text) noexcept

cdef enum:
    MOST_LIMITS = 8  # of a charge that is counted here; one of more goes the long way

cdef int DEBUG = 10  # logging.DEBUG
cdef i64 NEVER = 1 << 62
cdef i64 SECOND = 1_000_000


cdef inline i64 units(object number) except -1:
    """A cost, as far as it can ever fit."""
    if not isinstance(number, int):
        raise TypeError(f"a cost is a whole number, not {number!r}")
    return NEVER if number > NEVER else number


# the memory backend: counts.py -------------------------------------------------------------------------


cdef class Lock:
    """A lock that the thread which has it may take again, as `threading.RLock`, at next to no cost here."""

    cdef PyThread_type_lock _lock
    cdef long _owner
    cdef Py_ssize_t _depth

    def __cinit__(self):
        self._lock = PyThread_allocate_lock()
        if self._lock is NULL:
            raise MemoryError

    def __dealloc__(self):
        if self._lock is not NULL:
            PyThread_free_lock(self._lock)

    def __enter__(self):
        self.take()

    def __exit__(self, *_):
        self.give()

    cdef void take(self) noexcept:
        cdef long me = PyThread_get_thread_ident()
        if self._depth == 0 or self._owner != me:
            if not PyThread_acquire_lock(self._lock, NOWAIT_LOCK):
                with nogil:  # another thread has it, which may need the interpreter to go on
                    PyThread_acquire_lock(self._lock, WAIT_LOCK)
            self._owner = me
        self._depth += 1

    cdef void give(self) noexcept:
        self._depth -= 1
        if self._depth == 0:
            PyThread_release_lock(self._lock)


cdef class Kept:
    """What a store keeps, and can forget at some time."""

    cdef public bint is_kept, is_used

    def let_go(self):
        """No store has it any more."""
        self.is_kept = False


cdef class Slots(Kept):
    """What is counted of slots."""

    cdef public dict leases

    def __init__(self):
        self.leases = {}


cdef class Log(Kept):
    """An exact sliding window: the time and cost of every live charge, oldest first."""

    cdef readonly i64 length
    cdef i64 _used, _oldest, _newest, _ahead
    cdef i64 *_log  # time, cost, time, cost, ...
    cdef Py_ssize_t _head, _end, _room

    def __cinit__(self, i64 length):
        self.length = length
        self._oldest, self._newest = NEVER, -NEVER

    def __dealloc__(self):
        PyMem_Free(self._log)

    def let_go(self):
        """No store has it any more; a policy may still hold on to it."""
        self.is_kept = False
        PyMem_Free(self._log)
        self._log = NULL
        self._head = self._end = self._room = 0
        self._used, self._ahead, self._oldest, self._newest = 0, 0, NEVER, -NEVER

    @property
    def used(self):
        """Units that are live."""
        return self._used

    def is_dead(self, i64 now):
        """Whether everything counted has left the window."""
        return self._newest + self.length <= now

    def fits(self, limit, i64 now, cost, price, exact):
        """Whether `cost` more units fit, once what has left the window is stepped over."""
        return self.admits(limit.quota, now, units(cost))

    def figures(self, limit, i64 now, cost, price):
        """Units used and the waits, in microseconds, until one leaves and until `cost` fits."""
        cdef i64 needed = self._used + units(cost) - <i64>limit.quota
        reset_after = self._oldest + self.length - now if self._used else 0
        return self._used, reset_after, self._wait(needed, now) if needed > 0 else 0

    def charge(self, limit, i64 now, lease_id, cost, price):
        """Count `cost` units at `now`."""
        self.add(now, units(cost), limit.granule)
        return self._used, self._oldest + self.length - now, 0

    def take_ahead(self, limit, i64 now, cost, i64 ahead):
        """Count `cost` units as used so much later."""
        self._ahead = max(self._ahead, ahead)
        self.add(now + ahead, units(cost), limit.granule)
        return self.figures(limit, now, 0, 0)

    cdef bint admits(self, i64 quota, i64 now, i64 cost) except -1:
        if self._oldest <= now - self.length or self._newest > now:
            self._expire(now)
        return self._used + cost <= quota

    cdef int add(self, i64 now, i64 cost, i64 granule) except -1:
        cdef i64 newest = self._newest
        cdef i64 at = now if now > newest else newest
        if newest == at or (granule > 0 and newest >= 0 and newest // granule == at // granule):
            self._log[self._end - 2] = at
            self._log[self._end - 1] += cost
            if self._oldest == newest:
                self._oldest = self._log[self._head]
        else:
            if self._end == self._room:
                self._grow()
            self._log[self._end], self._log[self._end + 1] = at, cost
            self._end += 2
            if newest < 0:
                self._oldest = at
        self._newest = at
        self._used += cost
        return 0

    cdef int _grow(self) except -1:
        cdef Py_ssize_t room = self._room + (self._room >> 3 & ~1) + 6
        cdef void *grown = PyMem_Realloc(self._log, room * sizeof(i64))
        if grown is NULL:
            raise MemoryError
        self._log, self._room = <i64 *>grown, room
        return 0

    cdef int _expire(self, i64 now) except -1:
        cdef i64 *log = self._log
        cdef i64 horizon = now - self.length
        cdef Py_ssize_t head = self._head, at
        if self._newest <= now:
            self._ahead = 0
        elif self._newest > now + self._ahead:
            # The clock went back.
            for at in range(head, self._end, 2):
                log[at] = min(log[at], now + self._ahead)
        while head < self._end and log[head] <= horizon:
            self._used -= log[head + 1]
            head += 2
        if head > 64 and head * 2 > self._end:
            memmove(log, log + head, (self._end - head) * sizeof(i64))
            self._end -= head
            head = 0
        self._head = head
        if head < self._end:
            self._oldest, self._newest = log[head], log[self._end - 2]
        else:
            self._oldest, self._newest = NEVER, -NEVER
        return 0

    cdef i64 _wait(self, i64 needed, i64 now) noexcept:
        cdef Py_ssize_t at
        for at in range(self._head, self._end, 2):
            needed -= self._log[at + 1]
            if needed <= 0:
                return self._log[at] + self.length - now
        return self.length


# leases: lease.py ---------------------------------------------------------------------------------------


cdef class LeaseState:
    """What is remembered of each lease."""

    cdef public RenewalsState renewals
    cdef public object hold, backend, give_up_at, repeats, token, _leases
    cdef public double renew_at
    cdef public bint is_detached, is_ended, is_lost
    cdef object _made
    cdef Prepared _ready
    cdef i64 _now
    cdef i64 _row[3 * MOST_LIMITS]

    def __init__(self, leases, hold, backend, decided):
        self.token = ""
        self._leases, self.hold, self.backend, self._made = leases, hold, backend, decided

    @property
    def _decided(self):
        """The decision, or the admission before anybody asks how its limits stand."""
        cdef Prepared ready = self._ready
        if self._made is None and ready is not None:
            numbers = tuple([self._row[at] for at in range(3 * len(ready.steps))])
            outcome = row(ready.gate._outcome, True, self._now, numbers, self.hold)
            self._made = row(ready.gate._admission, ready.policy, ready.charge, outcome, 0)
        return self._made

    @_decided.setter
    def _decided(self, decided):
        self._made = decided


cdef class RenewalsState:
    """What is looked at for each lease."""

    cdef public dict leases
    cdef public double covers


cdef class LiveState:
    """What is looked at for each request."""

    cdef public object rules, resolver
    cdef public set ready


# a plain request's whole way: middleware.py, limiter.py, memory.py, redis.py, renewals.py ---------------


cdef class Spot:
    """Where one limit of a charge is counted in this process, whoever it is counted for."""

    cdef object store
    cdef bint is_window
    cdef i64 quota, granule, length, life


cdef class Reach:
    """One of the caller's own windows, where its figures begin, and the header that says its quota."""

    cdef Py_ssize_t at
    cdef i64 quota, length
    cdef tuple header


cdef class Shape:
    """What charges have in common that differ in their partitions alone, which `names` has of one of them."""

    cdef object backend
    cdef list spots, reaches, names, steps


cdef class PolicyState:
    """What changes about a policy."""

    cdef public i64 admitted
    cdef public dict refused
    cdef public Prepared ready
    cdef public bint is_latest


def count_one(dict counts, kind):
    """Add one to a count, while no other thread runs."""
    counts[kind] = counts.get(kind, 0) + 1


cdef class Prepared:
    """What all requests of a plain policy have in common."""

    cdef Gate gate
    cdef PolicyState policy
    cdef object charge, slots, template, release, stock, lease_seconds
    cdef double lease
    cdef bint has_max_hold
    cdef i64 cost
    cdef list spots, reaches
    cdef list steps  # by how much each limit's figure grows with a request
    cdef list states  # as they were found last, so that who finds them kept needs no name
    cdef tuple names


cdef class Gate:
    """Lets plain requests in: those without a price, over HTTP."""

    cdef LiveState _live
    cdef object _limiter, _leases, _backend, _middleware, _rules, _writer, _refusals, _steady, _is_logged
    cdef object _clock
    cdef Lock _lock
    cdef object _nothing, _no_id, _slots, _touch, _on_orphan
    cdef type _lease, _admission, _outcome, _hold, _slot_set, _kept
    cdef dict _renewals, _refused, _batchers
    cdef set _loops
    cdef tuple _own_paths
    cdef Shortcut _shortcut
    cdef bint _counts_here, _asks, _goes_by_wall_clock, _is_plain, _is_unix
    cdef readonly i64 active
    """Requests inside the app."""

    def __init__(self, middleware, dict known):
        cdef object limiter = middleware.limiter
        self._middleware, self._limiter, self._backend = middleware, limiter, limiter.backend
        self._leases = limiter.leases
        self._live, self._loops = limiter.live, limiter.live.ready
        self._touch, self._renewals = limiter.tally.touch, limiter.leases.renewals
        self._refused, self._steady = limiter.refusals.kept, limiter.refusals.now
        self._is_logged, self._kept = known["is_logged"], known["kept"]
        self._lease, self._admission = known["lease"], known["admission"]
        self._outcome, self._hold = known["outcome"], known["hold"]
        self._nothing, self._no_id = known["nothing"], known["no_id"]
        self._counts_here, self._asks = known["counts_here"], known["asks"]
        self._slot_set = known["slot_set"]
        if self._counts_here:
            self._lock = self._backend.lock
            self._clock, self._slots = self._backend.clock, self._backend.slots
            self._goes_by_wall_clock = self._clock is known["wall_clock"]
        elif self._asks:
            self._batchers, self._on_orphan = self._backend.batchers, self._backend.on_orphan

    def enter(self, connection, send):
        """A `Passage`, or the two messages of a refusal that is repeated; None, and nothing done, where a
        request has to go the long way.
        """
        cdef dict scope
        cdef Passage passage
        cdef Prepared ready
        cdef Shortcut shortcut
        cdef PolicyState policy
        cdef LeaseState lease = None
        cdef Operation operation = None
        cdef double sent = 0
        if type(connection) is not dict:
            return None
        scope = <dict>connection
        if scope["type"] != "http" or self._limiter.observers is not None or self._live.resolver is not None:
            return None
        loop, rules, state = get_running_loop(), self._live.rules, scope.get("state")
        if loop not in self._loops or (rules is not self._rules and not self._adopt(rules)):
            return None
        if state is not None and "ratelimit" in state:
            return None
        for own in self._own_paths:
            if scope["path"].startswith(own):
                return None
        shortcut = self._shortcut  # its own: other rules may come in force meanwhile, in another thread
        policy = shortcut.find(scope)
        if policy is None:
            return None
        ready = policy.ready
        if ready is None or ready.gate._backend is not self._backend:
            ready = self._prepare(policy)
            if ready is None:
                return None
        if self._counts_here:
            lease = self._decide(ready, loop)
        elif ready.charge in self._refused:
            return self._repeat(ready, loop)
        else:
            if ready.stock is not None:
                lease = self._spend(ready, loop)
            if lease is None and self._asks:
                sent = self._steady()
                operation = self._ask(ready, loop)
        if lease is None and operation is None:
            return None
        passage = Passage.__new__(Passage)
        passage._gate, passage._ready, passage._loop, passage._send = self, ready, loop, send
        passage._scope, passage._operation, passage._sent_at = scope, operation, sent
        passage._writer, passage._writes_plainly, passage._is_unix = self._writer, self._is_plain, self._is_unix
        passage.status = 500  # what a server answers where the app says nothing
        if lease is not None:
            passage._let(lease)
        self.active += 1
        return passage

    cdef bint _adopt(self, rules) except -1:
        """Go by other rules from now on; false where the middleware doesn't go by them yet."""
        writers = self._middleware.writers
        if rules.shortcut is None or writers.settings is not rules.settings:
            return False
        operations = writers.settings.operations
        own = (operations.dashboard_path, operations.usage_path)
        self._own_paths = tuple([path for path in own if path is not None])
        self._shortcut, self._writer, self._refusals = rules.shortcut, writers.headers, writers.refusals
        self._is_plain, self._is_unix = writers.headers.is_plain, writers.headers.is_unix
        self._rules = rules
        return True

    cdef tuple _repeat(self, Prepared ready, loop):
        """A refusal met again, as `Limiter.repeat` and `RefusalWriter.again` answer it; None where they may not,
        or would say another.
        """
        cdef object refused = self._refused.get(ready.charge), kind
        cdef dict counted
        cdef Outbox outbox = self._batchers.get(loop) if self._asks else None
        cdef double now = self._steady()
        cdef object kept, response
        cdef list headers
        cdef i64 age, wait
        cdef PyObject *number
        if refused is None or now >= <double>refused.until or self._is_logged(DEBUG):
            return None
        if outbox is not None and outbox._error is not None:
            return None  # what is said while the backend is away, the settings say
        kept, kind = refused.answer, refused.kind
        if (ready.stock is not None and ready.stock.block is not None) or type(kept) is not self._kept:
            return None
        age = llrint((now - <double>refused.received) * SECOND)
        if item(kept, 0) is not self._refusals or age >= <i64>item(kept, 4):
            return None
        response = item(kept, 1)  # status, headers, body
        headers = (<list?>item(response, 1)).copy()
        wait = -(-(<i64>item(kept, 3) - age) // 1000)
        headers[<Py_ssize_t>item(kept, 2)] = (b"retry-after-ms", digits(wait if wait > 1 else 1))
        # Nothing else runs between these lines, so what another thread adds up is never half counted.
        counted = ready.policy.refused
        number = NULL if counted is None else PyDict_GetItemWithError(counted, kind)
        if number is NULL:
            self._limiter.tally.refuse(ready.policy, kind)
        else:
            counted[kind] = <object>number + 1
        start = {"type": "http.response.start", "status": item(response, 0), "headers": headers}
        return start, {"type": "http.response.body", "body": item(response, 2)}

    cdef Prepared _prepare(self, PolicyState policy):
        """What its requests have in common; None where they are not plain."""
        cdef Prepared ready
        cdef Shape shape
        cdef object charge = (<object>policy).charge, model, last = None, name, own_name = None
        if not (<object>policy).is_plain:
            return None
        model = charge if charge.like is None else charge.like
        shape = self._shape_of(model)
        if shape is None:
            return None
        ready = Prepared.__new__(Prepared)
        ready.spots, ready.reaches, ready.steps = shape.spots, shape.reaches, shape.steps
        if self._counts_here:
            names = []
            for name in shape.names:
                if name is not last:
                    last, own_name = name, (charge.partition_of(name[0]), name[1])
                names.append(own_name)
            ready.names, ready.states = tuple(names), [None] * len(names)
        elif self._asks:
            ready.template = self._backend.prepare(charge)
        ready.gate, ready.policy, ready.charge, ready.stock = self, policy, charge, (<object>policy).stock
        ready.slots, ready.lease, ready.cost = charge.slots or None, charge.lease, charge.cost
        ready.lease_seconds = charge.lease
        ready.has_max_hold = charge.max_hold is not None
        policy.ready = ready
        return ready

    cdef Shape _shape_of(self, charge):
        """What charges have in common that are made from this one; None where they are not plain."""
        cdef Shape shape = charge.shape
        cdef Spot spot
        cdef Reach reach
        cdef object last = None
        if shape is not None and shape.backend is self._backend:
            return shape
        if len(charge.counters) > MOST_LIMITS:
            return None
        shape = Shape.__new__(Shape)
        shape.backend, shape.spots, shape.reaches, shape.names = self._backend, [], [], []
        shape.steps = charge.steps
        if self._counts_here:
            for store, name, limit, _ in self._backend.prepare(charge, 0).places:
                spot = Spot.__new__(Spot)
                spot.store = store
                spot.is_window = store is not self._slots
                if spot.is_window:
                    spot.quota, spot.granule, spot.length = limit.quota, limit.granule, limit.length
                else:
                    spot.quota, spot.life = limit.limit, int(limit.lease * SECOND)
                last = last if name == last else name
                shape.names.append(last)
                shape.spots.append(spot)
        for at, window in charge.windows:
            reach = Reach.__new__(Reach)
            reach.at, reach.quota, reach.length = at, window.quota, window.length
            reach.header = (b"x-ratelimit-limit", digits(reach.quota))
            shape.reaches.append(reach)
        charge.shape = shape
        return shape

    cdef LeaseState _decide(self, Prepared ready, loop):
        """Charge windows and slots; None, and nothing charged, where one refuses."""
        self._lock.take()
        try:
            return self._charge(ready, loop)
        finally:
            self._lock.give()

    cdef LeaseState _charge(self, Prepared ready, loop):
        cdef i64 now = <i64>time.time_ns() // 1000 if self._goes_by_wall_clock else <i64>self._clock()
        cdef Spot spot
        cdef LeaseState lease
        cdef Kept state
        cdef Log log
        cdef dict leases
        cdef bint has_new = False
        cdef i64 *figures
        cdef Py_ssize_t at, size = len(ready.spots)
        for at in range(size):
            spot, state = <Spot>ready.spots[at], <Kept>ready.states[at]
            if state is None or not state.is_kept:
                state = self._state_of(ready, spot, at)
                has_new = has_new or not state.is_kept
            if spot.is_window:
                if not (<Log>state).admits(spot.quota, now, ready.cost):
                    return None
            elif len((<Slots>state).leases) >= spot.quota:
                return None
        lease_id = self._no_id if ready.slots is None else new_lease_id()
        lease = self._new_lease()
        for at in range(size):
            spot, state = <Spot>ready.spots[at], <Kept>ready.states[at]
            figures = lease._row + 3 * at
            if spot.is_window:
                log = <Log>state
                log.add(now, ready.cost, spot.granule)
                figures[0], figures[1] = log._used, log._oldest + log.length - now
            else:
                leases = (<Slots>state).leases
                leases[lease_id] = now + spot.life
                figures[0], figures[1] = len(leases), 0
            figures[2] = 0
            state.is_used = True
        if has_new:  # last: who is refused leaves nothing behind, and a set that holds nothing may go
            for at in range(size):
                if not (<Kept>ready.states[at]).is_kept:
                    (<Spot>ready.spots[at]).store.add(ready.names[at], ready.states[at], now)
        return self._admitted(lease, ready, now, self._hold_of(ready, lease_id), loop)

    cdef Kept _state_of(self, Prepared ready, Spot spot, Py_ssize_t at):
        """How a limit stands, as its store has it, or else a new state that no store has yet."""
        cdef PyObject *found = PyDict_GetItemWithError(spot.store, ready.names[at])
        cdef Kept state
        if found is not NULL:
            state = <Kept?><object>found
        elif spot.is_window:
            state = Log(spot.length)
        else:
            state = self._slot_set()
        if not isinstance(state, Log if spot.is_window else Slots):
            raise TypeError(f"{ready.names[at]!r} is counted as {type(state)!r}")
        ready.states[at] = state
        return state

    cdef LeaseState _spend(self, Prepared ready, loop):
        """Spend units that were taken ahead, as `Prefetch.spend` does; None where there are none."""
        cdef object prefetch = self._limiter.prefetch, block = ready.stock.block, outcome
        cdef i64 left, age, unspent, used, reset_after
        cdef double now
        cdef Py_ssize_t at = 0
        cdef LeaseState lease
        if block is None:
            return None
        left = next(block.units, -1)
        # The clock after the unit: whatever pauses this process before it is seen.
        now = prefetch.now()
        if left < 0 or now >= <double>block.until or block.era is not prefetch.era:
            ready.stock.after(block)  # and another may be in hand
            outcome = prefetch.spend(ready.stock)
            if outcome is None:
                return None
            lease = self._new_lease()
            for each in outcome[2]:
                lease._row[at] = each
                at += 1
            return self._admitted(lease, ready, outcome[1], self._nothing, loop)
        if left == <i64>block.low:
            prefetch.take(ready.stock, now)
        age, unspent = <i64>((now - <double>block.received) * SECOND), left * ready.cost
        lease = self._new_lease()
        for each in <list?>block.figures:
            used, reset_after = <tuple?>each
            lease._row[at], lease._row[at + 1], lease._row[at + 2] = used - unspent, reset_after - age, 0
            at += 3
        return self._admitted(lease, ready, <i64>block.decided + age, self._nothing, loop)

    cdef object _hold_of(self, Prepared ready, lease_id):
        cdef object made
        if ready.slots is None:
            return self._nothing
        made = empty_row(self._hold, 6)
        put(made, 0, lease_id)
        put(made, 1, ready.slots)
        put(made, 2, ())
        put(made, 3, ready.lease_seconds)
        put(made, 4, 0)
        put(made, 5, "USD")
        return made

    cdef Operation _ask(self, Prepared ready, loop):
        """The charge on its way to the server; None where nothing is connected yet."""
        cdef Outbox outbox = self._batchers.get(loop)
        cdef Operation operation
        if outbox is None:
            return None
        lease_id = self._no_id if ready.slots is None else new_lease_id()
        operation = Operation.__new__(Operation)
        operation.template, operation.id = ready.template, lease_id
        operation.orphaned, operation.takes_told = self._on_orphan, True
        operation.about = (ready.charge, lease_id, self._hold_of(ready, lease_id))
        operation.future = outbox._new_future()
        submit(outbox, operation)
        return operation

    cdef inline LeaseState _new_lease(self):
        return (<PyTypeObject *>self._lease).tp_new(self._lease, (), NULL)

    cdef LeaseState _admitted(self, LeaseState lease, Prepared ready, i64 now, hold, loop):
        cdef RenewalsState renewals
        ready.policy.admitted += 1
        if ready.policy.admitted == 1:
            self._touch(ready.policy)
        lease._leases, lease.hold, lease.backend = self._leases, hold, self._backend
        lease._ready, lease._now, lease.token = ready, now, ""
        if hold is not self._nothing:
            renewals = self._renewals.get(loop)
            if renewals is None or ready.has_max_hold or ready.lease < renewals.covers:
                self._leases.keep(lease, ready.charge)
            else:
                lease.renew_at = <double>time.monotonic() + ready.lease / 3
                lease.renewals = renewals
                renewals.leases[item(hold, 0)] = lease
        return lease

    cdef bint _end(self, LeaseState lease, loop) except -1:
        """End a lease as `Limiter.end` does; false, and nothing done, where that has to."""
        cdef object hold = lease.hold, slots, lease_id
        if lease.is_ended or lease.is_detached:
            return False
        if hold is self._nothing:
            lease.is_ended = True
            return True
        if type(hold) is not self._hold:
            return False
        lease_id, slots = item(hold, 0), item(hold, 1)
        if lease._ready is None or not slots or item(hold, 2):  # money goes the long way
            return False
        if self._counts_here:
            self._free(lease._ready, lease_id)
        elif not (self._asks and self._release(lease._ready, lease_id, loop)):
            return False
        lease.is_ended = True
        if lease.renewals is not None:
            lease.renewals.leases.pop(lease_id, None)
        return True

    cdef int _free(self, Prepared ready, lease_id) except -1:
        cdef Kept state
        cdef Spot spot
        cdef Py_ssize_t at
        self._lock.take()
        try:
            for at in range(len(ready.spots)):
                spot, state = <Spot>ready.spots[at], <Kept>ready.states[at]
                if not spot.is_window:
                    if state is None or not state.is_kept:
                        state = self._state_of(ready, spot, at)
                    (<Slots>state).leases.pop(lease_id, None)
        finally:
            self._lock.give()
        return 0

    cdef bint _release(self, Prepared ready, lease_id, loop) except -1:
        cdef Outbox outbox = self._batchers.get(loop)
        cdef Operation operation
        if outbox is None:
            return False
        if ready.release is None:
            ready.release = self._backend.release_of(ready.charge)
        operation = Operation.__new__(Operation)
        operation.template, operation.id, operation.must_arrive = ready.release, lease_id, True
        submit(outbox, operation)
        return True


cdef class Passage:
    """A request that was let in, as the `send` of its app: adds headers when the response starts, remembers
    its status, and lets others have a turn.
    """

    cdef Gate _gate
    cdef Prepared _ready
    cdef Operation _operation
    cdef LeaseState _lease
    cdef object _loop, _send, _writer
    cdef dict _scope
    cdef double _sent_at
    cdef bint _writes_plainly, _is_unix
    cdef int _sent
    cdef readonly object status

    @property
    def asked(self):
        """The answer of the backend; None where the request was let in at once."""
        return None if self._operation is None else self._operation.future

    def answered(self, Told told not None):
        """The refused lease; None where the request is let in."""
        return self._unless_refused(self._lease_of(told))

    def unanswered(self):
        """The same where the backend is away."""
        policy, charge = self._ready.policy, self._ready.charge
        return self._unless_refused(self._gate._limiter.without_backend(policy, charge, 0, None))

    def give_up(self):
        """The request was cancelled before its answer was read."""
        self._gate._backend.give_up(self._operation)

    cdef LeaseState _unless_refused(self, LeaseState lease):
        if lease._ready is None and not lease.allowed:
            return lease
        self._let(lease)
        return None

    cdef LeaseState _lease_of(self, Told told):
        cdef Gate gate = self._gate
        cdef Prepared ready = self._ready
        cdef LeaseState lease
        if not told.is_admitted():
            return gate._limiter.answered(ready.policy, ready.charge, told.outcome(), 0, self._sent_at)
        ready.charge.told = told
        if gate._refused:
            gate._limiter.refusals.admitted(ready.charge)
        lease = gate._new_lease()
        told.write(lease._row, len(ready.steps))
        lease = gate._admitted(lease, ready, told.now, self._operation.about[2], self._loop)
        if ready.stock is not None:
            gate._limiter.look_ahead(ready.policy, ready.charge)
        return lease

    cdef int _let(self, LeaseState lease) except -1:
        cdef PyObject *state = PyDict_GetItemWithError(self._scope, "state")
        self._lease = lease
        if state is NULL or <object>state is None:
            self._scope["state"] = {"ratelimit": lease}
        else:
            (<object>state)["ratelimit"] = lease
        return 0

    def leave(self):
        """The request is over: as `Limiter.end`."""
        self._gate.active -= 1
        if self._lease is not None and not self._gate._end(self._lease, self._loop):
            self._gate._leases.end(self._lease, failed=self.status >= 400)

    def __call__(self, message):
        """As `send`."""
        kind = message["type"]
        if kind == "http.response.start":
            self.status = message["status"]
            message = self._with_headers(message)
        self._sent += 1
        if self._sent % 16 == 0:
            from ratelimit_mw.wire.sender import send_and_yield
            return send_and_yield(self._send, message)
        return self._send(message)

    cdef object _with_headers(self, message):
        cdef list ours, present
        cdef dict changed
        cdef PyObject *found
        if self._writes_plainly and self._lease._ready is not None:
            ours = self._headers()
        else:
            ours = self._writer.of_lease(self._lease)
        if not ours:
            return message
        changed = PyDict_Copy(message) if type(message) is dict else dict(message)
        found = PyDict_GetItemWithError(changed, "headers")
        if found is NULL:
            present = []
        else:
            present = <list><object>found if type(<object>found) is list else list(<object>found)
        if tells_of_limits(present):
            from ratelimit_mw.wire.headers import add_headers
            changed["headers"] = add_headers(present.copy(), ours)
        else:
            changed["headers"] = present + ours
        return changed

    cdef list _headers(self):
        """The `X-RateLimit-*` of the window under which the fewest more requests fit."""
        cdef i64 left, fewest = 0, reset
        cdef Reach reach, best = None
        cdef LeaseState lease = self._lease
        for each in self._ready.reaches:
            reach = <Reach>each
            left = (reach.quota - lease._row[reach.at]) // self._ready.cost
            if best is None or left < fewest or (left == fewest and reach.length > best.length):
                best, fewest = reach, left
        if best is None:
            return []
        reset, left = lease._row[best.at + 1], best.quota - lease._row[best.at]
        if self._is_unix:
            reset += lease._now
        return [
            best.header,
            (b"x-ratelimit-remaining", digits(left if left > 0 else 0)),
            (b"x-ratelimit-reset", digits(-(-reset // SECOND))),
        ]


@no_gc
cdef class Template:
    """All of an operation but its id."""

    cdef readonly bytes keys, head
    cdef readonly Py_ssize_t n_keys
    cdef readonly object unpack
    cdef public list steps
    cdef public str charges
    cdef bytes _body

    def __init__(self, bytes keys, Py_ssize_t n_keys, bytes body, Py_ssize_t id_size=0, unpack=bytes, bytes head=None):
        self.keys, self.n_keys, self.unpack, self._body = keys, n_keys, unpack, body
        self.head = head or b"$%d\r\n%b" % (len(body) + id_size, body)

    def several(self, ids):
        """The argument that stands for an operation of each id."""
        body = b"".join((self._body, *ids))
        return b"$%d\r\n%b\r\n" % (len(body), body)

    def unpack_several(self, answer, number):
        """What an answer to so many operations says of each, in their order."""
        return repeat(self.unpack(answer), number)


cdef class Operation:
    """One operation of a batch: a template and an id, empty where the template leaves none open."""

    cdef public Template template
    cdef public bytes id
    cdef public object orphaned, about, future, result
    cdef public double since
    cdef public bint must_arrive, is_asking, is_once
    cdef public int tries
    cdef bint takes_told  # whether its answer is wanted as it was told

    def __init__(self, template, own_id=b""):
        self.template, self.id = template, own_id

    def __await__(self):
        if self.future is None:
            self.future = get_running_loop().create_future()
            if isinstance(self.result, Exception):
                self.future.set_exception(self.result)
            elif self.result is not None:
                self.future.set_result(self.result)
        return self.future.__await__()

    @property
    def is_over(self):
        """Whether it was answered, has failed, or nobody waits for it any more."""
        return self.result is not None if self.future is None else self.future.done()

    def answer(self, answer):
        """What came of it."""
        self.settle(answer)

    cdef int settle(self, answer) except -1:
        if self.future is None:
            self.result = answer
            return 0
        try:
            self.future.set_result(answer)
        except InvalidStateError:
            if self.orphaned is not None:
                self.orphaned(self.about, *answer)
        return 0

    def fail(self, error):
        """Nothing came of it."""
        if self.future is None:
            self.result = error
        elif not self.future.done():
            self.future.set_exception(error)


cdef class Told:
    """What the script says of one charge, read when somebody looks. As a pair: when, and the numbers."""

    cdef i64 now
    cdef bytes answer
    cdef list steps
    cdef Py_ssize_t place  # among the charges that were decided as one; below 0 where it was decided alone

    cdef bint is_admitted(self) noexcept:
        return PyBytes_AS_STRING(self.answer)[0] == 1 if self.place < 0 else self.place < self.admitted()

    cdef Py_ssize_t admitted(self) noexcept:
        """How many of those that were decided as one."""
        cdef const unsigned char *end = <const unsigned char *>PyBytes_AS_STRING(self.answer)
        end += PyBytes_GET_SIZE(self.answer) - 2
        return end[0] | end[1] << 8

    cdef int write(self, i64 *row, Py_ssize_t limits) except -1:
        """As `Packed.unpack_several` says: the figures are those after the last one."""
        cdef const char *text = PyBytes_AS_STRING(self.answer) + 1
        cdef Py_ssize_t at
        for at in range(3 * limits):
            row[at] = little_endian(text + 8 * at)
        if self.place >= 0 and self.is_admitted():
            for at in range(limits):
                row[3 * at] -= (self.admitted() - 1 - self.place) * <i64>self.steps[at]
                row[3 * at + 2] = 0
        return 0

    cdef tuple numbers(self):
        cdef Py_ssize_t limits = len(self.steps), at
        cdef bytes room = PyBytes_FromStringAndSize(NULL, 24 * limits)
        cdef i64 *row = <i64 *>PyBytes_AS_STRING(room)
        self.write(row, limits)
        return tuple([row[at] for at in range(3 * limits)])

    def outcome(self):
        """As an `Outcome` that holds nothing: it is remembered, and a hold is not."""
        from ratelimit_mw.charge import NOTHING_HELD, Outcome
        return Outcome(self.is_admitted(), self.now, self.numbers(), NOTHING_HELD)

    def __iter__(self):
        return iter((self.now, (int(self.is_admitted()), *self.numbers())))


cdef class Outbox:
    """What `Batcher.submit` looks at for each operation."""

    cdef public list _queue
    cdef public object _error, _time, _new_future
    cdef public bint _is_closed, _flush_is_due


cdef int submit(Outbox outbox, Operation operation) except -1:
    """As `Batcher.submit`, which does what is not plain itself."""
    if outbox._is_closed or outbox._error is not None or len(outbox._queue) >= 1000:
        (<object>outbox).submit(operation)
        return 0
    operation.since = outbox._time()
    outbox._queue.append(operation)
    if not outbox._flush_is_due:
        (<object>outbox)._schedule()
    return 0


def take(list queue, Py_ssize_t most):
    """Up to so many operations from the front of a queue, without those that are over."""
    cdef list batch = []
    cdef Operation operation
    cdef Py_ssize_t at = 0
    while at < len(queue) and len(batch) < most:
        operation = <Operation?>queue[at]
        at += 1
        if operation.must_arrive or not operation.is_over:
            batch.append(operation)
    del queue[:at]
    return batch


def compose(list batch):
    """A batch by template, and in the Redis protocol: how many keys, the keys, the operations; and whether two
    charges may have a key in common.
    """
    cdef dict places = {}
    cdef set charged = set()
    cdef list groups = [], members, several = []
    cdef Operation operation
    cdef Template template
    cdef PyObject *found
    cdef Py_ssize_t n_keys = 0, keys_size = 0, size = 0, charges = 0, at
    cdef bytes keys, arguments, argument
    cdef char *into
    cdef bint is_shared = False
    for each in batch:
        operation = <Operation?>each
        found = PyDict_GetItemWithError(places, operation.template)
        if found is NULL:
            members = [operation]
            places[operation.template] = members
            groups.append(members)
        else:
            (<list>found).append(operation)
    for each in groups:
        members = <list>each
        operation = <Operation>members[0]
        template = operation.template
        n_keys += template.n_keys
        keys_size += PyBytes_GET_SIZE(template.keys)
        if template.charges is None:
            is_shared = True
        elif template.charges:
            charges += 1
            charged.add(template.charges)
        if len(members) == 1:
            size += PyBytes_GET_SIZE(template.head) + PyBytes_GET_SIZE(operation.id) + 2
        else:
            argument = template.several([(<Operation>member).id for member in members])
            several.append(argument)
            size += PyBytes_GET_SIZE(argument)
    keys = PyBytes_FromStringAndSize(NULL, keys_size)
    into = PyBytes_AS_STRING(keys)
    for each in groups:
        into = put_bytes(into, (<Operation>(<list>each)[0]).template.keys)
    arguments = PyBytes_FromStringAndSize(NULL, size)
    into, at = PyBytes_AS_STRING(arguments), 0
    for each in groups:
        members = <list>each
        if len(members) == 1:
            operation = <Operation>members[0]
            into = put_bytes(put_bytes(into, operation.template.head), operation.id)
            into[0], into[1] = 13, 10
            into += 2
        else:
            into = put_bytes(into, <bytes>several[at])
            at += 1
    return groups, n_keys, keys, arguments, is_shared or len(charged) < charges


cdef inline char *put_bytes(char *into, bytes data) noexcept:
    memcpy(into, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
    return into + PyBytes_GET_SIZE(data)


def hand_out(list groups, now, list answers):
    """Tell operations what came of each; those that failed, and the reason, are left to the caller."""
    cdef list members, failed = []
    cdef Template template
    cdef Operation operation
    cdef Told told
    cdef bytes answer
    cdef Py_ssize_t at, place
    for at in range(len(groups)):
        members, answer = <list>groups[at], <bytes?>answers[at]
        template = (<Operation>members[0]).template
        if PyBytes_GET_SIZE(answer) and PyBytes_AS_STRING(answer)[0] == 69:  # E
            failed.append((members, answer[1:]))
        elif template.steps is not None:
            if PyBytes_GET_SIZE(answer) != 1 + 24 * len(template.steps) + (2 if len(members) > 1 else 0):
                raise ValueError(f"an answer of {len(answer)} bytes to {len(members)} charges")
            for place in range(len(members)):
                operation = <Operation>members[place]
                told = Told.__new__(Told)
                told.now, told.answer, told.steps = now, answer, template.steps
                told.place = place if len(members) > 1 else -1
                operation.settle(told if operation.takes_told else tuple(told))
        elif template.unpack is bytes:
            result = (now, answer)
            for each in members:
                (<Operation>each).settle(result)
        elif len(members) == 1:
            (<Operation>members[0]).settle((now, template.unpack(answer)))
        else:
            for operation, each in zip(members, template.unpack_several(answer, len(members)), strict=True):
                (<Operation>operation).settle((now, each))
    return failed


cdef object row(type kind, a, b, c, d):
    """A named tuple of four."""
    cdef object made = empty_row(kind, 4)
    put(made, 0, a)
    put(made, 1, b)
    put(made, 2, c)
    put(made, 3, d)
    return made


cdef inline object item(object row, Py_ssize_t at):
    return <object>PyTuple_GET_ITEM(row, at)


cdef inline void put(object made, Py_ssize_t at, object value) noexcept:
    Py_INCREF(value)
    PyTuple_SET_ITEM(made, at, value)


cdef list fresh_ids = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=fresh_ids.clear)


cpdef bytes new_lease_id():
    """A lease id that was never handed out. Random bytes are fetched for many at once."""
    cdef bytes fetched
    cdef Py_ssize_t at
    if not fresh_ids:
        fetched = os.urandom(16 * 256)
        for at in range(0, 16 * 256, 16):
            fresh_ids.append(PyBytes_FromStringAndSize(PyBytes_AS_STRING(fetched) + at, 16))
    return fresh_ids.pop()


# the way in: identity.py, address.py, policy.py --------------------------------------------------------


cdef class Seen:
    """What the last request with an API key came to."""

    cdef PolicyState policy
    cdef object index
    cdef object address  # None where the limits are the same from any address


cdef class Shortcut:
    """The policy of a caller, straight from a scope; made by those who know how where it is not remembered."""

    cdef list _names
    cdef dict _seen, _by_key, _unlisted, _hops, _literal, _latest
    cdef object _addresses, _match, _look_up, _of_unknown, _of_address, _at
    cdef Py_ssize_t _longest, _most
    cdef bint _has_routes, _unknown_by_address

    def __init__(self, list names, Py_ssize_t longest, policies, dict known):
        """What `Identifier`, `AddressReader`, `RouteTable` and `Policies` remember, and how they make more."""
        cdef object routes = policies.routes
        self._seen, self._most = {}, known["most"]
        self._names, self._longest = names, longest
        self._by_key, self._unlisted = known["by_key"], known["unlisted"]
        self._look_up, self._of_unknown = known["look_up"], known["of_unknown"]
        self._addresses, self._of_address = known["addresses"], known["of_address"]
        self._unknown_by_address = known["unknown_by_address"]
        self._hops = self._addresses.hops
        self._match, self._literal, self._has_routes = routes.match, routes.literal, routes.has_rules
        self._latest, self._at = policies.latest, policies.at

    cdef PolicyState find(self, dict scope):
        """The policy; None where somebody has to look closer."""
        cdef object api_key = self._key(scope["headers"]), known, address = None, index = None
        cdef PolicyState policy
        cdef PyObject *found
        cdef Seen seen
        cdef bint is_new = False
        if api_key is None or scope.get("root_path"):
            return None
        if self._has_routes:
            path, method = scope["path"], scope.get("method", "GET")
            literal = self._literal.get(path)
            if literal is not None:
                index = (<dict?>literal[0]).get(method, literal[1])
            else:
                index = self._match(method, path)
        found = PyDict_GetItemWithError(self._seen, api_key)
        if found is not NULL:
            seen = <Seen><object>found
            if seen.index is index and seen.policy.is_latest:
                if seen.address is None or seen.address == self._address_of(scope):
                    return seen.policy
        known = self._by_key.get(api_key) if <bytes>api_key else ""
        if known is None:
            known, is_new = self._look_up(api_key), True
        if type(known) is str:
            address = self._address_of(scope)
            caller = self._unlisted.get((known, address))
            if caller is None:
                caller = self._of_unknown(known, address) if known else self._of_address(address)
            known = caller
        policy = self._latest.get((known.partition, index))
        if policy is None or (<object>policy).identity is not known:
            policy = self._at(known, index)
        if <bytes>api_key and not is_new and policy.is_latest:  # who comes again may come often
            if found is NULL:
                make_room(self._seen, self._most)
            seen = Seen.__new__(Seen)
            seen.policy, seen.index, seen.address = policy, index, address if self._unknown_by_address else None
            self._seen[api_key] = seen
        return policy

    cdef object _address_of(self, dict scope):
        """The client address, as it is counted under."""
        cdef object hop = None, client = scope.get("client")
        if client and not self._addresses.looks:
            hop = self._hops.get(client[0])
        return self._addresses(scope) if hop is None or hop.trusted else hop.text

    cdef object _key(self, headers):
        """The API key, empty where there is none; None where it is not plain to see."""
        cdef bytes api_key = b"", found, wanted
        cdef Py_ssize_t at, number = len(self._names)
        cdef unsigned long long seen = 0, bit
        if number > 64:
            return None
        for header in headers:
            name = header[0]
            if not PyBytes_CheckExact(name):
                return None
            for at in range(number):
                wanted = <bytes>self._names[at]
                if same_letters(name, wanted):
                    bit = <unsigned long long>1 << at
                    if seen & bit:
                        continue  # of one that came more than once, the first counts
                    seen |= bit
                    value = header[1]
                    if not PyBytes_CheckExact(value):
                        return None
                    found = plain_key(<bytes>value, wanted)
                    if found is None or len(found) > self._longest or (found and api_key and found != api_key):
                        return None
                    api_key = api_key or found
        return api_key


cdef bint same_letters(bytes name, bytes lower):
    """Whether a header's name is this one, which is in lower case."""
    cdef Py_ssize_t size = PyBytes_GET_SIZE(name), at
    cdef const unsigned char *a
    cdef const unsigned char *b
    if size != PyBytes_GET_SIZE(lower):
        return False
    a, b = <const unsigned char *>PyBytes_AS_STRING(name), <const unsigned char *>PyBytes_AS_STRING(lower)
    for at in range(size):
        if a[at] != b[at] and not (65 <= a[at] <= 90 and a[at] + 32 == b[at]):
            return False
    return True


cdef bytes plain_key(bytes value, bytes name):
    """The key in a header's value; None where it takes more than a look."""
    cdef const char *text = PyBytes_AS_STRING(value)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(value)
    if name == b"authorization":
        if size < 8 or memcmp(text, b"Bearer ", 7) != 0:
            return None
        value = value[7:]
        text, size = PyBytes_AS_STRING(value), size - 7
    if size and (text[0] == 32 or text[0] == 9 or text[size - 1] == 32 or text[size - 1] == 9):
        return None
    return value


# headers: wire/headers.py -------------------------------------------------------------------------------


cdef bytes digits(i64 number):
    """A number as text; none is below zero by more than a clock's step."""
    cdef char text[24]
    cdef int at = 24
    cdef bint is_negative = number < 0
    if is_negative:
        number = -number
    while True:
        at -= 1
        text[at] = <char>(48 + number % 10)
        number //= 10
        if number == 0:
            break
    if is_negative:
        at -= 1
        text[at] = 45
    return PyBytes_FromStringAndSize(text + at, 24 - at)


cdef bint tells_of_limits(list headers) except -1:
    """Whether the app may tell of rate limits itself."""
    cdef const char *text
    for header in headers:
        name = header[0]
        if not PyBytes_CheckExact(name):
            return True
        if PyBytes_GET_SIZE(name):
            text = PyBytes_AS_STRING(name)
            if text[0] == 114 or text[0] == 82:  # r, R
                if same_letters((<bytes>name)[:9], b"ratelimit"):
                    return True
            elif text[0] == 120 or text[0] == 88:  # x, X
                if same_letters((<bytes>name)[:12], b"x-ratelimit-"):
                    return True
    return False
