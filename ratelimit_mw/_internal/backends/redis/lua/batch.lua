-- batch.lua: decides a batch of operations, or one alone, in one atomic step.
--
-- Guarantee: an operation is done whole or not at all, and one that fails (no memory) fails alone.
-- Releases, renewals and settles run before charges, and work when memory is full: their first write is one
-- that frees. A key is read once and written once per batch; in between the charges are decided in order on
-- what was read.
--
-- KEYS   the keys of every operation, one operation after the other; on a cluster, where they lie in several hash
--        slots, those of the first operation
-- ARGV   [1] D where no two charges have a key in common and none has a period, else S; a double: the time after
--        which the call is given up, and charges, renews, deletes and settles anew nothing; and the digits of the time in microseconds,
--        or nothing for the server's own TIME. As small letters, d and s, they say that behind the operations stand the
--        keys of all but the first, and then, in two bytes, the number of operations;
--        [2..] an operation each, a letter and packed little-endian fields:
--        A P  acquire, peek: n, cost, price, lease of its estimate (0: no record), n limits, ids;
--             keys: one for each limit, then the record
--        O    acquire again what may have been acquired under this id: as A, and the estimate is held once
--        T    take ahead: as acquire, of windows alone. In place of the price the microseconds within which
--             the units will be used, at most an eighth of each window: they count from the end of that
--        F    finish: n, mode, time and cost to give back to windows (time 0: nothing), n limits, ids; mode 0
--             leaves money alone, 1 keeps the estimate, 2 gives it back; keys as above (mode 0: no record)
--        a p o  as A P O, with a cost for each limit: n, number of the keys behind the limits', records (1 of money,
--             2 of units, 3 both), price, lease of its estimates, n limits, ids. Such a limit has two more fields: its
--             cost (0: one unit has to be left, and none is charged), and the number of its meter from 1 on, or 0. Behind the
--             limits stand the cost of each meter, and the length of its longest window.
--             Keys: one for each limit, the open estimates of each meter, for O the record of units, that of money
--        M    meters: number of keys, mode (0 settle, 1 settle anew, 2 hold until settled, 3 keep the estimates, 4 give
--             them back), n, what has become of an estimate that is neither open nor in a record (0 it has lapsed, 1 it
--             was settled, unless it is noted that it lapsed, 2 its lease is over); for each of n meters: amount (-1: leave
--             it), time of the charge (0: not known), estimate, amount settled of it before (-1: none), number of windows,
--             and quota, length and granule of each; id; keys: for each meter its open estimates and its windows; then
--             the record
--        N    renew: n and number of slot sets, in two bytes each; keys: n, the slot sets first; then for each hold:
--             id, lease of its slots, lease of its estimates, number of slots, of periods and of meters, the indexes of
--             their keys in two bytes each: the slots'; the record's and each period's with its end; each meter's open
--             estimates' with the time of the charge and the estimate
--        S    settle: amount, replace (0 or 1), n, n ends of periods, id; keys: n periods, then the record
--        K    hold an estimate until it is settled: as settle
--        D    delete: n; keys: n
--        Ids: one, or as many as there are charges (releases) that differ in nothing else: they are decided
--             as if each were an operation of its own, one after the other. Not where money moves.
--        A limit is a letter and three doubles: W quota, length, granule; C limit, lease, 0; B limit, start
--        and end of the period. Times are in microseconds, amounts in micro-units.
-- Reply  [1] the time, an integer; then a string for each operation, and after them, where stored values were mended, how
--        many, a blank and the key of the first:
--        A P O T a p o  a byte: 1 admitted, 0 refused, 2 TIME lies outside the period (nothing was charged); then
--             three 8-byte integers for each limit, as they are after the charge: W used, reset_after, retry_after;
--             C active, 0, retry; B spent, held, retry; retry over 0 where this limit refuses.
--             Of several: 1 where any was admitted; the figures after the last one; and in two bytes how many
--             were, which are the first ones. Where these are not all, the figures are those of the refused, too
--        F D  1
--        N    a byte for each hold: 1 renewed, 0 lost, 2 not renewed: a key is of another type, and a sentence
--        S M  1 settled, 2 settled before with this amount, 3 before with another, 0 no record
--        K    1 held, 2 held or settled before, 0 no record
--        E    and a sentence, of any operation: it failed and changed nothing
-- Cost   two commands for a window and one more for every fifth entry, three for a slot set, two for a period,
--        one to release the slots of an operation; to renew three for a slot set, one for each slot, four for an
--        estimate. No operation has a key twice.
--
-- What is stored may have been damaged. Values that can't be true are mended when they are met, towards fewer
-- admissions: a charge compares the fields of the header with each other, and at least once in a window's length
-- its sum is compared with its entries (`audit`). So a damaged window counts right again one length later, a slot
-- set one lease later; a period whose amounts are lost counts as spent until it ends.
--
-- The loader puts the files together here, where a line says `include`, writes constants where they are used
-- (each `local NAME = value`), and leaves comments out. Every file says what it needs of the others and gives
-- them. A call makes its functions and tables anew and pays for each, and for each variable that a function finds
-- outside of it. So what few calls need is made when it is first asked for (parts.lua), and one operation alone, as most
-- calls bring, is done by lone.lua with less than a batch takes. Both include the same files.

-- include constants

local call, pack, parse, slice, byte = redis.call, struct.pack, struct.unpack, string.sub, string.byte

local flags, now = ARGV[1], nil
if #flags > FLAGS_SIZE then
  now = tonumber(slice(flags, FLAGS_SIZE + 1))
else
  local parts = call('TIME')
  now = parts[1] * 1000000 + parts[2]
end
local is_late = now > parse('<d', flags, 2)

local is_spread = byte(flags) == DISJOINT_SPREAD or byte(flags) == SHARED_SPREAD
if is_spread then
  -- include spread
end

local decide -- defined below

-- Of a call: how many stored values were mended, `damaged`, and the key of the `first`; where it brings several
-- operations, also the `states` of keys of charges: true where one charge needs it, false where several do; else what
-- was read of it and changed since, to be written at the end, in this `order`.
local context

-- include parts

if #ARGV == 2 then
  -- include lone
end

local states, order = {}, {}
context = {states = states, order = order}

-- include decide
-- include releases
-- include operations

for pass = 1, 2 do -- an operation that fails, fails alone
  local step = pass == 1 and all_but_charges or all_charges
  index, shared_states = 2, any_shared and states or nil
  while index <= #ARGV do
    local ok, fault = pcall(step)
    if not ok then
      part(MONEY).forget()
      if pass == 1 or not part(REPAIR).mended_slots(fault, ARGV[index], firsts[index]) then
        replies[index], index = FAILED .. part(REPAIR).sentence(fault), index + 1
      end
    end
  end
end

local failed
for _, state in ipairs(order) do
  local ok, fault = pcall(part(SHARING).flush, state)
  if not ok then state.failed, failed = part(REPAIR).sentence(fault), true end
end
for i = 2, failed and #ARGV or 0 do
  local kind = byte(ARGV[i])
  local charged = firsts[i] and kind ~= PEEK and kind ~= PEEK_OWN and byte(replies[i]) == ADMITTED
  for j = 1, charged and byte(ARGV[i], 2) or 0 do
    local state = states[KEYS[firsts[i] + j]]
    if type(state) == 'table' and state.failed then replies[i] = FAILED .. state.failed end
  end
end
if context.damaged then replies[#ARGV + 1] = context.damaged .. ' ' .. context.first end
return replies
