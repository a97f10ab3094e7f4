-- changes.lua: records a change of live entries in the log of changes, and sets their version. It is run in
-- the transaction that changes the entries, after them.
--
-- Guarantee: whoever finds the version that it knows in the log finds everything that changed since, in the
--        order of the changes. Where that can't be so (a version was set without the log, too much changed,
--        HGET is not allowed), the log begins anew with this version, and its readers read all entries.
-- KEYS   [1] the hash of the entries, [2] the log, [3] the version
-- ARGV   [1] the new version, [2] records that the log keeps, [3] 1 to begin anew, else 0;
--        then the names of the entries that were changed
-- Reply  nothing
-- Cost   two commands for each name, five more

-- A record is a member whose score is its number in the log: an entry as it is from then on (`=`, name, 0,
-- entry), the name of one that was removed (`-`, name), or the version (`v`, version), as the last record of
-- a change. A member that comes again gets a later number, where it says the same as before.

local version, kept = ARGV[1], tonumber(ARGV[2])
local latest = redis.pcall('ZRANGE', KEYS[2], -1, -1, 'WITHSCORES')
local number, known = 0, redis.pcall('GET', KEYS[3])
-- Removing comes first: a script that has begun to write may go on where memory is full.
if ARGV[3] == '0' and type(known) == 'string' and latest[1] == 'v' .. known then
  number = tonumber(latest[2])
  redis.call('ZREMRANGEBYRANK', KEYS[2], 0, #ARGV - 3 - kept)
else
  redis.call('DEL', KEYS[2])
end

local function record(text)
  number = number + 1
  redis.call('ZADD', KEYS[2], number, text)
end

for i = 4, #ARGV do
  local entry = redis.pcall('HGET', KEYS[1], ARGV[i])
  if type(entry) == 'table' then
    redis.call('DEL', KEYS[2])
    break
  end
  record(entry and '=' .. ARGV[i] .. '\0' .. entry or '-' .. ARGV[i])
end
record('v' .. version)
redis.call('SET', KEYS[3], version)
