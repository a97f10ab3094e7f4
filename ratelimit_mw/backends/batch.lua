-- batch.lua: decides a batch of operations in one atomic step.
--
-- Guarantee: an operation is done whole or not at all, and one that fails (a key of the wrong type,
-- no memory) fails alone; only a finish frees what it can when a slot set fails. Releases, renewals and
-- settles run before charges, and work when memory is full: their first write is one that frees. A key is
-- read once and written once per batch; in between the charges are decided in order on what was read.
--
-- KEYS   the keys of every operation, one operation after the other
-- ARGV   [1] the time in microseconds, or '' for the server's own TIME; [2..] an operation each, a letter
--        and packed little-endian fields:
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
-- Cost   three commands for a window, three for a slot set, two for a period: once for all the charges
--        of a batch; one to release the slots of an operation, four to renew one.
--
-- A window is a string: a header, then a ring of (time, cost) entries, oldest at `head`, with room for at
-- most half again as many as are live, and never for more than quota or granules need. Times never decrease
-- from entry to entry; one of units taken ahead lies up to `ahead` later than they were taken. A slot set is
-- a sorted set: lease id by expiry. A period is two doubles: spent and held. A record is two doubles:
-- the estimate and the settled amount (-1: none yet).

local HEADER, HEADER_SIZE, LAST_OF_HEADER = '<ddddI4I4I4I4I4', 52, '51'
local ENTRY, ENTRY_SIZE = '<dI4', 12
local NO_ENTRY = string.rep('\0', ENTRY_SIZE)
local CHUNK = 32
local ID_SIZE, LIMIT_SIZE = 16, 25
local GRANULES = 1002 -- entries that a window of shared ones can have, and one to spare
local MOST_ENTRIES = 2010 -- the same after its quota was raised past where sharing begins
local MOST_COST, MOST_MONEY = 4294967295, 9007199254740992 -- what entries and doubles hold exactly
local spread, pack, unpack = unpack, struct.pack, struct.unpack
local slice, floor, min, max = string.sub, math.floor, math.min, math.max

local now
if ARGV[1] == '' then
  local time = redis.call('TIME')
  now = time[1] * 1000000 + time[2]
else
  now = tonumber(ARGV[1])
end

local states, order = {}, {} -- what was read of each key, and changed since

local texts = {} -- numbers as arguments: the same few times and places come again and again

local function text(number)
  local known = texts[number]
  if not known then
    known = string.format('%.0f', number)
    texts[number] = known
  end
  return known
end

local call = redis.call -- raises, and is caught where an operation is run

local function sentence(fault)
  local text = type(fault) == 'table' and fault.err or tostring(fault) -- Redis 7 raises a table
  return (text:gsub('^[@=]%S+: %-?%d+: %-?', '')) -- Redis 6 says where before it says what
end

local function remember(key, state)
  states[key] = state
  order[#order + 1] = state
  return state
end

-- windows ---------------------------------------------------------------------------------------

local function entries(w, first, number)
  -- Reads up to `number` entries from the `first` after the head, as far as they lie in one piece.
  local at = (w.head + first) % w.cap
  number = min(number, w.cap - at)
  local from = HEADER_SIZE + at * ENTRY_SIZE
  return call('GETRANGE', w.key, text(from), text(from + number * ENTRY_SIZE - 1)), number
end

local function entry(w, i)
  return unpack(ENTRY, (entries(w, i, 1)))
end

local function write_entry(w, i, time, cost)
  local at = (w.head + i) % w.cap
  call('SETRANGE', w.key, text(HEADER_SIZE + at * ENTRY_SIZE), pack(ENTRY, time, cost))
end

local function packed_header(w)
  return pack(HEADER, w.sum, w.oldest, w.newest, w.ttl, w.head, w.count, w.cap, w.newest_cost, w.ahead)
end

local function write_header(w)
  call('SETRANGE', w.key, '0', packed_header(w))
end

local function rewrite(w, cap)
  -- Writes the live entries anew, in one piece; the newest was not written before.
  local parts, first = {'', ''}, 0
  while first < w.count - 1 do
    local raw, number = entries(w, first, w.count - 1 - first)
    parts[#parts + 1] = raw
    first = first + number
  end
  parts[#parts + 1] = pack(ENTRY, w.newest, w.newest_cost)
  parts[#parts + 1] = string.rep(NO_ENTRY, cap - w.count)
  w.head, w.cap, w.ttl = 0, cap, now + w.life
  parts[1] = packed_header(w)
  call('SET', w.key, table.concat(parts), 'PX', text(floor(w.life / 1000)))
end

local function first_since(w, time)
  -- The place of the first entry at `time` or later; the count where there is none.
  local low, high = 0, w.count
  while low < high do
    local middle = floor((low + high) / 2)
    if entry(w, middle) < time then low = middle + 1 else high = middle end
  end
  return low
end

local function step_back(w)
  -- The server's clock went back: what was stored as later happened now at the latest, in one entry. What
  -- was taken ahead is used as much later as it could be when it was taken.
  local latest = now + w.ahead
  local first, total = first_since(w, latest + 1), 0
  local at = first
  while at < w.count do
    local raw, number = entries(w, at, min(w.count - at, CHUNK))
    for i = 0, number - 1 do
      local _, cost = unpack(ENTRY, raw, i * ENTRY_SIZE + 1)
      total = total + cost
    end
    at = at + number
  end
  w.count, w.newest, w.newest_cost, w.ttl = first + 1, latest, total, now + w.life
  if first == 0 then w.oldest = latest end
  write_entry(w, first, latest, total)
  write_header(w)
  call('PEXPIRE', w.key, floor(w.life / 1000))
end

local function step_over(w)
  -- Steps over the entries that have left the window, and those of which all was given back.
  local horizon = now - w.length
  while w.count > 0 do
    local raw, number = entries(w, 0, min(w.count, CHUNK))
    local position = 1
    for _ = 1, number do
      local time, cost
      time, cost, position = unpack(ENTRY, raw, position)
      if time > horizon and cost > 0 then
        w.oldest = time
        return
      end
      w.sum, w.head, w.count = w.sum - cost, (w.head + 1) % w.cap, w.count - 1
    end
    w.stepped = true -- far enough to be written down, though nothing may be charged
  end
end

local function expire(w)
  if w.count == 0 or w.newest <= now then w.ahead = 0 end
  if w.count == 0 then return end
  if w.newest > now + w.ahead then step_back(w) end
  local horizon = now - w.length
  if w.newest <= horizon then
    w.sum, w.head, w.count = 0, 0, 0
  elseif w.oldest <= horizon then
    step_over(w)
  end
end

local function load_window(key, quota, length, granule)
  local w = states[key]
  if w then
    w.quota, w.granule = max(w.quota, quota), max(w.granule, granule)
    return w
  end
  local header = call('GETRANGE', key, '0', LAST_OF_HEADER)
  w = { -- every field at once: a table that grows costs more than the commands
    kind = 'W', key = key, quota = quota, length = length, granule = granule, pending = 0,
    life = length + max(floor(length / 8), 1000000),
    sum = 0, oldest = 0, newest = 0, ttl = 0, head = 0, count = 0, cap = 0, newest_cost = 0,
    ahead = 0, joins = false, stamp = 0,
  }
  if #header == HEADER_SIZE then
    w.sum, w.oldest, w.newest, w.ttl, w.head, w.count, w.cap, w.newest_cost, w.ahead =
      unpack(HEADER, header)
    if w.count > w.cap or w.head >= max(w.cap, 1) then error('WRONGTYPE the key does not hold a window', 0) end
    expire(w)
  elseif header ~= '' then
    error('WRONGTYPE the key does not hold a window', 0)
  end
  return remember(key, w)
end

local function retry_after(w, quota, cost)
  -- Microseconds until `cost` fits: when the oldest entries that make room for it have left.
  local needed = w.sum + cost - quota
  if w.retry_needed == needed then return w.retry end
  local first, freed, wait = 0, 0, w.length + (w.pending > 0 and w.stamp - now or 0)
  while first < w.count and freed < needed do
    local raw, number = entries(w, first, min(w.count - first, CHUNK))
    local position = 1
    for _ = 1, number do
      local time, spent
      time, spent, position = unpack(ENTRY, raw, position)
      freed, first = freed + spent, first + 1
      if freed >= needed then
        if first == w.count then time = w.newest end -- which a charge of this batch may have joined
        wait = time + w.length - now
        break
      end
    end
  end
  w.retry_needed, w.retry = needed, wait
  return wait
end

local function reset_after(w)
  if w.count > 0 then return w.oldest + w.length - now end
  return w.pending > 0 and w.stamp + w.length - now or 0
end

local function charge_window(w, cost, ahead)
  -- All charges of a batch go into one entry, under the latest of their times.
  local stamp = now + ahead
  if w.count > 0 and w.newest > stamp then stamp = w.newest end -- of what another has taken ahead
  if w.pending == 0 then
    w.joins = w.count > 0
      and (w.newest == stamp or (w.granule > 0 and floor(w.newest / w.granule) == floor(stamp / w.granule)))
    w.stamp = stamp
  elseif stamp > w.stamp then
    w.stamp = stamp
  end
  if w.joins then
    w.newest = w.stamp
    if w.count == 1 then w.oldest = w.stamp end
  end
  if ahead > w.ahead then w.ahead = ahead end
  w.sum, w.pending = w.sum + cost, w.pending + cost
  if w.retry_needed then w.retry_needed = nil end
end

local function fitting(w)
  -- How many entries the ring should have room for.
  local count, bound = w.count, w.granule > 0 and GRANULES or w.quota
  if count <= w.cap and w.cap <= 1.5 * count + 6 then return w.cap end
  if count > bound then bound = MOST_ENTRIES end -- the quota was lowered, or raised
  return max(count, min(max(floor(1.25 * count), count + 3), bound))
end

local function append(w)
  w.count, w.newest, w.newest_cost = w.count + 1, w.stamp, w.pending
  if w.count == 1 then w.oldest = w.stamp end
end

local function flush_window(w)
  if states[w.key] ~= w or (w.pending == 0 and not w.stepped) then return end
  if w.pending > 0 then
    if w.joins then
      w.newest_cost = w.newest_cost + w.pending
    else
      append(w)
      local cap = fitting(w)
      if cap ~= w.cap then return rewrite(w, cap) end
    end
    write_entry(w, w.count - 1, w.newest, w.newest_cost)
  end
  local renewed = w.pending > 0 and w.ttl < w.newest + w.length
  if renewed then w.ttl = now + w.life end
  write_header(w)
  if renewed then call('PEXPIRE', w.key, text(floor(w.life / 1000))) end
end

local function give_back_window(key, quota, length, granule, time, cost)
  -- Takes `cost` off the entry that the charge at `time` went into, if it is still there.
  local w = load_window(key, quota, length, granule)
  local i = first_since(w, time)
  if i == w.count then return end
  local stored, spent = entry(w, i)
  if stored ~= time and (granule == 0 or floor(stored / granule) ~= floor(time / granule)) then return end
  cost = min(cost, spent)
  w.sum = w.sum - cost
  if i == w.count - 1 then w.newest_cost = spent - cost end
  write_entry(w, i, stored, spent - cost)
  if i == 0 then step_over(w) end
  write_header(w)
end

-- slots -----------------------------------------------------------------------------------------

local function keep_alive(key, lease, is_new)
  -- The key outlives its longest lease: a life is lengthened here, never shortened.
  local life = floor(lease / 1000) + 1000
  if is_new or call('PTTL', key) < life then call('PEXPIRE', key, text(2 * life)) end
end

local function load_slots(key, limit, number)
  local s = states[key]
  if not s then
    local count = call('ZCARD', key)
    s = {kind = 'C', key = key, count = count, is_new = count == 0, purged = false, added = false, lease = 0}
    remember(key, s)
  end
  if s.count + number > limit and not s.purged then
    s.count, s.purged = s.count - call('ZREMRANGEBYSCORE', key, '-inf', now), true
  end
  return s
end

local function live_slots(key)
  local s, live = states[key], call('ZCOUNT', key, string.format('(%.0f', now), '+inf')
  return {kind = 'C', count = live + (s and s.added and #s.added / 2 or 0)}
end

local function flush_slots(s)
  if not s.added then return end
  call('ZADD', s.key, spread(s.added))
  keep_alive(s.key, s.lease, s.is_new)
end

-- spending --------------------------------------------------------------------------------------

local KEPT = 172800000000 -- two days in microseconds: how long after its end a period can be settled

local function load_period(key, ends)
  local p = states[key]
  if p then return p end
  local raw = call('GET', key)
  p = {kind = 'B', key = key, ends = ends, spent = 0, held = 0, changed = false}
  if raw then p.spent, p.held = unpack('<dd', raw) end
  return remember(key, p)
end

local function flush_period(p)
  if not p.changed then return end
  local life = max(floor((p.ends - now + KEPT) / 1000), 1)
  call('SET', p.key, pack('<dd', p.spent, p.held), 'PX', life)
end

-- charges ---------------------------------------------------------------------------------------

local function load_limit(kind, key, a, b, c, number)
  if kind == 'W' then return load_window(key, a, b, c) end
  if kind == 'B' then return load_period(key, c) end
  return number > 0 and load_slots(key, a, number) or live_slots(key)
end

local function fitting(s, limit, cost, price, number)
  -- How many of `number` charges fit, one after the other; of money, of which there is never more than one.
  if s.kind == 'W' then
    if s.sum + number * cost <= limit then return number end
    return max(floor((limit - s.sum) / cost), 0)
  elseif s.kind == 'B' then
    return s.spent + s.held + price <= limit and number or 0
  end
  return s.count + number <= limit and number or max(limit - s.count, 0)
end

local function figures(s, limit, cost, price)
  -- The three figures of a limit; where it refuses, the last is not 0. `limit` is nil where it did not.
  local refused = limit and fitting(s, limit, cost, price, 1) < 1
  if s.kind == 'W' then
    return s.sum, reset_after(s), refused and retry_after(s, limit, cost) or 0
  elseif s.kind == 'B' then
    return s.spent, s.held, refused and 1 or 0
  end
  return s.count, 0, refused and 1 or 0
end

local function take_slots(s, lease, op, at, number)
  local expires, added = text(now + lease), s.added
  if not added then
    added = {}
    s.added = added
  end
  for _ = 1, number do
    added[#added + 1] = expires
    added[#added + 1] = slice(op, at, at + ID_SIZE - 1)
    at = at + ID_SIZE
  end
  s.count, s.lease = s.count + number, max(s.lease, lease)
end

local function ids_of(op, at)
  -- One by one, as arguments.
  if #op < at + ID_SIZE then return slice(op, at) end
  local ids = {}
  for i = 1, (#op + 1 - at) / ID_SIZE do
    ids[i] = slice(op, at, at + ID_SIZE - 1)
    at = at + ID_SIZE
  end
  return spread(ids)
end

local plans = {} -- what a charge says but for its ids, which is the same for most of one plan

local function plan_of(op)
  local n = op:byte(2)
  local size = 26 + n * LIMIT_SIZE
  local said = slice(op, 1, size)
  local plan = plans[said]
  if plan then return plan end
  local kind, _, cost, price, life, position = unpack('<c1Bddd', said)
  plan = {
    n = n, size = size, n_keys = n + (life > 0 and 1 or 0), charges = kind ~= 'P',
    cost = cost, price = price, ahead = 0, life = life,
    valid = cost >= 1 and cost <= MOST_COST and cost % 1 == 0 and price >= 0 and price <= MOST_MONEY, -- no NaN
    kinds = {}, a = {}, b = {}, c = {}, answer = '<B' .. string.rep('i8i8i8', n),
  }
  if kind == 'T' then plan.ahead, plan.price = price, 0 end
  for j = 1, n do
    plan.kinds[j], plan.a[j], plan.b[j], plan.c[j], position = unpack('<c1ddd', said, position)
  end
  plans[said] = plan
  return plan
end

local found, reply = {}, {} -- of the charge in hand: made once, not for each

local function acquire(op, keys, plan)
  if not plan.valid then error('ERR a cost is a whole number from 1, a price one from 0', 0) end
  local n, cost, price, charges = plan.n, plan.cost, plan.price, plan.charges
  local kinds, a, b, c = plan.kinds, plan.a, plan.b, plan.c
  local number = (#op - plan.size) / ID_SIZE
  local admitted = number
  for j = 1, n do
    if kinds[j] == 'B' and (now < b[j] or now >= c[j]) then return '\2' end
    local s = load_limit(kinds[j], KEYS[keys + j], a[j], b[j], c[j], charges and number or 0)
    found[j], admitted = s, fitting(s, a[j], cost, price, admitted)
  end
  if admitted > 0 and charges then
    if plan.life > 0 then
      call('SET', KEYS[keys + n + 1], pack('<dd', price, -1), 'PX', text(floor(plan.life)))
    end
    for j = 1, n do
      local s = found[j]
      if s.kind == 'W' then
        charge_window(s, admitted * cost, plan.ahead)
      elseif s.kind == 'B' then
        s.held, s.changed = s.held + price, true
      else
        take_slots(s, b[j], op, plan.size + 1, admitted)
      end
    end
  end
  local at = 1
  for j = 1, n do
    reply[at], reply[at + 1], reply[at + 2] = figures(found[j], admitted < number and a[j], cost, price)
    at = at + 3
  end
  local answer = pack(plan.answer, admitted > 0 and 1 or 0, spread(reply, 1, at - 1))
  return number == 1 and answer or answer .. pack('<I2', admitted)
end

-- what runs before charges ----------------------------------------------------------------------

local function held_under(record)
  -- What the record of a charge holds; nil where there is none or it was settled.
  local raw = call('GET', record)
  local estimate, settled = 0, 0
  if raw then estimate, settled = unpack('<dd', raw) end
  return settled < 0 and estimate or nil
end

local function finish(op, keys)
  local n, mode, time, cost, position = unpack('<BBdd', op, 2)
  local record = mode > 0 and KEYS[keys + n + 1]
  local held = record and held_under(record)
  local ids, periods, failed = position + n * LIMIT_SIZE, {}, nil
  for j = 1, n do
    local key, kind = KEYS[keys + j], slice(op, position, position)
    if kind == 'C' then
      local ok, fault = pcall(call, 'ZREM', key, ids_of(op, ids))
      if not ok then failed = fault end
    elseif kind == 'W' and time > 0 then
      local a, b, c = unpack('<ddd', op, position + 1)
      give_back_window(key, a, b, c, time, cost)
    elseif kind == 'B' and held then
      local ends = unpack('<d', op, position + 17)
      periods[#periods + 1] = load_period(key, ends)
    end
    position = position + LIMIT_SIZE
  end
  if record then call('DEL', record) end
  for _, p in ipairs(periods) do
    p.held, p.changed = max(p.held - held, 0), true
    if mode == 1 then p.spent = p.spent + held end
  end
  if failed then error(sentence(failed), 0) end
  return '\1'
end

local function renew(op, keys)
  local id, lease, n = unpack('<c16dB', op, 2)
  local present, result = {}, {}
  for j = 1, n do
    call('ZREMRANGEBYSCORE', KEYS[keys + j], '-inf', now)
    present[j] = call('ZSCORE', KEYS[keys + j], id)
  end
  for j = 1, n do
    local key = KEYS[keys + j]
    if present[j] then
      call('ZADD', key, 'XX', now + lease, id)
      keep_alive(key, lease)
    end
    result[j] = present[j] and '\1' or '\0'
  end
  return table.concat(result)
end

local function settle(op, keys)
  local amount, replace, n, position = unpack('<dBB', op, 18)
  if not (amount >= 0 and amount <= MOST_MONEY) then error('ERR an amount is a number from 0', 0) end
  local record = KEYS[keys + n + 1]
  local raw = call('GET', record)
  if not raw then return '\0' end
  local estimate, settled = unpack('<dd', raw)
  if settled == amount then return '\2' end
  if settled >= 0 and replace == 0 then return '\3' end
  local periods = {}
  for j = 1, n do
    local ends
    ends, position = unpack('<d', op, position)
    periods[j] = load_period(KEYS[keys + j], ends)
  end
  local life = max(call('PTTL', record), 1)
  call('PEXPIRE', record, life) -- a first write that is let through when memory is full
  call('SET', record, pack('<dd', estimate, amount), 'PX', life)
  for _, p in ipairs(periods) do
    if settled < 0 then p.held = max(p.held - estimate, 0) end
    p.spent, p.changed = max(p.spent + amount - max(settled, 0), 0), true
  end
  return '\1'
end

local function delete(op, keys)
  for j = 1, unpack('<B', op, 2) do
    local key = KEYS[keys + j]
    call('DEL', key)
    local s = states[key]
    if s then s.changed, states[key] = false, nil end
  end
  return '\1'
end

-- the batch -------------------------------------------------------------------------------------

local FLUSH = {W = flush_window, C = flush_slots, B = flush_period}
local HANDLERS = {F = finish, N = renew, S = settle, D = delete}
local CHARGES = {A = true, P = true, T = true}

local function number_of_keys(op, kind)
  -- Read from the operation alone, so that one which fails cannot shift the keys of the next.
  if kind == 'F' then
    return op:byte(2) + (op:byte(3) > 0 and 1 or 0)
  elseif kind == 'N' then
    return (select(3, unpack('<c16dB', op, 2)))
  elseif kind == 'S' then
    return (select(4, unpack('<c16dBB', op, 2))) + 1
  end
  return (unpack('<B', op, 2))
end

local replies, charges, charge_plans, keys_before, keys = {string.format('%.0f', now)}, {}, {}, {}, 0

for i = 2, #ARGV do
  local op = ARGV[i]
  local kind = slice(op, 1, 1)
  if CHARGES[kind] then
    local plan = plan_of(op)
    charges[#charges + 1], charge_plans[i], keys_before[i] = i, plan, keys
    keys = keys + plan.n_keys
  else
    local ok, answer = pcall(HANDLERS[kind], op, keys)
    replies[i] = ok and answer or 'E' .. sentence(answer)
    keys = keys + number_of_keys(op, kind)
  end
end
for _, i in ipairs(charges) do
  local ok, answer = pcall(acquire, ARGV[i], keys_before[i], charge_plans[i])
  replies[i] = ok and answer or 'E' .. sentence(answer)
end

local failed
for _, state in ipairs(order) do
  local ok, fault = pcall(FLUSH[state.kind], state)
  if not ok then state.failed, failed = sentence(fault), true end
end
if failed then
  for _, i in ipairs(charges) do
    local plan = charge_plans[i]
    local charged = plan.charges and replies[i]:byte(1) == 1
    for j = 1, charged and plan.n or 0 do
      local state = states[KEYS[keys_before[i] + j]]
      if state and state.failed then replies[i] = 'E' .. state.failed end
    end
  end
end
return replies
