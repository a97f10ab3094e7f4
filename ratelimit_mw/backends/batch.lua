-- batch.lua: decides a batch of operations in one atomic step.
--
-- Guarantee: an operation is done whole or not at all, and one that fails (no memory) fails alone.
-- Releases, renewals and settles run before charges, and work when memory is full: their first write is one
-- that frees. A key is read once and written once per batch; in between the charges are decided in order on
-- what was read.
--
-- KEYS   the keys of every operation, one operation after the other
-- ARGV   [1] D where no two charges have a key in common and none has a period, else S; sixteen digits: the time
--        after which the call is given up, and charges, renews and deletes nothing; and the time in microseconds, or nothing for the
--        server's own TIME; [2..] an operation each, a letter and packed little-endian fields:
--        A P  acquire, peek: n, cost, price, lease of its estimate (0: no record), n limits, ids;
--             keys: one for each limit, then the record
--        O    acquire again what may have been acquired under this id: as A, and the estimate is held once
--        T    take ahead: as acquire, of windows alone. In place of the price the microseconds within which
--             the units will be used, at most an eighth of each window: they count from the end of that
--        F    finish: n, mode, time and cost to give back to windows (time 0: nothing), n limits, ids; mode 0
--             leaves money alone, 1 keeps the estimate, 2 gives it back; keys as above (mode 0: no record)
--        N    renew: n and number of slot sets, in two bytes each; keys: n, the slot sets first; then for each hold:
--             id, lease of its slots, lease of its estimate, number of slots and of periods, the places of their keys
--             in two bytes each: the slots', the record's, and each period's with its end
--        S    settle: id, amount, replace (0 or 1), n, n ends of periods; keys: n periods, then the record
--        K    keep an estimate until it is settled: as settle
--        D    delete: n; keys: n
--        Ids: one, or as many as there are charges (releases) that differ in nothing else: they are decided
--             as if each were an operation of its own, one after the other. Not where money moves.
--        A limit is a letter and three doubles: W quota, length, granule; C limit, lease, 0; B limit, start
--        and end of the period. Times are in microseconds, amounts in micro-units.
-- Reply  [1] the time; then a string for each operation, and after them, where stored values were mended, how
--        many, a blank and the key of the first:
--        A P O T  a byte: 1 admitted, 0 refused, 2 TIME lies outside the period (nothing was charged); then
--             three 8-byte integers for each limit, as they are after the charge: W used, reset_after, retry_after;
--             C active, 0, retry; B spent, held, retry; retry over 0 where this limit refuses.
--             Of several: 1 where any was admitted; the figures after the last one; and in two bytes how many
--             were, which are the first ones. Where these are not all, the figures are those of the refused, too
--        F D  1
--        N    a byte for each hold: 1 renewed, 0 lost, 2 not renewed: a key is of another type, and a sentence
--        S    1 settled, 2 settled before with this amount, 3 before with another, 0 no record
--        K    1 kept, 2 kept or settled before, 0 no record
--        E    and a sentence, of any operation: it failed and changed nothing
-- Cost   two commands for a window and one more for every fifth entry, three for a slot set, two for a period,
--        one to release the slots of an operation; to renew three for a slot set, one for each slot, four for an
--        estimate. No operation has a key twice.
--
-- A window is a string: a header, a stage for five entries of (time, cost), and a ring of them. The header
-- holds the newest entry; those before it gather on the stage, and move to the ring together. The ring has its
-- oldest at `head`, and room for at most half again as many as are live, and never for more than quota or
-- granules need. Times never decrease from entry to entry; one of units taken ahead lies up to `ahead` later
-- than they were taken. A slot set is a sorted set: lease id by expiry.
--
-- A record is three doubles: the estimate, the settled amount (-1: none yet) and when the estimate lapses (0: never,
-- -1: it has). A period is spent and held; and, where estimates lapse, up to when they have lapsed, and pairs of
-- a time and the sum of what lapses then, in order: at most 34 for leases of one length, since an estimate lasts to
-- the end of one of 32 parts of its lease. Nothing is held after `lapsed` under a time up to it.
--
-- What is stored may have been damaged. Values that can't be true are mended when they are met, towards fewer
-- admissions: a charge compares the fields of the header with each other, and at least once in a window's length
-- its sum is compared with its entries (`audit`). So a damaged window counts right again one length later, a slot
-- set one lease later; a period whose amounts are lost counts as spent until it ends.
--
-- A call makes its functions and tables anew and pays for each, so what few calls need is made when it is first
-- asked for, by `upkeep` and `rare`. What is read of a limit stays in local variables, as a table would cost more
-- than the commands: to decide one limit a function calls itself for the next, and then charges its own.

-- Fields of a header: sum, oldest, newest, when the key dies, cost of the newest, ahead, head, room in the ring,
-- entries in the ring, entries outside of it. The same with the stage behind it, and with one more entry on that.
-- Whoever loads the script writes these constants into it: a variable that functions share costs each call.
local HEADER = '<ddddI4I4I2I2I2I2'
local WITH_STAGE = '<ddddI4I4I2I2I2I2c0'
local WITH_ENTRY = '<ddddI4I4I2I2I2I2c0dI4'
local HEADER_SIZE = 48
local ENTRY_SIZE = 12
local STAGED = 5
local RING = 108 -- where it begins, behind the stage
local ID_SIZE = 16
local LIMIT_SIZE = 25
local LATE = 'LATE' -- of an operation that came after it was given up
local MOST_COST = 4294967295 -- what entries hold exactly, and what doubles do
local MOST_MONEY = 9007199254740992
local DAMAGED = 'DAMAGED' -- raised where a window can't be as it is stored
local LONGEST_LEASE = 2592000000000 -- thirty days in microseconds: the longest that a detached slot waits

local ARGV, KEYS = ARGV, KEYS
local call, pack, slice, byte = redis.call, struct.pack, string.sub, string.byte
local spread, unpack = unpack, struct.unpack

local function run() -- its functions find those above without a search

local time = slice(ARGV[1], 18)
if time == '' then
  local parts = call('TIME')
  time = parts[1] .. slice('00000' .. parts[2], -6)
end
local now = tonumber(time)
local is_late = now > tonumber(slice(ARGV[1], 2, 17))

-- Of the keys of charges: true where one charge needs it, false where several do; else what was read of it and
-- changed since, to be written at the end, in this order. Whether any may be needed by several, and whether one is.
local states, order, looks, shares = {}, {}, byte(ARGV[1]) ~= 68, false -- D

local texts = {} -- numbers as arguments: the same few times and places come again and again

local function text(number)
  local known = texts[number]
  if not known then
    known = string.format('%.0f', number)
    texts[number] = known
  end
  return known
end

local damaged, first_damaged = 0, nil -- how many stored values were mended, and the key of the first

local decide, upkeep, rare -- defined below

-- charges ---------------------------------------------------------------------------------------

local reply = {0, 0, 0, 0, 0, 0, 0, 0, 0} -- the figures of the charge in hand

local function without_few(key, length, raw)
  -- A window without what has left it, where those are a few of its ring; nil where there is more to do, as when
  -- the end of its life has come to the next multiple of three quarters of a length: then it is audited.
  local sum, _, newest, dies, newest_cost, _, head, cap, ring, later = unpack(HEADER, raw)
  local ends, period = now + length + (length < 8000000 and 1000000 or length / 8), 0.75 * length
  if not (newest <= now and ring > 0 and ring <= cap and head < cap) or dies - dies % period ~= ends - ends % period
  then
    return nil
  end
  local from = RING + head * ENTRY_SIZE
  local piece = call('GETRANGE', key, text(from), text(from + math.min(ring, cap - head, 4) * ENTRY_SIZE - 1))
  for at = 1, #piece - ENTRY_SIZE + 1, ENTRY_SIZE do
    local time, cost = unpack('<dI4', piece, at)
    if time > now - length and cost > 0 then
      if time > newest or not (sum >= cost) then return nil end -- damaged
      local stage = slice(raw, HEADER_SIZE + 1, HEADER_SIZE + (later - 1) * ENTRY_SIZE)
      return pack(WITH_STAGE, sum, time, newest, dies, newest_cost, 0, head, cap, ring, later, stage)
    end
    sum, head, ring = sum - cost, head + 1, ring - 1
  end
end

local function decide_window(plan, limit, key, j, alone, admitted)
  local shared = not alone and rare().shared(key, limit)
  local read = shared and shared.raw or redis.pcall('GETRANGE', key, '0', '107')
  if #read < HEADER_SIZE then
    read = read == '' and string.rep('\0', HEADER_SIZE) or rare().repaired(DAMAGED, key, limit, read)
  end
  local raw, length, cost, sum, oldest, newest, dies, newest_cost, ahead, head, cap, ring, later =
    read, limit.length, plan.cost, unpack(HEADER, read)
  if newest <= now and oldest > now - length and oldest <= newest and ring <= cap and sum >= 0 then
    ahead = 0
  else
    raw = without_few(key, length, read)
    if not raw then
      local ok, fresh = pcall(upkeep().refreshed, key, limit, read)
      raw = ok and fresh or rare().repaired(fresh, key, limit, read)
    end
    sum, oldest, newest, dies, newest_cost, ahead, head, cap, ring, later = unpack(HEADER, raw)
  end
  if later == 0 then read = raw end -- who only looks writes nothing
  if shared and not shared.raw then shared.raw, shared.read = raw, read end
  if sum + admitted * cost > limit.quota then admitted = math.max(math.floor((limit.quota - sum) / cost), 0) end

  admitted = decide(plan, j + 1, alone, admitted)
  if not admitted then return nil end
  if admitted > 0 and plan.charges then
    local stamp, last, last_cost, granule, format = now + plan.ahead, newest, newest_cost, limit.granule, WITH_STAGE
    local stage = slice(raw, HEADER_SIZE + 1, HEADER_SIZE + (later - 1) * ENTRY_SIZE)
    if later > 0 and newest > stamp then stamp = newest end -- of what another has taken ahead
    newest, newest_cost = stamp, admitted * cost
    sum = sum + newest_cost
    if plan.ahead > ahead then ahead = plan.ahead end
    if later == 0 then
      oldest, later = stamp, 1
    elseif last == stamp or granule > 0 and last >= stamp - stamp % granule then
      newest_cost = newest_cost + last_cost
      if ring + later == 1 then oldest = stamp end
    else
      format, later = WITH_ENTRY, later + 1
    end
    raw = pack(format, sum, oldest, newest, dies, newest_cost, ahead, head, cap, ring, later, stage, last, last_cost)
    if shared then
      shared.raw = raw
    elseif not (dies >= newest + length) or dies > newest + 2 * length or later > STAGED + 1
      or cap > 1.5 * (ring + later) + 2
    then
      local ok, written = pcall(upkeep().written, key, limit, raw)
      raw = ok and written or rare().repaired(written, key, limit, raw)
    else
      call('SETRANGE', key, '0', raw)
    end
  elseif alone and raw ~= read then
    redis.pcall('SETRANGE', key, '0', raw) -- steps that can't be written down are taken again
  end
  local at = 3 * j
  reply[at - 2], reply[at - 1] = sum, later > 0 and oldest + length - now or 0
  reply[at] = 0
  if admitted < plan.number then
    local ok, wait = pcall(upkeep().retry_after, key, limit, raw, plan.cost)
    reply[at] = ok and wait or length -- a damaged one is repaired as soon as something leaves it
  end
  return admitted
end

local function keep_alive(key, lease, is_new)
  -- The key outlives its longest lease: a life is lengthened here, never shortened.
  local life = math.floor(lease / 1000) + 1000
  if is_new or call('PTTL', key) < life then
    call('PEXPIRE', key, text(2 * life))
    -- Once a lease, or those that have expired would count until the set is full.
    if not is_new then call('ZREMRANGEBYSCORE', key, '-inf', now) end
  end
end

local members = {'', ''} -- ids, or ids and when they expire, as arguments

local function hold_slots(key, added, n, expired)
  -- Those that have expired go after the others have come: the last one to go takes the key away, and of a key whose
  -- slot is moving nothing could be written then. Where memory is full they go first, which makes room.
  if expired == 0 then return call('ZADD', key, spread(added, 1, n)) end
  local done = redis.pcall('ZADD', key, spread(added, 1, n))
  call('ZREMRANGEBYSCORE', key, '-inf', now)
  if type(done) == 'table' then call('ZADD', key, spread(added, 1, n)) end
end

local function decide_slots(plan, limit, key, j, alone, admitted)
  local shared, charges = not alone and rare().shared(key, limit), plan.charges
  local quota, lease, n, expired, count = limit.quota, limit.length, shared and shared.n or 0, 0, nil
  local looked = shared and shared.looked -- whether those that have expired are left out of the count
  if charges then
    count = shared and shared.count or call('ZCARD', key)
    if count + plan.number > quota and not looked then
      expired, looked = call('ZCOUNT', key, '-inf', now), true
      count = count - expired
      if count + plan.number > quota then rare().shorten(key, lease) end
    end
  else
    count = call('ZCOUNT', key, '(' .. text(now), '+inf') + n / 2
  end
  if count + admitted > quota then admitted = math.max(quota - count, 0) end

  admitted = decide(plan, j + 1, alone, admitted)
  if not admitted then return nil end
  if charges and admitted < plan.number and not looked then -- who is refused is told how many there are
    expired, looked = call('ZCOUNT', key, '-inf', now), true
    count = count - expired
  end
  if shared and charges then
    shared.looked, shared.count, shared.expired = looked, count, shared.expired + expired
  end
  if admitted > 0 and charges then
    local added, expires, at = shared and shared.added or members, text(now + lease), plan.size + 1
    for i = n + 1, n + 2 * admitted, 2 do
      added[i], added[i + 1], at = expires, slice(plan.op, at, at + ID_SIZE - 1), at + ID_SIZE
    end
    if shared then
      shared.n, shared.lease = n + 2 * admitted, math.max(shared.lease, lease)
    else
      hold_slots(key, added, 2 * admitted, expired)
      keep_alive(key, lease, count == 0)
    end
    count = count + admitted
    if shared then shared.count = count end
  end
  local at = 3 * j
  reply[at - 2], reply[at - 1], reply[at] = count, 0, admitted < plan.number and count + 1 > quota and 1 or 0
  return admitted
end

local plans = {} -- what charges say but for their ids, which is the same for most of a batch

local function plan_of(said)
  local kind, n, cost, price, lease, position = unpack('<c1Bddd', said)
  if not (cost >= 1 and cost <= MOST_COST and cost % 1 == 0 and price >= 0 and price <= MOST_MONEY) then -- no NaN
    error('ERR a cost is a whole number from 1, a price one from 0', 0)
  end
  local plan = {
    charges = kind ~= 'P', cost = cost, price = kind ~= 'T' and price or 0, ahead = kind == 'T' and price or 0,
    lease = lease, again = kind == 'O', answer = '<B' .. string.rep('i8i8i8', n), size = #said, n = n, number = 0, op = '', first = 0,
  }
  for j = 1, n do
    local letter, quota, length, granule
    letter, quota, length, granule, position = unpack('<c1ddd', said, position)
    local decision = letter == 'W' and decide_window or letter == 'C' and decide_slots or rare().decide_period
    plan[j] = {quota = quota, length = length, granule = granule, decide = decision, letter = letter}
  end
  plans[said] = plan
  return plan
end

function decide(plan, j, alone, admitted)
  -- Decides the limits from the j-th on, and once all have been asked, charges them, the last one first: those
  -- of no other operation, which are written at once, before those that others share. So where memory is full
  -- nothing is charged that is shared. Returns how many are admitted, nil where TIME lies outside a period.
  local limit = plan[j]
  if limit then
    local key = KEYS[plan.first + j]
    if not shares or (states[key] == true) == alone then
      return limit.decide(plan, limit, key, j, alone, admitted)
    end
    return decide(plan, j + 1, alone, admitted)
  elseif not alone then
    return decide(plan, 1, true, admitted)
  end
  if plan.lease > 0 and plan.charges and admitted > 0 then rare().open(plan, KEYS[plan.first + j]) end
  return admitted
end

-- the batch -------------------------------------------------------------------------------------

local replies, firsts = {time}, {0} -- `firsts` as `keys` below, of charges
local place, keys = 2, 0 -- of the operation in hand: its place in ARGV, and the number of keys before its own

local function all_but_charges()
  while place <= #ARGV do
    local op, first = ARGV[place], keys
    local kind, n, mode = byte(op, 1, 3)
    -- The number of keys is read from the operation alone: one which fails cannot shift those of the next.
    if kind == 65 or kind == 80 or kind == 84 or kind == 79 then -- A P T O
      firsts[place] = first
      for i = first + 1, looks and first + n or 0 do
        local key = KEYS[i]
        local known = states[key]
        shares = shares or known ~= nil
        if known == nil or known == true then states[key] = not known end
      end
      keys = first + n + (byte(op, 26) > 0 and 1 or 0) -- no lease but 0 has a 0 there
    elseif kind == 70 then -- F
      keys = first + n + (mode > 0 and 1 or 0)
      local count, others, failed = 0, mode > 0, nil
      for at = 20 + n * LIMIT_SIZE, #op, ID_SIZE do
        count = count + 1
        members[count] = slice(op, at, at + ID_SIZE - 1)
      end
      for j = 1, n do
        if byte(op, 20 + (j - 1) * LIMIT_SIZE) == 67 then -- C
          local freed = redis.pcall('ZREM', KEYS[first + j], spread(members, 1, count))
          if type(freed) == 'table' and not rare().drop_foreign(KEYS[first + j]) then failed = freed end
        else
          others = true
        end
      end
      if others then rare().finish(op, first, n, mode) end
      replies[place] = failed and 'E' .. rare().sentence(failed) or '\1'
    else -- D N S K
      keys = first + (kind == 68 and n or kind == 78 and n + 256 * mode or byte(op, 27) + 1)
      if is_late and (kind == 68 or kind == 78) then error(LATE, 0) end -- D N: others may have come since
      replies[place] = rare()[kind](op, first)
    end
    place = place + 1
  end
end

local function all_charges()
  while place <= #ARGV do
    local first = firsts[place]
    if first then
      local op = ARGV[place]
      if is_late and byte(op) ~= 80 then error(LATE, 0) end -- P
      local said = slice(op, 1, 26 + byte(op, 2) * LIMIT_SIZE)
      local plan, number = plans[said] or plan_of(said), (#op - #said) / ID_SIZE
      plan.op, plan.first, plan.number = op, first, number
      local admitted = decide(plan, 1, not shares, number)
      if admitted then
        local answer = pack(plan.answer, admitted > 0 and 1 or 0, spread(reply, 1, 3 * plan.n))
        replies[place] = number == 1 and answer or answer .. pack('<I2', admitted)
      else
        replies[place] = '\2'
      end
    end
    place = place + 1
  end
end

-- what few batches need -------------------------------------------------------------------------

local made_upkeep, made_rare

function upkeep()
  -- What becomes of windows beside a charge. All take and give header and stage as one string, `raw`.
  if made_upkeep then return made_upkeep end
  local floor, min, max = math.floor, math.min, math.max
  local ENTRY = '<dI4'
  local CHUNK = 32
  local GRANULES = 1002 -- entries that a window of shared ones can have, and one to spare
  local MOST_ENTRIES = 2010 -- the same after its quota was raised past where sharing begins
  local MOST_OUTSIDE = 99 -- more than a batch puts outside of the ring

  local function window(key, limit, raw)
    local w = { -- every field at once, as a table that grows costs more
      key = key, quota = limit.quota, length = limit.length, granule = limit.granule, stage = '',
      sum = 0, oldest = 0, newest = 0, dies = 0, cost = 0, ahead = 0, head = 0, cap = 0, ring = 0, later = 0,
    }
    w.sum, w.oldest, w.newest, w.dies, w.cost, w.ahead, w.head, w.cap, w.ring, w.later = unpack(HEADER, raw)
    w.stage = slice(raw, HEADER_SIZE + 1, HEADER_SIZE + (w.later - 1) * ENTRY_SIZE)
    local is_empty = w.later == 0 and w.ring == 0 and w.sum == 0
    local is_whole = w.later > 0 and w.later <= MOST_OUTSIDE and #w.stage == (w.later - 1) * ENTRY_SIZE
    if not (is_empty or is_whole and w.sum >= w.cost and w.oldest <= w.newest)
      or w.ring > w.cap or w.head >= max(w.cap, 1) or w.ahead > w.length / 8
    then
      error(DAMAGED, 0)
    end
    return w
  end

  local function raw_of(w)
    local header = pack(HEADER, w.sum, w.oldest, w.newest, w.dies, w.cost, w.ahead, w.head, w.cap, w.ring, w.later)
    return header .. w.stage
  end

  local function entries(w, first, number)
    -- Reads up to `number` entries from the `first` on, or all of those outside the ring.
    if first >= w.ring then
      first = first - w.ring
      return slice(w.stage .. pack(ENTRY, w.newest, w.cost), first * ENTRY_SIZE + 1), w.later - first
    end
    local at = (w.head + first) % w.cap
    number = min(number, w.ring - first, w.cap - at)
    local from = RING + at * ENTRY_SIZE
    local raw = call('GETRANGE', w.key, text(from), text(from + number * ENTRY_SIZE - 1))
    if #raw < number * ENTRY_SIZE then error(DAMAGED, 0) end
    return raw, number
  end

  local function each(w, first)
    -- Walks the entries from the `first` on: time and cost.
    local raw, number, i = nil, 0, 0
    return function()
      if i == number then
        first, i = first + number, 0
        if first == w.ring + w.later then return nil end
        raw, number = entries(w, first, CHUNK)
      end
      i = i + 1
      return unpack(ENTRY, raw, i * ENTRY_SIZE - 11)
    end
  end

  local function first_since(w, time)
    -- The place of the first entry at `time` or later; the count where there is none.
    local low, high = 0, w.ring + w.later
    while low < high do
      local middle = floor((low + high) / 2)
      if unpack(ENTRY, (entries(w, middle, 1))) < time then low = middle + 1 else high = middle end
    end
    return low
  end

  local function write_ring(w, first, raw)
    local at = (w.head + first) % w.cap
    local size = (w.cap - at) * ENTRY_SIZE
    call('SETRANGE', w.key, text(RING + at * ENTRY_SIZE), slice(raw, 1, size))
    if #raw > size then call('SETRANGE', w.key, text(RING), slice(raw, size + 1)) end
  end

  local function life_of(length)
    return length + max(floor(length / 8), 1000000)
  end

  local function lengthen_life(w)
    w.dies = now + life_of(w.length)
    return text(floor(life_of(w.length) / 1000))
  end

  local function audit(w, dies)
    -- Compares the sum with the entries, and these with each other, each time that the end of a window's life,
    -- last `dies`, has come to the next multiple of three quarters of a length. Whether it has.
    local ends, period = now + life_of(w.length), 0.75 * w.length
    if dies == 0 or dies - dies % period == ends - ends % period then return false end
    local total, last = 0, w.oldest
    for time, cost in each(w, 0) do
      if not (time >= last and time <= w.newest) or total == 0 and time > last then error(DAMAGED, 0) end
      total, last = total + cost, time
    end
    if total ~= w.sum then error(DAMAGED, 0) end
    return true
  end

  local function rewrite(w, moved)
    -- Writes the window anew, with the ring in one piece and so many entries of the stage in it.
    local parts, first, ring, bound = {}, 0, w.ring + moved, w.granule > 0 and GRANULES or w.quota
    while first < w.ring do
      local raw, number = entries(w, first, w.ring)
      parts[#parts + 1], first = raw, first + number
    end
    parts[#parts + 1] = slice(w.stage, 1, moved * ENTRY_SIZE)
    if ring > bound then -- all of some was given back, or the quota was lowered, or raised
      local all = table.concat(parts)
      parts, ring = {}, 0
      for at = 1, #all, ENTRY_SIZE do
        if unpack('<I4', all, at + 8) > 0 then
          ring = ring + 1
          parts[ring] = slice(all, at, at + ENTRY_SIZE - 1)
        end
      end
      if ring > bound then bound = MOST_ENTRIES end
    end
    local cap = ring > 0 and max(ring, min(max(floor(1.2 * ring), ring + STAGED), bound)) or 0
    parts[#parts + 1] = string.rep('\0', (cap - ring) * ENTRY_SIZE)
    w.stage, w.later = slice(w.stage, moved * ENTRY_SIZE + 1), w.later - moved
    w.head, w.cap, w.ring = 0, cap, ring
    local life = lengthen_life(w)
    local raw = raw_of(w)
    call('SET', w.key, raw .. string.rep('\0', RING - #raw) .. table.concat(parts), 'PX', life)
    return raw
  end

  local function written(key, limit, raw)
    -- Writes a window after a charge: with a full stage moved to the ring, in a ring that fits, and with a life.
    local w = window(key, limit, raw)
    local moved, room = w.later > STAGED + 1 and w.later - 2 or 0, 1.5 * (w.ring + w.later) + 2
    local lives = w.dies >= w.newest + w.length and w.dies <= w.newest + 2 * w.length
    local fits = w.ring + moved <= w.cap and w.cap <= room
    if not (lives and fits) then audit(w, w.dies) end
    if w.dies == 0 or not fits then return rewrite(w, moved) end
    if moved > 0 then
      write_ring(w, w.ring, slice(w.stage, 1, moved * ENTRY_SIZE))
      w.ring, w.later, w.stage = w.ring + moved, w.later - moved, slice(w.stage, moved * ENTRY_SIZE + 1)
    end
    local life = not lives and lengthen_life(w)
    raw = raw_of(w)
    call('SETRANGE', key, '0', raw)
    if life then call('PEXPIRE', key, life) end
    return raw
  end

  local function step_over(w)
    -- Steps over the entries that have left the window, and those of which all was given back.
    local horizon, gone = now - w.length, 0
    for time, cost in each(w, 0) do
      if time > horizon and cost > 0 then
        w.oldest = time
        break
      end
      w.sum, gone = w.sum - cost, gone + 1
    end
    local of_ring = min(gone, w.ring)
    w.head, w.ring = (w.head + of_ring) % max(w.cap, 1), w.ring - of_ring
    w.later, w.stage = w.later - gone + of_ring, slice(w.stage, (gone - of_ring) * ENTRY_SIZE + 1)
    if not (w.sum >= 0) or w.later == 0 and w.sum > 0 then error(DAMAGED, 0) end
  end

  local function step_back(w)
    -- The server's clock went back: what was stored as later happened now at the latest, in one entry. What
    -- was taken ahead is used as much later as it could be when it was taken.
    local latest, total = now + w.ahead, 0
    local first = first_since(w, latest + 1)
    for _, cost in each(w, first) do total = total + cost end
    w.ring = min(w.ring, first)
    w.stage, w.later = slice(w.stage, 1, (first - w.ring) * ENTRY_SIZE), first - w.ring + 1
    w.newest, w.cost = latest, total
    if first == 0 then w.oldest = latest end
    call('PEXPIRE', w.key, lengthen_life(w))
    call('SETRANGE', w.key, '0', raw_of(w))
  end

  local function refreshed(key, limit, raw)
    -- The window without what has left it.
    local horizon = now - limit.length
    local _, oldest, newest = unpack(HEADER, raw)
    if newest <= horizon and oldest <= newest then return string.rep('\0', HEADER_SIZE) end
    local w = window(key, limit, raw)
    local dies = w.dies
    if w.newest <= now then w.ahead = 0 end
    if w.later > 0 and w.newest > now + w.ahead then step_back(w) end
    if w.oldest <= horizon then step_over(w) end
    if audit(w, dies) then call('PEXPIRE', key, lengthen_life(w)) end
    return raw_of(w)
  end

  local function retry_after(key, limit, raw, cost)
    -- Microseconds until `cost` fits: when the oldest entries that make room for it have left. 0 where it does.
    local w = window(key, limit, raw)
    local needed = w.sum + cost - w.quota
    if needed <= 0 then return 0 end
    for time, spent in each(w, 0) do
      needed = needed - spent
      if needed <= 0 then return max(time + w.length - now, 1) end
    end
    return w.length
  end

  local function give_back(key, limit, raw, time, cost)
    -- Takes `cost` off the entry that the charge at `time` went into, if it is still there.
    local w = window(key, limit, refreshed(key, limit, raw))
    local i, last, granule = first_since(w, time), w.ring + w.later - 1, limit.granule
    if i > last then return end
    local stored, spent = unpack(ENTRY, (entries(w, i, 1)))
    if stored ~= time and (granule == 0 or floor(stored / granule) ~= floor(time / granule)) then return end
    cost = min(cost, spent)
    w.sum = w.sum - cost
    local changed, at = pack(ENTRY, stored, spent - cost), (i - w.ring) * ENTRY_SIZE
    if i == last then
      w.cost = spent - cost
    elseif i < w.ring then
      write_ring(w, i, changed)
    else
      w.stage = slice(w.stage, 1, at) .. changed .. slice(w.stage, at + ENTRY_SIZE + 1)
    end
    if i == 0 then step_over(w) end
    call('SETRANGE', key, '0', raw_of(w))
  end

  made_upkeep = {refreshed = refreshed, written = written, retry_after = retry_after}
  made_upkeep.give_back = give_back
  return made_upkeep
end

function rare()
  -- What several charges share, spending, and other operations.
  if made_rare then return made_rare end
  local max = math.max
  local MOST_BYTES = 50000 -- more than any window has
  local KEPT = 172800000000 -- two days in microseconds: how long after its end a period can be settled
  local SETTLED = 86400000 -- a day in milliseconds: how long after it was settled an amount can be replaced
  local STEPS = 32 -- parts of a lease, to whose end an estimate lasts
  local lapses, is_open = 0, false -- of the charge in hand: when its estimate lapses, whether it was held before

  local function sentence(fault)
    local said = type(fault) == 'table' and fault.err or tostring(fault) -- Redis 7 raises a table
    said = said:gsub('^[@=]%S+: %-?%d+: %-?', '') -- Redis 6 says where before it says what
    return (said:gsub('^%S+:%d+: ', 'ERR a fault of the script: '))
  end

  local function note_damage(key)
    damaged, first_damaged = damaged + 1, first_damaged or key
  end

  local function repaired(fault, key, limit, raw)
    -- Makes a window anew of those of its entries, wherever they are stored, that can be true. What the sum has
    -- beyond them leaves a length after the last audit: the damage is younger. Where nothing is known, the
    -- window is full. Gives its header.
    if type(raw) == 'table' then -- a command that failed
      if not raw.err:find('^WRONGTYPE') then error(raw, 0) end
      raw = ''
    end
    if fault ~= DAMAGED and #raw >= HEADER_SIZE then error(fault, 0) end
    local found = redis.pcall('GETRANGE', key, '0', text(MOST_BYTES - 1))
    local length, sum, newest, dies, cost, ahead, _ = limit.length, -1, 0, 0, 0, 0, nil
    if #raw >= HEADER_SIZE then sum, _, newest, dies, cost, ahead = unpack(HEADER, raw) end
    if ahead > length / 8 then ahead = 0 end
    local life = length + max(math.floor(length / 8), 1000000)
    local horizon, latest, total, costs, times = now - length, now + ahead, 0, {}, {}

    local function add(time, cost)
      if time > horizon and time <= latest and time % 1 == 0 and cost > 0 then
        if not costs[time] then times[#times + 1] = time end
        total = total - (costs[time] or 0)
        costs[time] = max(costs[time] or 0, math.min(cost, limit.quota))
        total = total + costs[time]
      end
    end

    for _, stored in ipairs({raw, type(found) == 'string' and found or ''}) do
      for at = HEADER_SIZE + 1, #stored - ENTRY_SIZE + 1, ENTRY_SIZE do add(unpack('<dI4', stored, at)) end
    end
    add(newest, cost)
    local lost, since = 0, now
    if sum >= 0 and sum <= MOST_MONEY and sum % 1 == 0 then
      lost = math.min(sum, limit.quota) - total
      if dies > now and dies <= now + life then since = dies - dies % (0.75 * length) - life end
    elseif total == 0 then
      lost = limit.quota
    end
    if lost > 0 then add(since, lost + (costs[since] or 0)) end
    table.sort(times)

    local ring = {}
    for i = 1, #times - 1 do ring[i] = pack('<dI4', times[i], costs[times[i]]) end
    local header, last = string.rep('\0', HEADER_SIZE), times[#times]
    if last then
      header = pack(HEADER, total, times[1], last, now + life, costs[last], max(last - now, 0), 0, #ring, #ring, 1)
    end
    call('SET', key, header .. string.rep('\0', STAGED * ENTRY_SIZE) .. table.concat(ring), 'PX',
      text(math.floor(life / 1000)))
    note_damage(key)
    return header
  end

  local function shared(key, limit)
    -- What is known of a key that several charges need.
    local s = states[key]
    if not s then
      s = {key = key, letter = limit.letter, limit = limit, n = 0, added = {}, lease = 0, expired = 0}
      states[key], order[#order + 1] = s, s
    elseif limit.quota > s.limit.quota then
      s.limit = limit
    end
    return s
  end

  local function flush(s)
    if s.letter == 'W' then
      if s.raw == s.read then return end
      local ok, fault = pcall(upkeep().written, s.key, s.limit, s.raw)
      if not ok then repaired(fault, s.key, s.limit, s.raw) end
    elseif s.letter == 'C' then
      if s.n == 0 then return end
      hold_slots(s.key, s.added, s.n, s.expired)
      keep_alive(s.key, s.lease, false)
    elseif s.changed then
      local life = max(math.floor((s.ends - now + KEPT) / 1000), 1)
      local raw = pack('<dd', s.spent, s.held)
      if s.lapsed > 0 or s.open ~= '' then raw = raw .. pack('<d', s.lapsed) .. s.open end
      call('SET', s.key, raw, 'PX', life)
    end
  end

  local function is_amount(number)
    return number >= 0 and number <= MOST_MONEY and number % 1 == 0 -- no NaN
  end

  local function get_numbers(key)
    -- What a period or a record holds, nil where there is none; '' where it is something else.
    local raw = redis.pcall('GET', key)
    if not raw then return nil end
    if type(raw) == 'table' and not raw.err:find('^WRONGTYPE') then error(raw, 0) end
    return type(raw) == 'string' and raw or ''
  end

  local function get_record(key)
    -- What was estimated and settled, and when it lapses. Of a damaged one the estimate stays held, and it can be
    -- settled.
    local raw = get_numbers(key)
    if not raw then return nil end
    local estimate, settled, at = 0 / 0, -1, 0
    if #raw == 16 then estimate, settled = unpack('<dd', raw) end
    if #raw == 24 then estimate, settled, at = unpack('<ddd', raw) end
    if not (is_amount(estimate) and (settled == -1 or is_amount(settled)) and (at == -1 or is_amount(at))) then
      note_damage(key)
      return 0, -1, 0
    end
    return estimate, settled, at
  end

  local function are_open(p)
    -- Whether what is open can be true: amounts in the order of their times, no more than is held.
    local last, sum = p.lapsed, 0
    for place = 1, #p.open, 16 do
      local at, amount = unpack('<dd', p.open, place)
      if not (is_amount(at) and at > last and is_amount(amount)) then return false end
      last, sum = at, sum + amount
    end
    return is_amount(p.lapsed) and sum <= p.held
  end

  local function lapse(p)
    -- Holds nothing any more of what has lapsed by now.
    while p.open ~= '' do
      local at, amount = unpack('<dd', p.open)
      if at > now then break end
      p.held, p.lapsed, p.open = max(p.held - amount, 0), max(p.lapsed, at), slice(p.open, 17)
    end
  end

  local function hold(p, amount, at)
    -- Holds an amount until a time, or gives back a negative one that would have lapsed then, and has not.
    if at ~= 0 then
      if at <= p.lapsed then return end
      local place, found = #p.open - 15, 0
      while place > 0 and unpack('<d', p.open, place) > at do place = place - 16 end
      local before, after = slice(p.open, 1, max(place + 15, 0)), slice(p.open, max(place + 16, 1))
      if place > 0 and unpack('<d', p.open, place) == at then
        found, before = unpack('<d', p.open, place + 8), slice(p.open, 1, place - 1)
      end
      amount = max(amount, -found)
      p.open = before .. (found + amount > 0 and pack('<dd', at, found + amount) or '') .. after
    end
    p.held = max(p.held + amount, 0)
  end

  local function lapse_of(p, lease)
    -- When an estimate lapses that is held or renewed now.
    local step = max(math.floor(lease / STEPS), 1)
    return max(math.ceil((now + lease) / step) * step, p.lapsed + 1)
  end

  local function load_period(key, ends)
    local p = states[key]
    if type(p) == 'table' then return p end
    local raw = get_numbers(key)
    p = {key = key, letter = 'B', alone = p, ends = ends, spent = 0, held = 0, changed = false, lapsed = 0, open = ''}
    if raw and (#raw == 16 or #raw % 16 == 8 and #raw > 16) then
      p.spent, p.held = unpack('<dd', raw)
    elseif raw then
      p.spent = 0 / 0
    end
    -- What was lost stays beyond all amounts until a charge says how much can be spent at most.
    if not (is_amount(p.spent) and is_amount(p.held)) then
      p.spent, p.held = 2 * MOST_MONEY, 0
    elseif raw and #raw > 16 then
      p.lapsed, p.open = unpack('<d', raw, 17), slice(raw, 25)
      if are_open(p) then
        lapse(p)
      else -- held until it is settled, or the period ends
        p.lapsed, p.open = 0, ''
        note_damage(key)
      end
    end
    if not p.alone then states[key], order[#order + 1] = p, p end
    return p
  end

  local function change(p, spent, held, at)
    p.spent, p.changed = max(p.spent + spent, 0), true
    hold(p, held, at)
    if p.alone then flush(p) end
  end

  local function shift(p, amount, before, at)
    -- Lets what would have lapsed at one time, if it has not, lapse at another.
    hold(p, -amount, before)
    change(p, 0, amount, at)
  end

  local function open(plan, key)
    -- Makes the record of a charge, before anything is held for it.
    is_open = plan.again and get_record(key) ~= nil
    if is_open then return end
    local ends = 0
    for j = 1, plan.n do
      if plan[j].letter == 'B' then ends = max(ends, plan[j].granule) end
    end
    local life = math.floor((ends - now + KEPT) / 1000)
    call('SET', key, pack('<ddd', plan.price, -1, lapses), 'PX', text(life))
  end

  local function decide_period(plan, limit, key, j, alone, admitted)
    if now < limit.length or now >= limit.granule then return nil end
    local p = load_period(key, limit.granule)
    if p.spent > MOST_MONEY then
      note_damage(key)
      change(p, limit.quota - p.spent, 0, 0)
    end
    if p.spent + p.held + plan.price > limit.quota then admitted = 0 end
    local is_first = lapses == 0
    if plan.price > 0 then lapses = max(lapses, lapse_of(p, plan.lease)) end
    admitted = decide(plan, j + 1, alone, admitted)
    local at = lapses
    if is_first then lapses = 0 end
    if not admitted then return nil end
    if admitted > 0 and plan.charges and not is_open then change(p, 0, plan.price, at) end
    local is_over = p.spent + p.held + plan.price > limit.quota
    at = 3 * j
    reply[at - 2], reply[at - 1], reply[at] = p.spent, p.held, admitted < plan.number and is_over and 1 or 0
    return admitted
  end

  local function finish(op, first, n, mode)
    -- All of a finish but its slots.
    local _, _, time, cost, position = unpack('<BBdd', op, 2)
    local record, held, settled, at, periods = mode > 0 and KEYS[first + n + 1], nil, nil, 0, {}
    if record then held, settled, at = get_record(record) end
    if held and settled >= 0 then held = nil end
    for j = 1, n do
      local key, kind, quota, length, granule = KEYS[first + j], unpack('<c1ddd', op, position)
      if kind == 'W' and time > 0 then
        local limit = {quota = quota, length = length, granule = granule}
        local raw = redis.pcall('GETRANGE', key, '0', '107')
        local ok, fault = raw == '', nil
        if not ok then ok, fault = pcall(upkeep().give_back, key, limit, raw, time, cost) end
        if not ok then repaired(fault, key, limit, raw) end
      elseif kind == 'B' and held then
        periods[#periods + 1] = load_period(key, granule)
      end
      position = position + LIMIT_SIZE
    end
    if record then call('DEL', record) end
    for _, p in ipairs(periods) do change(p, mode == 1 and held or 0, -held, at) end
  end

  local function touch(record)
    -- A first write that is let through when memory is full.
    local life = max(call('PTTL', record), 1)
    call('PEXPIRE', record, life)
    return life
  end

  local function renew_estimate(record, periods, lease)
    local estimate, settled, before = get_record(record)
    if not estimate or settled >= 0 or before <= 0 then return end
    local at, has_lapsed = 0, false
    for _, p in ipairs(periods) do
      at, has_lapsed = max(at, lapse_of(p, lease)), has_lapsed or before <= p.lapsed
    end
    if has_lapsed then at = -1 end -- in all of them, if in one
    touch(record)
    call('SETRANGE', record, '16', pack('<d', at))
    for _, p in ipairs(periods) do shift(p, estimate, before, at) end
  end

  local function drop_foreign(key)
    -- Deletes what is no slot set; whether it was none.
    local met = redis.pcall('ZCARD', key)
    if type(met) ~= 'table' or not met.err:find('^WRONGTYPE') then return false end
    call('DEL', key)
    note_damage(key)
    return true
  end

  local function renew(op, first)
    local _, slot_sets, position = unpack('<I2I2', op, 2)
    local sets, answers, fault = {}, {}, ''
    for j = 1, slot_sets do
      local purged = redis.pcall('ZREMRANGEBYSCORE', KEYS[first + j], '-inf', now)
      sets[j] = {n = 0, lease = 0, added = {}, fault = false}
      if type(purged) == 'table' and not drop_foreign(KEYS[first + j]) then sets[j].fault = sentence(purged) end
    end
    while position <= #op do
      local id, lease, estimate_lease, number, n_periods, place, record
      id, lease, estimate_lease, number, n_periods, position = unpack('<c16ddBB', op, position)
      local answer, expires, periods = '\1', text(now + lease), {}
      for _ = 1, number do
        place, position = unpack('<I2', op, position)
        local set = sets[place + 1]
        if set.fault then
          answer, fault = answer == '\1' and '\2' or answer, set.fault
        elseif call('ZSCORE', KEYS[first + place + 1], id) then
          set.added[set.n + 1], set.added[set.n + 2], set.n = expires, id, set.n + 2
          set.lease = max(set.lease, lease)
        else
          answer = '\0'
        end
      end
      if n_periods > 0 then record, position = unpack('<I2', op, position) end
      for j = 1, n_periods do
        local ends
        place, ends, position = unpack('<I2d', op, position)
        periods[j] = {KEYS[first + place + 1], ends}
      end
      if record then
        local ok, said = pcall(function()
          for j, period in ipairs(periods) do periods[j] = load_period(spread(period)) end
          renew_estimate(KEYS[first + record + 1], periods, estimate_lease)
        end)
        if not ok then answer, fault = answer == '\1' and '\2' or answer, sentence(said) end
      end
      answers[#answers + 1] = answer
    end
    for j, set in ipairs(sets) do
      if set.n > 0 then
        call('ZADD', KEYS[first + j], 'XX', spread(set.added, 1, set.n))
        keep_alive(KEYS[first + j], set.lease)
      end
    end
    return table.concat(answers) .. fault
  end

  local function settle(op, first)
    local amount, replace, n, position = unpack('<dBB', op, 18)
    if not (amount >= 0 and amount <= MOST_MONEY) then error('ERR an amount is a number from 0', 0) end
    local record = KEYS[first + n + 1]
    local estimate, settled, at = get_record(record)
    if not estimate then return '\0' end
    if settled == amount then return '\2' end
    if settled >= 0 and replace == 0 then return '\3' end
    local periods = {}
    for j = 1, n do
      local ends
      ends, position = unpack('<d', op, position)
      periods[j] = load_period(KEYS[first + j], ends)
    end
    local life = math.min(touch(record), SETTLED)
    call('SET', record, pack('<ddd', estimate, amount, at), 'PX', life)
    for _, p in ipairs(periods) do change(p, amount - max(settled, 0), settled < 0 and -estimate or 0, at) end
    return '\1'
  end

  local function keep(op, first)
    local n, position = unpack('<B', op, 27)
    local record = KEYS[first + n + 1]
    local estimate, settled, at = get_record(record)
    if not estimate then return '\0' end
    if settled >= 0 or at == 0 then return '\2' end
    local periods = {}
    for j = 1, n do
      local ends
      ends, position = unpack('<d', op, position)
      periods[j] = load_period(KEYS[first + j], ends)
    end
    touch(record)
    call('SETRANGE', record, '16', pack('<d', 0))
    for _, p in ipairs(periods) do shift(p, estimate, at, 0) end
    return '\1'
  end

  local function shorten(key, lease)
    -- Lets leases that are longer than any can be end a lease from now.
    local number = call('ZCOUNT', key, '(' .. text(now + 2 * max(lease, LONGEST_LEASE)), '+inf')
    if number == 0 then return end
    for _, id in ipairs(call('ZRANGE', key, text(-math.min(number, 1000)), '-1')) do
      call('ZADD', key, 'XX', text(now + lease), id)
    end
    note_damage(key)
  end

  local function mend_slots(op, first)
    -- The same of all slot sets that a charge needs.
    local any = false
    for j = 1, byte(op, 2) do
      local is_slots = byte(op, 27 + (j - 1) * LIMIT_SIZE) == 67 -- C
      any = is_slots and drop_foreign(KEYS[first + j]) or any
    end
    return any
  end

  local function delete(op, first)
    for j = 1, byte(op, 2) do
      local key = KEYS[first + j]
      call('DEL', key)
      local s = states[key]
      if type(s) == 'table' then s.changed, states[key] = false, false end
    end
    return '\1'
  end

  made_rare = {
    shared = shared, flush = flush, decide_period = decide_period, finish = finish, sentence = sentence,
    repaired = repaired, shorten = shorten, drop_foreign = drop_foreign, mend_slots = mend_slots,
    open = open, forget = function() lapses = 0 end,
    [68] = delete, [75] = keep, [78] = renew, [83] = settle, -- D K N S
  }
  return made_rare
end

for pass = 1, 2 do -- an operation that fails, fails alone
  local step = pass == 1 and all_but_charges or all_charges
  place = 2
  while place <= #ARGV do
    local ok, fault = pcall(step)
    local said = not ok and rare().sentence(fault)
    local mended = said and pass == 2 and said:find('^WRONGTYPE') and rare().mend_slots(ARGV[place], firsts[place])
    if said then rare().forget() end
    if said and not mended then replies[place], place = 'E' .. said, place + 1 end
  end
end

local failed
for _, state in ipairs(order) do
  local ok, fault = pcall(rare().flush, state)
  if not ok then state.failed, failed = rare().sentence(fault), true end
end
for i = 2, failed and #ARGV or 0 do
  local charged = firsts[i] and byte(ARGV[i]) ~= 80 and byte(replies[i]) == 1
  for j = 1, charged and byte(ARGV[i], 2) or 0 do
    local state = states[KEYS[firsts[i] + j]]
    if type(state) == 'table' and state.failed then replies[i] = 'E' .. state.failed end
  end
end
if damaged > 0 then replies[#ARGV + 1] = damaged .. ' ' .. first_damaged end
return replies

end

return run()
