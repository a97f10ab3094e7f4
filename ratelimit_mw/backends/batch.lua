-- batch.lua: decides a batch of operations in one atomic step.
--
-- Guarantee: an operation is done whole or not at all, and one that fails (a key of the wrong type,
-- no memory) fails alone. Releases, renewals and settles run before charges. A key is read once and
-- written once per batch; in between the charges are decided in order on what was read.
--
-- KEYS   the keys of every operation, one operation after the other
-- ARGV   [1] the time in microseconds, or '' for the server's own TIME; [2..] an operation each, a letter
--        and packed little-endian fields:
--        A P  acquire, peek: id, cost, price, life of its record in ms (0: none), n, n limits;
--             keys: one for each limit, then the record
--        F    finish: id, mode, time and cost to give back to windows (time 0: nothing), n, n limits; mode 0
--             leaves money alone, 1 keeps the estimate, 2 gives it back; keys as above (mode 0: no record)
--        N    renew: id, lease, n; keys: n slot sets
--        S    settle: id, amount, replace (0 or 1), n, n ends of periods; keys: n periods, then the record
--        D    delete: n; keys: n
--        A limit is a letter and three doubles: W quota, length, granule; C limit, lease, 0; B limit, start
--        and end of the period. Times are in microseconds, amounts in micro-units.
-- Reply  [1] the time; then a string for each operation:
--        A P  a byte: 1 admitted, 0 refused, 2 TIME lies outside the period (nothing was charged); then
--             three 8-byte integers for each limit, as they are after the charge: W used, reset_after, retry_after;
--             C active, 0, retry; B spent, held, retry; retry over 0 where this limit refuses
--        F D  1
--        N    a byte for each slot: 1 renewed, 0 lost
--        S    1 settled, 2 settled before with this amount, 3 before with another, 0 no record
--        E    and a sentence, of any operation: it failed and changed nothing
-- Cost   three commands for a window, three for a slot set, two for a period: once for all the charges
--        of a batch; one to release a slot.
--
-- A window is a string: a header, then a ring of (time, cost) entries, oldest at `head`. A slot set is
-- a sorted set: lease id by expiry. A period is two doubles: spent and held. A record is two doubles:
-- the estimate and the settled amount (-1: none yet).

local HEADER, HEADER_SIZE = '<ddddI4I4I4I4', 48
local ENTRY, ENTRY_SIZE = '<dI4', 12
local CHUNK = 32
local spread, pack, unpack = unpack, struct.pack, struct.unpack
local floor, min, max = math.floor, math.min, math.max

local now
if ARGV[1] == '' then
  local time = redis.call('TIME')
  now = time[1] * 1000000 + time[2]
else
  now = tonumber(ARGV[1])
end

local states, order = {}, {} -- what was read of each key, and changed since

local function call(...)
  local reply = redis.pcall(...)
  if type(reply) == 'table' and reply.err then error(reply.err, 0) end
  return reply
end

local function remember(key, state)
  states[key], state.key = state, key
  order[#order + 1] = state
  return state
end

-- windows ---------------------------------------------------------------------------------------

local function entries(w, first, number)
  -- Reads up to `number` entries from the `first` after the head, as far as they lie in one piece.
  local at = (w.head + first) % w.cap
  number = min(number, w.cap - at)
  local from = HEADER_SIZE + at * ENTRY_SIZE
  return call('GETRANGE', w.key, from, from + number * ENTRY_SIZE - 1), number
end

local function rewrite(w, cap, change)
  -- Writes the live entries anew, in one piece, after `change(time, cost)` of each.
  local parts, first = {'', ''}, 0
  while first < w.count do
    local raw, number = entries(w, first, w.count - first)
    if change then
      for i = 0, number - 1 do
        parts[#parts + 1] = pack(ENTRY, change(unpack(ENTRY, raw, i * ENTRY_SIZE + 1)))
      end
    else
      parts[#parts + 1] = raw
    end
    first = first + number
  end
  parts[#parts + 1] = string.rep('\0', (cap - w.count) * ENTRY_SIZE)
  w.head, w.cap, w.ttl = 0, cap, now + w.life
  parts[1] = pack(HEADER, w.sum, w.oldest, w.newest, w.ttl, w.head, w.count, w.cap, w.newest_cost)
  call('SET', w.key, table.concat(parts), 'PX', floor(w.life / 1000))
end

local function step_back(w)
  -- The server's clock went back: what was stored as later happened now at the latest.
  w.newest, w.oldest = now, min(w.oldest, now)
  rewrite(w, w.cap, function(time, cost) return min(time, now), cost end)
end

local function expire(w)
  -- Steps over the entries that have left the window.
  local horizon = now - w.length
  while w.count > 0 and w.oldest <= horizon do
    local raw, number = entries(w, 0, min(w.count, CHUNK))
    local position = 1
    for _ = 1, number do
      local time, cost
      time, cost, position = unpack(ENTRY, raw, position)
      w.oldest = time
      if time > horizon then break end
      w.sum, w.head, w.count = w.sum - cost, (w.head + 1) % w.cap, w.count - 1
    end
  end
end

local function load_window(key, quota, length, granule)
  if states[key] then
    states[key].quota = quota
    return states[key]
  end
  local header = call('GETRANGE', key, 0, HEADER_SIZE - 1)
  local w = {kind = 'W', key = key, quota = quota, length = length, granule = granule, pending = 0}
  w.life = length + max(floor(length / 8), 1000000)
  if header == '' then
    w.sum, w.oldest, w.newest, w.ttl, w.head, w.count, w.cap, w.newest_cost = 0, 0, 0, 0, 0, 0, 0, 0
  elseif #header == HEADER_SIZE then
    w.sum, w.oldest, w.newest, w.ttl, w.head, w.count, w.cap, w.newest_cost = unpack(HEADER, header)
    if w.count > 0 then
      if w.newest > now then step_back(w) end
      expire(w)
    end
  else
    error('WRONGTYPE the key does not hold a window', 0)
  end
  return remember(key, w)
end

local function retry_after(w, quota, cost)
  -- Microseconds until `cost` fits: when the oldest entries that make room for it have left.
  local needed = w.sum + cost - quota
  if w.retry_needed == needed then return w.retry end
  local first, freed, wait = 0, 0, w.length
  while first < w.count and freed < needed do
    local raw, number = entries(w, first, min(w.count - first, CHUNK))
    local position = 1
    for _ = 1, number do
      local time, spent
      time, spent, position = unpack(ENTRY, raw, position)
      freed = freed + spent
      if freed >= needed then
        wait = time + w.length - now
        break
      end
    end
    first = first + number
  end
  w.retry_needed, w.retry = needed, wait
  return wait
end

local function reset_after(w)
  if w.count > 0 then return w.oldest + w.length - now end
  return w.pending > 0 and w.length or 0
end

local function shared_entry(w)
  if w.count == 0 then return false end
  return w.newest == now or (w.granule > 0 and floor(w.newest / w.granule) == floor(now / w.granule))
end

local function flush_window(w)
  if w.pending == 0 then return end
  if shared_entry(w) then
    w.newest_cost = w.newest_cost + w.pending
    if w.count == 1 then w.oldest = now end
  else
    if w.count == w.cap then
      local bound = w.granule > 0 and 1002 or w.quota
      local cap = max(4, floor(w.cap * 1.5) + 1)
      rewrite(w, w.count < bound and min(cap, bound) or cap)
    end
    w.count, w.newest_cost = w.count + 1, w.pending
    if w.count == 1 then w.oldest = now end
  end
  w.newest, w.pending = now, 0
  local at = (w.head + w.count - 1) % w.cap
  call('SETRANGE', w.key, HEADER_SIZE + at * ENTRY_SIZE, pack(ENTRY, now, w.newest_cost))
  local renewed = w.ttl < now + w.length
  if renewed then w.ttl = now + w.life end
  call('SETRANGE', w.key, 0,
    pack(HEADER, w.sum, w.oldest, w.newest, w.ttl, w.head, w.count, w.cap, w.newest_cost))
  if renewed then call('PEXPIRE', w.key, floor(w.life / 1000)) end
end

local function give_back_window(key, quota, length, granule, time, cost)
  -- Takes `cost` off the entry that the charge at `time` went into, if it is still there.
  local w = load_window(key, quota, length, granule)
  for first = w.count - 1, 0, -1 do
    local raw = entries(w, first, 1)
    local stored, spent = unpack(ENTRY, raw)
    if stored < time then return end
    if stored == time or (granule > 0 and floor(stored / granule) == floor(time / granule)) then
      cost = min(cost, spent)
      w.sum = w.sum - cost
      if first == w.count - 1 then w.newest_cost = spent - cost end
      local at = (w.head + first) % w.cap
      call('SETRANGE', key, HEADER_SIZE + at * ENTRY_SIZE, pack(ENTRY, stored, spent - cost))
      call('SETRANGE', key, 0,
        pack(HEADER, w.sum, w.oldest, w.newest, w.ttl, w.head, w.count, w.cap, w.newest_cost))
      return
    end
  end
end

-- slots -----------------------------------------------------------------------------------------

local function keep_alive(key, lease)
  -- The key outlives its longest lease: a life is lengthened here, never shortened.
  local life = floor(lease / 1000) + 1000
  if call('PTTL', key) < life then call('PEXPIRE', key, 2 * life) end
end

local function load_slots(key, limit)
  local s = states[key] or remember(key, {kind = 'C', count = call('ZCARD', key), added = {}, lease = 0})
  if s.count >= limit and not s.purged then
    s.count, s.purged = s.count - call('ZREMRANGEBYSCORE', key, '-inf', now), true
  end
  return s
end

local function live_slots(key)
  return {kind = 'C', count = call('ZCOUNT', key, string.format('(%.0f', now), '+inf')}
end

local function flush_slots(s)
  if #s.added == 0 then return end
  call('ZADD', s.key, spread(s.added))
  keep_alive(s.key, s.lease)
end

-- spending --------------------------------------------------------------------------------------

local KEPT = 172800000000 -- two days in microseconds: how long after its end a period can be settled

local function load_period(key, ends)
  local p = states[key]
  if p then return p end
  local raw = call('GET', key)
  p = {kind = 'B', ends = ends, spent = 0, held = 0}
  if raw then p.spent, p.held = unpack('<dd', raw) end
  return remember(key, p)
end

local function flush_period(p)
  if not p.changed then return end
  local life = max(floor((p.ends - now + KEPT) / 1000), 1)
  call('SET', p.key, pack('<dd', p.spent, p.held), 'PX', life)
end

-- charges ---------------------------------------------------------------------------------------

local function load_limit(kind, key, a, b, c, charge)
  if kind == 'W' then return load_window(key, a, b, c) end
  if kind == 'B' then return load_period(key, c) end
  return charge and load_slots(key, a) or live_slots(key)
end

local function fits(s, limit, cost, price)
  if s.kind == 'W' then return s.sum + cost <= limit end
  if s.kind == 'B' then return s.spent + s.held + price <= limit end
  return s.count < limit
end

local function figures(s, limit, cost, price)
  local refused = not fits(s, limit, cost, price)
  if s.kind == 'W' then
    return pack('<i8i8i8', s.sum, reset_after(s), refused and retry_after(s, limit, cost) or 0)
  elseif s.kind == 'B' then
    return pack('<i8i8i8', s.spent, s.held, refused and 1 or 0)
  end
  return pack('<i8i8i8', s.count, 0, refused and 1 or 0)
end

local function commit(s, id, lease, cost, price)
  if s.kind == 'W' then
    s.sum, s.pending = s.sum + cost, s.pending + cost
  elseif s.kind == 'B' then
    s.held, s.changed = s.held + price, true
  else
    s.count, s.lease = s.count + 1, max(s.lease, lease)
    s.added[#s.added + 1] = now + lease
    s.added[#s.added + 1] = id
  end
end

local touched = {} -- the states that each admitted charge has changed

local function acquire(i, op, keys)
  local charge = op:sub(1, 1) == 'A'
  local id, cost, price, life, n, position = unpack('<c16dddB', op, 2)
  local found, limits, leases, reply, admitted = {}, {}, {}, {}, true
  for j = 1, n do
    local kind, a, b, c
    kind, a, b, c, position = unpack('<c1ddd', op, position)
    if kind == 'B' and (now < b or now >= c) then return '\2' end
    found[j], limits[j], leases[j] = load_limit(kind, KEYS[keys + j], a, b, c, charge), a, b
    admitted = admitted and fits(found[j], a, cost, price)
  end
  if admitted and charge then
    if life > 0 then call('SET', KEYS[keys + n + 1], pack('<dd', price, -1), 'PX', life) end
    for j = 1, n do commit(found[j], id, leases[j], cost, price) end
    touched[i] = found
    cost, price = 0, 0
  end
  for j = 1, n do
    -- After its own charge a full slot set is full for the next one, not for this one.
    reply[j] = figures(found[j], admitted and math.huge or limits[j], cost, price)
  end
  return (admitted and '\1' or '\0') .. table.concat(reply)
end

-- what runs before charges ----------------------------------------------------------------------

local function close_record(key)
  -- Takes the record away; answers with what is held under it, or nil where no money is to move.
  local raw = call('GET', key)
  if not raw then return nil end
  call('DEL', key)
  local estimate, settled = unpack('<dd', raw)
  if settled < 0 then return estimate end
  return nil
end

local function finish(_, op, keys)
  local id, mode, time, cost, n, position = unpack('<c16BddB', op, 2)
  local held = mode > 0 and close_record(KEYS[keys + n + 1])
  for j = 1, n do
    local key, kind, a, b, c = KEYS[keys + j]
    kind, a, b, c, position = unpack('<c1ddd', op, position)
    if kind == 'C' then
      call('ZREM', key, id)
    elseif kind == 'W' and time > 0 then
      give_back_window(key, a, b, c, time, cost)
    elseif kind == 'B' and held then
      local p = load_period(key, c)
      p.held, p.changed = max(p.held - held, 0), true
      if mode == 1 then p.spent = p.spent + held end
    end
  end
  return '\1'
end

local function renew(_, op, keys)
  local id, lease, n = unpack('<c16dB', op, 2)
  local result = {}
  for j = 1, n do
    local key = KEYS[keys + j]
    local expiry = call('ZSCORE', key, id)
    local live = expiry and tonumber(expiry) > now
    if live then
      call('ZADD', key, 'XX', now + lease, id)
      keep_alive(key, lease)
    elseif expiry then
      call('ZREM', key, id)
    end
    result[j] = live and '\1' or '\0'
  end
  return table.concat(result)
end

local function settle(_, op, keys)
  local amount, replace, n, position = unpack('<dBB', op, 18)
  local record = KEYS[keys + n + 1]
  local raw = call('GET', record)
  if not raw then return '\0' end
  local estimate, settled = unpack('<dd', raw)
  if settled == amount then return '\2' end
  if settled >= 0 and replace == 0 then return '\3' end
  call('SET', record, pack('<dd', estimate, amount), 'PX', max(call('PTTL', record), 1))
  for j = 1, n do
    local ends
    ends, position = unpack('<d', op, position)
    local p = load_period(KEYS[keys + j], ends)
    if settled < 0 then p.held = max(p.held - estimate, 0) end
    p.spent, p.changed = p.spent + amount - max(settled, 0), true
  end
  return '\1'
end

local function delete(_, op, keys)
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
local HANDLERS = {A = acquire, P = acquire, F = finish, N = renew, S = settle, D = delete}

local function number_of_keys(op, kind)
  -- Read from the operation alone, so that one which fails cannot shift the keys of the next.
  if kind == 'A' or kind == 'P' then
    local _, _, _, life, n = unpack('<c16dddB', op, 2)
    return n + (life > 0 and 1 or 0)
  elseif kind == 'F' then
    local _, mode, _, _, n = unpack('<c16BddB', op, 2)
    return n + (mode > 0 and 1 or 0)
  elseif kind == 'N' then
    return (select(3, unpack('<c16dB', op, 2)))
  elseif kind == 'S' then
    return (select(4, unpack('<c16dBB', op, 2))) + 1
  end
  return (unpack('<B', op, 2))
end

local replies, charges, keys = {string.format('%.0f', now)}, {}, 0

local function run(i, keys_before)
  local op = ARGV[i]
  local ok, reply = pcall(HANDLERS[op:sub(1, 1)], i, op, keys_before)
  replies[i] = ok and reply or 'E' .. tostring(reply)
end

for i = 2, #ARGV do
  local kind = ARGV[i]:sub(1, 1)
  if kind == 'A' or kind == 'P' then
    charges[#charges + 1] = {i, keys}
  else
    run(i, keys)
  end
  keys = keys + number_of_keys(ARGV[i], kind)
end
for _, charge in ipairs(charges) do run(charge[1], charge[2]) end

local failed
for _, state in ipairs(order) do
  local ok, reply = pcall(FLUSH[state.kind], state)
  if not ok then state.failed, failed = tostring(reply), true end
end
if failed then
  for i, changed in pairs(touched) do
    for _, state in ipairs(changed) do
      if state.failed then replies[i] = 'E' .. state.failed end
    end
  end
end
return replies
