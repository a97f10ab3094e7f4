# cython: language_level=3, binding=False
"""Compiled twins of the steps that every request takes, for CPython with a C compiler at installation.

Each does what its twin in Python does, which is where the rules are explained, and is compared with it by
property tests. What is not plain (a duplicate header, a proxy, a window that refuses) answers None, changes
nothing, and is left to the twin. Numbers are 64-bit: quotas are at most a thousand million, and a cost
beyond 2**62 fits into none.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_GetItemWithError
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.ref cimport Py_INCREF, PyObject
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_SET_ITEM
from libc.stdio cimport snprintf
from libc.string cimport memcmp, memmove

from asyncio import get_running_loop
from time import monotonic

cdef extern from "Python.h":
    object PyType_GenericAlloc(type kind, Py_ssize_t size)

ctypedef long long i64

cdef i64 NEVER = 1 << 62
cdef i64 SECOND = 1_000_000


cdef inline i64 units(object number) except -1:
    """A cost or a price, as far as it can ever fit."""
    return NEVER if number > NEVER else number


# the memory backend: counts.py -------------------------------------------------------------------------


cdef class Log:
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

    def charge(self, limit, i64 now, lease_id, i64 cost, price):
        """Count `cost` units at `now`."""
        self.add(now, cost, limit.granule)
        return self._used, self._oldest + self.length - now, 0

    def take_ahead(self, limit, i64 now, i64 cost, i64 ahead):
        """Count `cost` units as used so much later."""
        self._ahead = max(self._ahead, ahead)
        self.add(now + ahead, cost, limit.granule)
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

    cdef i64 _wait(self, i64 needed, i64 now):
        cdef Py_ssize_t at
        for at in range(self._head, self._end, 2):
            needed -= self._log[at + 1]
            if needed <= 0:
                return self._log[at] + self.length - now
        return self.length


cpdef charge_known(places, i64 now, i64 cost, lease_id, slots_type):
    """Charge windows and slots that are all counted already; None, and nothing charged, where one refuses,
    is not known yet or is a budget's.
    """
    cdef Py_ssize_t n = len(places), i
    cdef list states = [], numbers = []
    cdef Log log
    cdef dict leases
    cdef PyObject *found
    for place in places:
        name, limit = <object>PyTuple_GET_ITEM(place, 1), <object>PyTuple_GET_ITEM(place, 2)
        found = PyDict_GetItemWithError(<object>PyTuple_GET_ITEM(place, 0), name)
        if found is NULL:
            return None
        state = <object>found
        if type(state) is Log:
            log = <Log>state
            if not log.admits(limit.quota, now, cost):
                return None
        elif type(state) is slots_type:
            if len(<dict?>state.leases) >= limit.limit:
                return None
        else:
            return None
        states.append(state)
    for i in range(n):
        place = places[i]
        store, name, limit = <object>PyTuple_GET_ITEM(place, 0), <object>PyTuple_GET_ITEM(place, 1), <object>PyTuple_GET_ITEM(place, 2)
        store.move_to_end(name)
        state = states[i]
        if type(state) is Log:
            log = <Log>state
            log.add(now, cost, limit.granule)
            numbers.append(log._used)
            numbers.append(log._oldest + log.length - now)
        else:
            leases = state.leases
            leases[lease_id] = now + <i64>(<double>limit.lease * SECOND)
            numbers.append(len(leases))
            numbers.append(0)
        numbers.append(0)
    return tuple(numbers)


# deciding: limiter.py, memory.py, redis.py, renewals.py -------------------------------------------------


cdef class Desk:
    """Decides about plain requests, and ends them, for one limiter: the short way, as desk.py describes it."""

    cdef object _limiter, _backend, _lock, _clock, _touch, _slots, _new_id, _nothing, _no_id, _steady
    cdef object _error, _cancelled
    cdef type _lease, _admission, _outcome, _hold, _places, _slot_set, _packed
    cdef dict _renewals, _refused, _batchers, _releases
    cdef bint _counts_here, _asks
    cdef public bint is_observed

    def __init__(self, limiter, dict known):
        self._limiter, self._backend = limiter, limiter.backend
        self._touch, self._renewals = limiter.tally.touch, limiter.renewals
        self._refused, self._steady = limiter.refusals.kept, limiter.refusals.now
        self._lease, self._admission = known["lease"], known["admission"]
        self._outcome, self._hold = known["outcome"], known["hold"]
        self._nothing, self._no_id, self._new_id = known["nothing"], known["no_id"], known["new_id"]
        self._error, self._cancelled = known["error"], known["cancelled"]
        self._counts_here, self._asks = known["counts_here"], known["asks"]
        self._places, self._slot_set, self._packed = known["places"], known["slot_set"], known["packed"]
        if self._counts_here:
            self._lock, self._clock = self._backend.lock, self._backend.clock
            self._slots = self._backend.slots
        elif self._asks:
            self._batchers, self._releases = self._backend.batchers, self._backend.releases

    def admit(self, policy, loop):
        """The lease of a request that can be admitted at once; None, and nothing done, for any other."""
        cdef object outcome = None
        if self.is_observed or not policy.is_plain:
            return None
        if self._counts_here:
            outcome = self._decide(policy.charge)
        elif policy.stock is not None:
            outcome = self._limiter.prefetch.spend(policy.stock)
        return None if outcome is None else self._admitted(policy, policy.charge, outcome, loop)

    async def charge(self, policy, loop):
        """As `Limiter.charge`."""
        cdef Operation operation = None
        charge = policy.charge
        if self._asks and not self.is_observed and policy.is_plain and charge not in self._refused:
            sent = self._steady()
            operation = self._ask(charge, loop)
        if operation is None:
            return await self._limiter.charge(policy)
        try:
            answer = await operation.future
        except self._cancelled:
            self._backend.give_up(operation)
            raise
        except self._error:
            return self._limiter.without_backend(policy, charge, 0, None)
        now, numbers = answer
        admitted = numbers[0] == 1
        hold = operation.about[2] if admitted else self._nothing
        outcome = row(self._outcome, admitted, now, numbers[1:], hold)
        if not admitted:
            return self._limiter.answered(policy, charge, outcome, 0, sent)
        charge.last = outcome
        lease = self._admitted(policy, charge, outcome, loop)
        if policy.stock is not None:
            self._limiter.look_ahead(policy, charge)
        return lease

    def end(self, lease, failed, loop):
        """End a lease as `Limiter.end` does; false, and nothing done, where that has to."""
        cdef object hold = lease.hold, slots
        if lease.is_ended or lease.is_detached:
            return False
        if hold is self._nothing:
            lease.is_ended = True
            return True
        slots = <object>PyTuple_GET_ITEM(hold, 1)
        if lease.backend is not self._backend or not slots or <object>PyTuple_GET_ITEM(hold, 2):
            return False
        lease_id = <object>PyTuple_GET_ITEM(hold, 0)
        if self._counts_here:
            self._free(slots, lease_id)
        elif not (self._asks and self._release(slots, lease_id, loop)):
            return False
        lease.is_ended = True
        if lease.renewals is not None:
            (<dict?>lease.renewals.leases).pop(lease_id, None)
        return True

    cdef object _decide(self, charge):
        cdef object places = charge.prepared, numbers, hold, slots = charge.slots, outcome
        cdef i64 now
        if type(places) is not self._places or <object>PyTuple_GET_ITEM(places, 0) is not self._backend:
            return None
        with self._lock:
            now = self._clock()
            if now < <i64><object>PyTuple_GET_ITEM(places, 2) or now >= <i64><object>PyTuple_GET_ITEM(places, 3):
                return None
            lease_id = self._new_id() if slots else self._no_id
            numbers = charge_known(<object>PyTuple_GET_ITEM(places, 1), now, charge.cost, lease_id, self._slot_set)
            if numbers is None:
                return None
        outcome = row(self._outcome, True, now, numbers, self._hold_of(charge, lease_id, slots))
        charge.last = outcome
        return outcome

    cdef object _hold_of(self, charge, lease_id, slots):
        return self._hold(lease_id, slots, (), charge.lease) if slots else self._nothing

    cdef Operation _ask(self, charge, loop):
        """The charge on its way to the server; None where it was never packed, or nothing is connected yet."""
        cdef object packed = charge.prepared, batcher = self._batchers.get(loop), slots = charge.slots
        cdef Operation operation
        if batcher is None or type(packed) is not self._packed or packed.owner is not self._backend:
            return None
        lease_id = self._new_id() if slots else self._no_id
        operation = Operation(packed, lease_id)
        operation.orphaned = self._backend.on_orphan
        operation.about = (charge, lease_id, self._hold_of(charge, lease_id, slots))
        operation.future = loop.create_future()
        batcher.submit(operation)
        return operation

    cdef object _admitted(self, policy, charge, outcome, loop):
        cdef i64 before = policy.admitted
        cdef object hold = <object>PyTuple_GET_ITEM(outcome, 3)
        policy.admitted = before + 1
        if before == 0:
            self._touch(policy)
        lease = self._lease(self._limiter, hold, self._backend, row(self._admission, policy, charge, outcome, 0))
        if hold is not self._nothing:
            self._renew(lease, charge, loop)
        return lease

    cdef int _renew(self, lease, charge, loop) except -1:
        renewals = self._renewals.get(loop)
        if renewals is None or charge.max_hold is not None or charge.lease < renewals.covers:
            self._limiter.keep(lease, charge)
            return 0
        lease.renew_at = monotonic() + <double>charge.lease / 3
        lease.renewals = renewals
        (<dict?>renewals.leases)[lease.hold.id] = lease
        return 0

    cdef int _free(self, slots, lease_id) except -1:
        cdef PyObject *found
        with self._lock:
            for held in slots:
                found = PyDict_GetItemWithError(self._slots, held[:2])
                if found is not NULL:
                    (<dict?>(<object>found).leases).pop(lease_id, None)
        return 0

    cdef bint _release(self, slots, lease_id, loop) except -1:
        cdef object template = self._releases.get(slots), batcher = self._batchers.get(loop)
        cdef Operation operation
        if template is None or batcher is None:
            return False
        operation = Operation(template, lease_id)
        operation.must_arrive = True
        batcher.submit(operation)
        return True


cdef class Operation:
    """One operation of a batch: a template and an id, empty where the template leaves none open."""

    cdef public object template, id, orphaned, about, since, future, result
    cdef public bint must_arrive, is_asking
    cdef public int tries

    def __init__(self, template, own_id=b""):
        self.template, self.id, self.since = template, own_id, 0.0

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
        if self.future is None:
            self.result = answer
        elif not self.future.done():
            self.future.set_result(answer)
        elif self.orphaned is not None:
            self.orphaned(self.about, *answer)

    def fail(self, error):
        """Nothing came of it."""
        if self.future is None:
            self.result = error
        elif not self.future.done():
            self.future.set_exception(error)


cdef object row(type kind, a, b, c, d):
    """A named tuple of four."""
    cdef object made = PyType_GenericAlloc(kind, 4)
    Py_INCREF(a)
    Py_INCREF(b)
    Py_INCREF(c)
    Py_INCREF(d)
    PyTuple_SET_ITEM(made, 0, a)
    PyTuple_SET_ITEM(made, 1, b)
    PyTuple_SET_ITEM(made, 2, c)
    PyTuple_SET_ITEM(made, 3, d)
    return made


# the way in: identity.py, address.py, policy.py --------------------------------------------------------


cdef class Shortcut:
    """The policy of a caller who was here before, straight from a scope."""

    cdef list _names
    cdef dict _by_key, _unlisted, _hops, _literal, _latest
    cdef object _addresses, _match
    cdef Py_ssize_t _longest
    cdef bint _has_routes

    def __init__(self, list names, Py_ssize_t longest, dict by_key, dict unlisted, addresses, routes, dict latest):
        """What `Identifier`, `ApiKeyReader`, `AddressReader`, `RouteTable` and `Policies` remember."""
        self._names, self._longest = names, longest
        self._by_key, self._unlisted = by_key, unlisted
        self._addresses, self._hops = addresses, addresses.hops
        self._match, self._literal, self._has_routes = routes.match, routes.literal, routes.has_rules
        self._latest = latest

    def __call__(self, scope):
        """The policy; None where somebody has to look closer."""
        cdef object api_key = self._key(scope["headers"]), known, hop, index = None
        if api_key is None or scope.get("root_path"):
            return None
        known = self._by_key.get(api_key) if <bytes>api_key else ""
        if known is None:
            return None
        if type(known) is str:
            client = scope.get("client")
            if not client or self._addresses.looks:
                return None
            hop = self._hops.get(client[0])
            if hop is None or hop.trusted:
                return None
            known = self._unlisted.get((known, hop.text))
            if known is None:
                return None
        if self._has_routes:
            path, method = scope["path"], scope.get("method", "GET")
            literal = self._literal.get(path)
            if literal is not None:
                index = (<dict?>literal[0]).get(method, literal[1])
            else:
                index = self._match(method, path)
        policy = self._latest.get((known.partition, index))
        return policy if policy is not None and policy.identity is known else None

    cdef object _key(self, headers):
        """The API key, empty where there is none; None where it is not plain to see."""
        cdef bytes api_key = b"", found, wanted
        cdef Py_ssize_t at, number = len(self._names), seen = 0
        for header in headers:
            name = header[0]
            if not PyBytes_CheckExact(name):
                return None
            for at in range(number):
                wanted = <bytes>self._names[at]
                if same_letters(name, wanted):
                    if seen & (1 << at):
                        continue  # of one that came more than once, the first counts
                    seen |= 1 << at
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


# the way out: wire/headers.py, middleware.py -----------------------------------------------------------


cdef class Sender:
    """Adds headers when the response starts, remembers its status, and lets others have a turn."""

    cdef object _send, _writer, _lease
    cdef int _sent
    cdef readonly object status

    def __init__(self, send, writer, lease):
        self._send, self._writer, self._lease = send, writer, lease
        self.status = 500  # what a server answers where the app says nothing

    def __call__(self, message):
        """As `send`."""
        kind = message["type"]
        if kind == "http.response.start" or kind == "websocket.http.response.start":
            self.status = message["status"]
            message = self._with_headers(message)
        elif kind == "websocket.accept":
            self.status = 101
            message = self._with_headers(message)
        self._sent += 1
        if self._sent % 16 == 0:
            from ratelimit_mw.wire.sender import send_and_yield
            return send_and_yield(self._send, message)
        return self._send(message)

    cdef object _with_headers(self, message):
        ours = headers_of(self._writer, self._lease.admission)
        if ours is None:
            ours = self._writer.of_lease(self._lease)
        if not ours:
            return message
        present = message.get("headers", ())
        changed = dict(message)
        if tells_of_limits(present):
            from ratelimit_mw.wire.headers import add_headers
            changed["headers"] = add_headers(present, ours)
        else:
            changed["headers"] = list(present) + ours
        return changed


cdef list headers_of(writer, admission):
    """The `X-RateLimit-*` of a plain admission; None where it takes other headers, or none."""
    cdef i64 left, fewest = 0, used, cost, now, reset, length, longest = 0
    cdef Py_ssize_t at, best = -1
    if admission is None or not writer.is_plain:
        return None
    charge, outcome = <object>PyTuple_GET_ITEM(admission, 1), <object>PyTuple_GET_ITEM(admission, 2)
    if charge.allowances:
        return None
    numbers = <object>PyTuple_GET_ITEM(outcome, 2)
    cost = charge.cost
    window = None
    for place in charge.windows:
        at, each = place
        used = numbers[at]
        left, length = (<i64>each.quota - used) // cost, each.length
        if window is None or left < fewest or (left == fewest and length > longest):
            best, fewest, longest, window = at, left, length, each
    if window is None:
        return []
    used, now, reset = numbers[best], <object>PyTuple_GET_ITEM(outcome, 1), numbers[best + 1]
    if writer.is_unix:
        reset += now
    left = <i64>window.quota - used
    return [
        (b"x-ratelimit-limit", digits(window.quota)),
        (b"x-ratelimit-remaining", digits(left if left > 0 else 0)),
        (b"x-ratelimit-reset", digits(-(-reset // SECOND))),
    ]


cdef bytes digits(i64 number):
    cdef char text[24]
    return PyBytes_FromStringAndSize(text, snprintf(text, 24, "%lld", number))


cdef bint tells_of_limits(headers) except -1:
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
