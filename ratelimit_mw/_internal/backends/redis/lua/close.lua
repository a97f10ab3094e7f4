-- close.lua: closes open estimates of metered units: gives back what was not used of them.
--
-- Guarantee: an estimate is closed once, as it leaves the set of its meter. It works when memory is full: its first
-- write is one that frees. This is a script of its own, since a settle alone would pay more for making the functions of
-- batch.lua than for all that it does. It knows no time: what is taken off an entry that has left the window since goes
-- with it.
--
-- KEYS   for each estimate the open ones of its meter, and the windows of the meter
-- ARGV   an estimate each, packed little-endian: the lease's id, the time of the charge, the estimate, what is to be given
--        back, the number of windows, and quota, length and granule of each
-- Reply  a digit for each: 1 closed; 0 not open, since it has lapsed or was closed before, or the set refuses: then the
--        main script finds out
-- Cost   one command, and two for each window

-- include constants

local call, pack, parse, slice = redis.call, struct.pack, struct.unpack, string.sub
local answers, first, find_and_give_back = '', 0, nil

for index = 1, #ARGV do
  local op = ARGV[index]
  local time, _, cost, n, position = parse('<dddB', op, ID_SIZE + 1)
  local closed = redis.pcall('ZREM', KEYS[first + 1], slice(op, 1, MEMBER_SIZE))
  if closed == 1 then
    for i = 1, cost > 0 and n or 0 do
      local key, quota, length, granule = KEYS[first + 1 + i], nil, nil, nil
      quota, length, granule, position = parse('<ddd', op, position)
      local raw = redis.pcall('GETRANGE', key, '0', LAST_STAGED)
      if raw ~= '' then
        -- include window_recent
        if not changed then
          if not find_and_give_back then
            -- include close_rest
            find_and_give_back = give_back
          end
          local ok, found = pcall(find_and_give_back, key, quota, length, granule, raw, time, cost)
          changed = ok and found -- a damaged one is mended by the next charge
        end
        if changed then redis.pcall('SETRANGE', key, '0', changed) end -- what fails makes no room
      end
    end
  end
  answers, first = answers .. (closed == 1 and '1' or '0'), first + 1 + n
end
return answers
