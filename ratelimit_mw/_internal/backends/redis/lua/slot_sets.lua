-- slot_sets.lua: writes slot sets where more is to do than to add one id.
--
-- Needs   nothing but what batch.lua defines.
-- Gives   hold_slots(key, added, n, expired): adds ids with their expiry, and removes what has expired
--         keep_alive(key, lease): lengthens the key's life, where it is too short
--         lengthen(key, life): the same where it is known to be

local function lengthen(key, life)
  -- The key outlives its longest lease: a life is lengthened here, never shortened.
  call('PEXPIRE', key, text(2 * life))
  -- Once a lease, or those that have expired would count until the set is full.
  call('ZREMRANGEBYSCORE', key, '-inf', now)
end

local function keep_alive(key, lease)
  local life = math.floor(lease / 1000) + 1000
  if call('PTTL', key) < life then lengthen(key, life) end
end

local function hold_slots(key, added, n, expired)
  -- Those that have expired go after the others have come: the last one to go takes the key away, and of a key whose
  -- slot is moving nothing could be written then. Where memory is full they go first, which makes room.
  if expired == 0 then return call('ZADD', key, unpack(added, 1, n)) end
  local done = redis.pcall('ZADD', key, unpack(added, 1, n))
  call('ZREMRANGEBYSCORE', key, '-inf', now)
  if type(done) == 'table' then call('ZADD', key, unpack(added, 1, n)) end
end
