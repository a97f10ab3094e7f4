-- batch.lua: decides a batch of operations in one atomic step.
--
-- Guarantee: an operation is done whole or not at all, and one that fails (a key of the wrong type,
-- no memory) fails alone; only a finish frees what it can when a slot set fails. Releases, renewals and
-- settles run before charges, and work when memory is full: their first write is one that frees. A key is
-- read once and written once per batch; in between the charges are decided in order on what was read.
--
-- KEYS   the keys of every operation, one operation after the other
-- ARGV   [1] D where no two charges have a key in common and none has a period, else S; and the time in
--        microseconds, or nothing for the server's own TIME; [2..] an operation each, a letter and packed
--        little-endian fields:
--        A P  acquire, peek: n, cost, price, life of its record in ms (0: none), n limits, ids;
--             keys: one for each limit, then the record
--        T    take ahead: as acquire, of windows alone. In place of the price the microseconds within which
--             the units will be used, at most an eighth of each window: they count from the end of that
--        F    finish: n, mode, time and cost to give back to windows (time 0: nothing), n limits, ids; mode 0
--             leaves money alone, 1 keeps the estimate, 2 gives it back; keys as above (mode 0: no record)
--        N    renew: id, lease, n; keys: n slot sets
--        S    settle: id, amount, replace (0 or 1), n, n ends of periods; keys: n periods, then the record
--        D    delete: n; keys: n
--        Ids: one, or as many as there are charges (releases) that differ in nothing else: they are decided
--             as if each were an operation of its own, one after the other. Not where money moves.
--        A limit is a letter and three doubles: W quota, length, granule; C limit, lease, 0; B limit, start
--        and end of the period. Times are in microseconds, amounts in micro-units.
-- Reply  [1] the time; then a string for each operation:
--        A P T  a byte: 1 admitted, 0 refused, 2 TIME lies outside the period (nothing was charged); then
--             three 8-byte integers for each limit, as they are after the charge: W used, reset_after, retry_after;
--             C active, 0, retry; B spent, held, retry; retry over 0 where this limit refuses.
--             Of several: 1 where any was admitted; the figures after the last one; and in two bytes how many
--             were, which are the first ones. Where these are not all, the figures are those of the refused, too
--        F D  1
--        N    a byte for each slot: 1 renewed, 0 lost
--        S    1 settled, 2 settled before with this amount, 3 before with another, 0 no record
--        E    and a sentence, of any operation: it failed and changed nothing
-- Cost   two commands for a window and one more for every fifth entry, three for a slot set, two for a period,
--        one to release the slots of an operation, four to renew one. No operation has a key twice.
--
-- A window is a string: a header, a stage for five entries of (time, cost), and a ring of them. The header
-- holds the newest entry; those before it gather on the stage, and move to the ring together. The ring has its
-- oldest at `head`, and room for at most half again as many as are live, and never for more than quota or
-- granules need. Times never decrease from entry to entry; one of units taken ahead lies up to `ahead` later
-- than they were taken. A slot set is a sorted set: lease id by expiry. A period is two doubles: spent and held.
-- A record is two doubles: the estimate and the settled amount (-1: none yet).
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
local ID_SIZE = 16
local LIMIT_SIZE = 25
local MOST_COST = 4294967295 -- what entries hold exactly, and what doubles do
local MOST_MONEY = 9007199254740992

local ARGV, KEYS = ARGV, KEYS
local call, pack, slice, byte = redis.call, struct.pack, string.sub, string.byte
local spread, unpack = unpack, struct.unpack

local function run() -- its functions find those above without a search

local time = slice(ARGV[1], 2)
if time == '' then
  local parts = call('TIME')
  time = parts[1] .. slice('00000' .. parts[2], -6)
end
local now = tonumber(time)

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

local function sentence(fault)
  local said = type(fault) == 'table' and fault.err or tostring(fault) -- Redis 7 raises a table
  return (said:gsub('^[@=]%S+: %-?%d+: %-?', '')) -- Redis 6 says where before it says what
end

local decide, upkeep, rare -- defined below

-- charges ---------------------------------------------------------------------------------------

local reply = {0, 0, 0, 0, 0, 0, 0, 0, 0} -- the figures of the charge in hand

local function decide_window(plan, limit, key, j, alone, admitted)
  local shared = not alone and rare().shared(key, limit)
  local read = shared and shared.raw or call('GETRANGE', key, '0', '107')
  if #read < HEADER_SIZE then read = upkeep().checked(read) end
  local raw, length, cost, sum, oldest, newest, dies, newest_cost, ahead, head, cap, ring, later =
    read, limit.length, plan.cost, unpack(HEADER, read)
  if newest <= now and oldest > now - length and ring <= cap then
    ahead = 0
  else
    raw = upkeep().refreshed(key, limit, read)
    sum, oldest, newest, dies, newest_cost, ahead, head, cap, ring, later = unpack(HEADER, raw)
  end
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
    elseif dies < newest + length or later > STAGED + 1 or cap > 1.5 * (ring + later) + 2 then
      raw = upkeep().written(key, limit, raw)
    else
      call('SETRANGE', key, '0', raw)
    end
  elseif alone and raw ~= read then
    redis.pcall('SETRANGE', key, '0', raw) -- steps that can't be written down are taken again
  end
  local at = 3 * j
  reply[at - 2], reply[at - 1] = sum, later > 0 and oldest + length - now or 0
  reply[at] = admitted < plan.number and upkeep().retry_after(key, limit, raw, plan.cost) or 0
  return admitted
end

local function keep_alive(key, lease, is_new)
  -- The key outlives its longest lease: a life is lengthened here, never shortened.
  local life = math.floor(lease / 1000) + 1000
  if is_new or call('PTTL', key) < life then call('PEXPIRE', key, text(2 * life)) end
end

local members = {'', ''} -- ids, or ids and when they expire, as arguments

local function decide_slots(plan, limit, key, j, alone, admitted)
  local shared, charges = not alone and rare().shared(key, limit), plan.charges
  local quota, lease, n, expired, count = limit.quota, limit.length, shared and shared.n or 0, 0, nil
  if charges then
    count = shared and shared.count or call('ZCARD', key)
    if count + plan.number > quota and not (shared and shared.purged) then
      expired = call('ZCOUNT', key, '-inf', now)
      count = count - expired
      if shared then shared.purged, shared.expired = true, expired end
    end
    if shared then shared.count = count end
  else
    count = call('ZCOUNT', key, '(' .. text(now), '+inf') + n / 2
  end
  if count + admitted > quota then admitted = math.max(quota - count, 0) end

  admitted = decide(plan, j + 1, alone, admitted)
  if not admitted then return nil end
  if admitted > 0 and charges then
    local added, expires, at = shared and shared.added or members, text(now + lease), plan.size + 1
    for i = n + 1, n + 2 * admitted, 2 do
      added[i], added[i + 1], at = expires, slice(plan.op, at, at + ID_SIZE - 1), at + ID_SIZE
    end
    if shared then
      shared.n, shared.lease = n + 2 * admitted, math.max(shared.lease, lease)
    else
      call('ZADD', key, spread(added, 1, 2 * admitted))
      if expired > 0 then call('ZREMRANGEBYSCORE', key, '-inf', now) end -- now that it cannot take the key away
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
  local kind, n, cost, price, life, position = unpack('<c1Bddd', said)
  if not (cost >= 1 and cost <= MOST_COST and cost % 1 == 0 and price >= 0 and price <= MOST_MONEY) then -- no NaN
    error('ERR a cost is a whole number from 1, a price one from 0', 0)
  end
  local plan = {
    charges = kind ~= 'P', cost = cost, price = kind ~= 'T' and price or 0, ahead = kind == 'T' and price or 0,
    life = life, answer = '<B' .. string.rep('i8i8i8', n), size = #said, n = n, number = 0, op = '', first = 0,
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
  if plan.life > 0 and plan.charges and admitted > 0 then
    call('SET', KEYS[plan.first + j], pack('<dd', plan.price, -1), 'PX', text(math.floor(plan.life)))
  end
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
    if kind == 65 or kind == 80 or kind == 84 then -- A P T
      firsts[place] = first
      for i = first + 1, looks and first + n or 0 do
        local key = KEYS[i]
        local known = states[key]
        shares = shares or known ~= nil
        if known == nil or known == true then states[key] = not known end
      end
      keys = first + n + (byte(op, 26) > 0 and 1 or 0) -- no life but 0 has a 0 there
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
          if type(freed) == 'table' then failed = freed end
        else
          others = true
        end
      end
      if others then rare().finish(op, first, n, mode) end
      replies[place] = failed and 'E' .. sentence(failed) or '\1'
    else -- D N S
      keys = first + (kind == 68 and n or kind == 78 and byte(op, 26) or byte(op, 27) + 1)
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
  local RING = 108 -- it begins behind the stage
  local CHUNK = 32
  local GRANULES = 1002 -- entries that a window of shared ones can have, and one to spare
  local MOST_ENTRIES = 2010 -- the same after its quota was raised past where sharing begins
  local MOST_OUTSIDE = 99 -- more than a batch puts outside of the ring

  local function checked(raw)
    if raw ~= '' and #raw < HEADER_SIZE then error('WRONGTYPE the key does not hold a window', 0) end
    return raw ~= '' and raw or string.rep('\0', HEADER_SIZE)
  end

  local function window(key, limit, raw)
    local w = { -- every field at once, as a table that grows costs more
      key = key, quota = limit.quota, length = limit.length, granule = limit.granule, stage = '',
      sum = 0, oldest = 0, newest = 0, dies = 0, cost = 0, ahead = 0, head = 0, cap = 0, ring = 0, later = 0,
    }
    w.sum, w.oldest, w.newest, w.dies, w.cost, w.ahead, w.head, w.cap, w.ring, w.later = unpack(HEADER, raw)
    if w.ring > w.cap or w.later > MOST_OUTSIDE then error('WRONGTYPE the key does not hold a window', 0) end
    w.stage = slice(raw, HEADER_SIZE + 1, HEADER_SIZE + (w.later - 1) * ENTRY_SIZE)
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
    return call('GETRANGE', w.key, text(from), text(from + number * ENTRY_SIZE - 1)), number
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

  local function lengthen_life(w)
    local life = w.length + max(floor(w.length / 8), 1000000)
    w.dies = now + life
    return text(floor(life / 1000))
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
    if w.dies == 0 or w.ring + moved > w.cap or w.cap > room then return rewrite(w, moved) end
    if moved > 0 then
      write_ring(w, w.ring, slice(w.stage, 1, moved * ENTRY_SIZE))
      w.ring, w.later, w.stage = w.ring + moved, w.later - moved, slice(w.stage, moved * ENTRY_SIZE + 1)
    end
    local life = w.dies < w.newest + w.length and lengthen_life(w)
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
    -- The window without what has left it; the short way where those are a few of the ring.
    local horizon = now - limit.length
    local sum, _, newest, dies, newest_cost, _, head, cap, ring, later = unpack(HEADER, raw)
    if newest <= now and newest > horizon and ring > 0 and ring <= cap and head < cap then
      local number, from = min(ring, cap - head, 4), RING + head * ENTRY_SIZE
      local piece = call('GETRANGE', key, text(from), text(from + number * ENTRY_SIZE - 1))
      for i = 0, number - 1 do
        local time, cost = unpack(ENTRY, piece, i * ENTRY_SIZE + 1)
        if time > horizon and cost > 0 then
          local stage = slice(raw, HEADER_SIZE + 1, HEADER_SIZE + (later - 1) * ENTRY_SIZE)
          return pack(WITH_STAGE, sum, time, newest, dies, newest_cost, 0, head + i, cap, ring - i, later, stage)
        end
        sum = sum - cost
      end
    end
    local w = window(key, limit, raw)
    if w.later == 0 or w.newest <= now then w.ahead = 0 end
    if w.later > 0 and w.newest > now + w.ahead then step_back(w) end
    if w.newest <= now - w.length then
      w.sum, w.head, w.ring, w.later, w.stage = 0, 0, 0, 0, ''
    elseif w.oldest <= now - w.length then
      step_over(w)
    end
    return raw_of(w)
  end

  local function retry_after(key, limit, raw, cost)
    -- Microseconds until `cost` fits: when the oldest entries that make room for it have left. 0 where it does.
    local w = window(key, limit, raw)
    local needed = w.sum + cost - w.quota
    if needed <= 0 then return 0 end
    for time, spent in each(w, 0) do
      needed = needed - spent
      if needed <= 0 then return time + w.length - now end
    end
    return w.length
  end

  local function give_back(key, limit, time, cost)
    -- Takes `cost` off the entry that the charge at `time` went into, if it is still there.
    local w = window(key, limit, refreshed(key, limit, checked(call('GETRANGE', key, '0', '107'))))
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

  made_upkeep = {checked = checked, refreshed = refreshed, written = written, retry_after = retry_after}
  made_upkeep.give_back = give_back
  return made_upkeep
end

function rare()
  -- What several charges share, spending, and other operations.
  if made_rare then return made_rare end
  local max = math.max
  local KEPT = 172800000000 -- two days in microseconds: how long after its end a period can be settled

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
      if s.raw ~= s.read then upkeep().written(s.key, s.limit, s.raw) end
    elseif s.letter == 'C' then
      if s.n == 0 then return end
      call('ZADD', s.key, spread(s.added, 1, s.n))
      if s.expired > 0 then call('ZREMRANGEBYSCORE', s.key, '-inf', now) end
      keep_alive(s.key, s.lease, false)
    elseif s.changed then
      local life = max(math.floor((s.ends - now + KEPT) / 1000), 1)
      call('SET', s.key, pack('<dd', s.spent, s.held), 'PX', life)
    end
  end

  local function load_period(key, ends)
    local p = states[key]
    if type(p) == 'table' then return p end
    local raw = call('GET', key)
    p = {key = key, letter = 'B', alone = p, ends = ends, spent = 0, held = 0, changed = false}
    if raw then p.spent, p.held = unpack('<dd', raw) end
    if not p.alone then states[key], order[#order + 1] = p, p end
    return p
  end

  local function change(p, spent, held)
    p.spent, p.held, p.changed = max(p.spent + spent, 0), max(p.held + held, 0), true
    if p.alone then flush(p) end
  end

  local function decide_period(plan, limit, key, j, alone, admitted)
    if now < limit.length or now >= limit.granule then return nil end
    local p = load_period(key, limit.granule)
    if p.spent + p.held + plan.price > limit.quota then admitted = 0 end
    admitted = decide(plan, j + 1, alone, admitted)
    if not admitted then return nil end
    if admitted > 0 and plan.charges then change(p, 0, plan.price) end
    local at, is_over = 3 * j, p.spent + p.held + plan.price > limit.quota
    reply[at - 2], reply[at - 1], reply[at] = p.spent, p.held, admitted < plan.number and is_over and 1 or 0
    return admitted
  end

  local function finish(op, first, n, mode)
    -- All of a finish but its slots.
    local _, _, time, cost, position = unpack('<BBdd', op, 2)
    local record, held, periods = mode > 0 and KEYS[first + n + 1], nil, {}
    local raw, settled = record and call('GET', record), nil
    if raw then held, settled = unpack('<dd', raw) end
    if raw and settled >= 0 then held = nil end
    for j = 1, n do
      local key, kind, quota, length, granule = KEYS[first + j], unpack('<c1ddd', op, position)
      if kind == 'W' and time > 0 then
        upkeep().give_back(key, {quota = quota, length = length, granule = granule}, time, cost)
      elseif kind == 'B' and held then
        periods[#periods + 1] = load_period(key, granule)
      end
      position = position + LIMIT_SIZE
    end
    if record then call('DEL', record) end
    for _, p in ipairs(periods) do change(p, mode == 1 and held or 0, -held) end
  end

  local function renew(op, first)
    local id, lease, n = unpack('<c16dB', op, 2)
    local present, result = {}, {}
    for j = 1, n do
      call('ZREMRANGEBYSCORE', KEYS[first + j], '-inf', now)
      present[j] = call('ZSCORE', KEYS[first + j], id)
    end
    for j = 1, n do
      local key = KEYS[first + j]
      if present[j] then
        call('ZADD', key, 'XX', now + lease, id)
        keep_alive(key, lease)
      end
      result[j] = present[j] and '\1' or '\0'
    end
    return table.concat(result)
  end

  local function settle(op, first)
    local amount, replace, n, position = unpack('<dBB', op, 18)
    if not (amount >= 0 and amount <= MOST_MONEY) then error('ERR an amount is a number from 0', 0) end
    local record = KEYS[first + n + 1]
    local raw = call('GET', record)
    if not raw then return '\0' end
    local estimate, settled = unpack('<dd', raw)
    if settled == amount then return '\2' end
    if settled >= 0 and replace == 0 then return '\3' end
    local periods = {}
    for j = 1, n do
      local ends
      ends, position = unpack('<d', op, position)
      periods[j] = load_period(KEYS[first + j], ends)
    end
    local life = max(call('PTTL', record), 1)
    call('PEXPIRE', record, life) -- a first write that is let through when memory is full
    call('SET', record, pack('<dd', estimate, amount), 'PX', life)
    for _, p in ipairs(periods) do change(p, amount - max(settled, 0), settled < 0 and -estimate or 0) end
    return '\1'
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
    shared = shared, flush = flush, decide_period = decide_period, finish = finish,
    [68] = delete, [78] = renew, [83] = settle, -- D N S
  }
  return made_rare
end

for pass = 1, 2 do -- an operation that fails, fails alone
  local step = pass == 1 and all_but_charges or all_charges
  place = 2
  while place <= #ARGV do
    local ok, fault = pcall(step)
    if not ok then replies[place], place = 'E' .. sentence(fault), place + 1 end
  end
end

local failed
for _, state in ipairs(order) do
  local ok, fault = pcall(rare().flush, state)
  if not ok then state.failed, failed = sentence(fault), true end
end
for i = 2, failed and #ARGV or 0 do
  local charged = firsts[i] and byte(ARGV[i]) ~= 80 and byte(replies[i]) == 1
  for j = 1, charged and byte(ARGV[i], 2) or 0 do
    local state = states[KEYS[firsts[i] + j]]
    if type(state) == 'table' and state.failed then replies[i] = 'E' .. state.failed end
  end
end
return replies

end

return run()
