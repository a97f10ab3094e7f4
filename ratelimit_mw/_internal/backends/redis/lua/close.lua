-- close.lua: closes open estimates of metered units: gives back what was not used of them.
--
-- Guarantee: an estimate is closed once, as it leaves the set of its meter. It works when memory is full: its first
-- write is one that frees. This is a script of its own, since a settle alone would pay more for making the functions of
-- batch.lua than for all that it does. It knows no time: what is taken off an entry that has left the window since goes
-- with it.
--
-- KEYS   for each meter its open estimates, and its windows
-- ARGV   a meter each, packed little-endian: the number of its windows, and quota, length and granule of each; then for
--        each estimate the lease's id, the time of the charge, the estimate, and what is to be given back
-- Reply  a digit for each estimate: 1 closed; 0 not open, since it has lapsed or was closed before, or the set refuses:
--        then the main script finds out
-- Cost   one command for each estimate, and two for each window of a meter

-- include constants

local call, pack, parse, slice = redis.call, struct.pack, struct.unpack, string.sub
local answers, first, find_and_give_back = '', 1, nil

for index = 1, #ARGV do
  local op = ARGV[index]
  local n, open = string.byte(op), KEYS[first]
  -- What is given back of charges at one time, as most are that share a call; and by time, of others.
  local at_once, total, others = 0, 0, nil
  for at = 2 + n * METER_WINDOW, #op, CLOSED_SIZE do
    local closed = redis.pcall('ZREM', open, slice(op, at, at + MEMBER_SIZE - 1))
    if closed == 1 then
      local charged, _, unused = parse('<ddd', op, at + ID_SIZE)
      if total == 0 or charged == at_once then
        at_once, total = charged, total + unused
      elseif unused > 0 then
        others = others or {}
        others[charged] = (others[charged] or 0) + unused
      end
    end
    answers = answers .. (closed == 1 and '1' or '0')
  end
  for i = 1, total > 0 and n or 0 do
    local key, quota, length, granule = KEYS[first + i], parse('<ddd', op, 2 + (i - 1) * METER_WINDOW)
    local raw, is_changed = redis.pcall('GETRANGE', key, '0', LAST_STAGED), false
    local time, cost = at_once, total
    while time and raw ~= '' do
      -- include window_recent
      if not changed then
        if not find_and_give_back then
          -- include close_rest
          find_and_give_back = give_back
        end
        local ok, found = pcall(find_and_give_back, key, quota, length, granule, raw, time, cost)
        changed = ok and found -- a damaged one is mended by the next charge
      end
      if changed then raw, is_changed = others and changed .. slice(raw, #changed + 1) or changed, true end
      if others then time, cost = next(others, time ~= at_once and time or nil) else time = nil end
    end
    if is_changed then redis.pcall('SETRANGE', key, '0', raw) end -- what fails makes no room
  end
  first = first + 1 + n
end
return answers
