-- replace_entries.lua: replaces live entries that are over by what comes after them.
--
-- Guarantee: an entry that another process has changed since it was read stays as that one has set it.
--
-- KEYS   the hash of the entries
-- ARGV   for each entry its name, the entry as it was read, and what comes after it, or nothing
-- Reply  nothing
-- Cost   two commands for an entry

for i = 1, #ARGV, 3 do
  if redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1] then
    if ARGV[i + 2] == '' then
      redis.call('HDEL', KEYS[1], ARGV[i])
    else
      redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 2])
    end
  end
end
