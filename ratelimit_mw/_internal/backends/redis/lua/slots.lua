-- slots.lua: decides and charges slot sets.
--
-- A slot set is a sorted set: lease id by expiry.
--
-- Needs   `decide`, which decides the next limit; `rare` (sharing.lua, slot_repair.lua) where several charges share a
--         set, or it is full
-- Gives   decide_slots(plan, limit, key, j, alone, admitted): as decide_window of windows.lua
--         hold_slots(key, added, n, expired): adds ids with their expiry, and removes what has expired
--         keep_alive(key, lease, is_new): lengthens the key's life
--         members: a table for arguments, ids among them
-- Cost    three commands for a charge

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
