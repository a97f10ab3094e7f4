-- figures.lua: adds what one worker has counted to the figures of the fleet.
--
-- Guarantee: figures are looked at, never decided by: nothing here touches a limit. However many callers
-- there are, a key keeps the `kept` members with the highest scores, and every key expires.
--
-- KEYS   counts of [1] plans in this bucket, [2] plans in these five minutes, [3] rules of routes in this
--        bucket, [4] callers in this bucket, [5] where watched callers come from; [6] who the callers are,
--        [7] the workers by when they were last seen, [8] what this worker says of itself,
--        [9] the callers whom somebody looks at, by when that ends
-- ARGV   [1] the worker's name, [2] what it says, [3] the time in seconds, [4] members that a key keeps,
--        [5] those that KEYS[2] keeps, [6] watched callers that are told at most, lives in ms of [7] KEYS[1],
--        [8] KEYS[2], [9] KEYS[3] to [6], [10] KEYS[7] and [8]; how many counts there are of [11] plans,
--        [12] rules, [13] callers, [14] sightings of watched callers; then those counts, each a name and a
--        number, and who the callers are
-- Reply  the server's TIME, and the watched callers
-- Cost   one command for each name (two for each plan), three for each key

local FIRST_COUNT = 15 -- index of the first count in ARGV
local id, about, now, kept, kept_of_day, most_watched, life_of_plans, life_of_day, life_of_callers,
  life_of_workers, plans, rules, callers, sightings = unpack(ARGV, 1, FIRST_COUNT - 1)

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
  for i = index, #ARGV do
    redis.call('ZADD', KEYS[6], now, ARGV[i])
  end
  trim(KEYS[6], kept, life_of_callers)
end
redis.call('ZADD', KEYS[7], now, id)
redis.call('ZREMRANGEBYSCORE', KEYS[7], '-inf', now - life_of_workers / 1000)
redis.call('PEXPIRE', KEYS[7], life_of_workers)
redis.call('SET', KEYS[8], about, 'PX', life_of_workers)
local watched = redis.call('ZRANGE', KEYS[9], now, '+inf', 'BYSCORE', 'LIMIT', 0, most_watched)
return {redis.call('TIME'), watched}
