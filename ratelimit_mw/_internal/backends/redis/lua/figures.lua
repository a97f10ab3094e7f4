-- figures.lua: adds what one worker has counted to the figures of the fleet.
--
-- Guarantee: figures are looked at, never decided by: nothing here touches a limit. However many callers
-- there are, a key keeps the `kept` members with the highest scores, and every key expires.
--
-- KEYS   [1] counts of plans in this bucket, [2] counts of callers in this bucket, [3] who the callers are,
--        [4] the workers by when they were last seen, [5] what this worker says of itself
-- ARGV   [1] the worker's name, [2] what it says, [3] the time in seconds, [4] members that a key keeps,
--        [5] lives in ms of KEYS[1], [6] of KEYS[2] and [3], [7] of KEYS[4] and [5];
--        [8] n and [9] m; then n names and counts of plans, m names and counts of callers, and who they are
-- Reply  the server's TIME
-- Cost   one command for each name, three for each key

local id, about, now, kept = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local life_of_totals, life_of_callers, life_of_workers = ARGV[5], ARGV[6], ARGV[7]
local first_caller = 10 + 2 * tonumber(ARGV[8])
local first_identity = first_caller + 2 * tonumber(ARGV[9])

local function keep(key, life)
  redis.call('ZREMRANGEBYRANK', key, 0, -kept - 1)
  redis.call('PEXPIRE', key, life)
end

local function add(key, first, last, life)
  for i = first, last, 2 do
    redis.call('ZADD', key, 'INCR', ARGV[i + 1], ARGV[i])
  end
  if last > first then
    keep(key, life)
  end
end

add(KEYS[1], 10, first_caller - 1, life_of_totals)
add(KEYS[2], first_caller, first_identity - 1, life_of_callers)
if ARGV[first_identity] then
  for i = first_identity, #ARGV do
    redis.call('ZADD', KEYS[3], now, ARGV[i])
  end
  keep(KEYS[3], life_of_callers)
end
redis.call('ZADD', KEYS[4], now, id)
redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', now - life_of_workers / 1000)
redis.call('PEXPIRE', KEYS[4], life_of_workers)
redis.call('SET', KEYS[5], about, 'PX', life_of_workers)
return redis.call('TIME')
