-- slot_repair.lua: mends slot sets.
--
-- Needs   sentence and note_damage (faults.lua).
-- Gives   drop_foreign(key): deletes what is no slot set; whether it was none
--         mended_slots(fault, op, first): the same for all slot sets of a charge that failed
--         shorten(key, lease): ends leases a lease from now that are longer than any can be

local LONGEST_LEASE = 2592000000000 -- thirty days in microseconds: the longest that a detached slot waits

local function drop_foreign(key)
  -- Deletes what is no slot set; whether it was none.
  local met = redis.pcall('ZCARD', key)
  if type(met) ~= 'table' or not met.err:find('^WRONGTYPE') then return false end
  call('DEL', key)
  note_damage(key)
  return true
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

local function mended_slots(fault, op, first)
  -- Deletes what is none of all the slot sets that a charge needs, if its fault tells of such; whether there was any.
  if not sentence(fault):find('^WRONGTYPE') then return false end
  local any, head, limit_size = false, CHARGE_HEAD, LIMIT_SIZE
  if byte(op) >= OWN_COSTS then head, limit_size = OWN_HEAD, OWN_SIZE end
  for j = 1, byte(op, 2) do
    local is_slots = byte(op, head + 1 + (j - 1) * limit_size) == SLOTS
    any = is_slots and drop_foreign(KEYS[first + j]) or any
  end
  return any
end
