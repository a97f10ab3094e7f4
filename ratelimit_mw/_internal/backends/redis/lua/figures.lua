-- figures.lua: adds what one worker has counted to the figures of the fleet.
--
-- Guarantee: figures are looked at, never decided by: nothing here touches a limit. However many callers
-- there are, a key keeps the `kept` members with the highest scores, and every key expires.
--
-- KEYS   counts of [1] plans in this bucket, [2] plans in these five minutes, [3] rules of routes in this
--        bucket, [4] callers in this bucket, [5] where watched callers come from; [6] who the callers are
-- ARGV   [1] the time in seconds, [2] members that a key keeps, [3] those that KEYS[2] keeps, lives in ms of
--        [4] KEYS[1], [5] KEYS[2], [6] KEYS[3] to [6]; how many counts there are of [7] plans, [8] rules,
--        [9] callers, [10] sightings of watched callers; then those counts, each a name and a number, and who
--        the callers are
-- Reply  1
-- Cost   one command for each count (two for each plan), one for all callers, two for each key

local FIRST_COUNT = 11 -- index of the first count in ARGV
local now, kept, kept_of_day, life_of_plans, life_of_day, life_of_callers, plans, rules, callers, sightings =
  unpack(ARGV, 1, FIRST_COUNT - 1)

local function trim(key, number, life)
  redis.call('ZREMRANGEBYRANK', key, 0, -number - 1)
  redis.call('PEXPIRE', key, life)
end

-- Adds `number` counts that begin at ARGV[first] to a key; returns where the next ones begin.
local function add(key, first, number, most, life)
  local after = first + 2 * number -- `number` is a text until it is reckoned with, as ARGV is
  for i = first, after - 1, 2 do
    redis.call('ZADD', key, 'INCR', ARGV[i + 1], ARGV[i])
  end
  if after > first then
    trim(key, most, life)
  end
  return after
end

local index = add(KEYS[1], FIRST_COUNT, plans, kept, life_of_plans)
add(KEYS[2], FIRST_COUNT, plans, kept_of_day, life_of_day)
index = add(KEYS[3], index, rules, kept, life_of_callers)
index = add(KEYS[4], index, callers, kept, life_of_callers)
index = add(KEYS[5], index, sightings, kept, life_of_callers)
if ARGV[index] then
  local seen = {}
  for i = index, #ARGV do
    seen[#seen + 1], seen[#seen + 2] = now, ARGV[i]
  end
  redis.call('ZADD', KEYS[6], unpack(seen)) -- some 120 at most: those that a report names
  trim(KEYS[6], kept, life_of_callers)
end
return 1
