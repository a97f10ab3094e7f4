-- spread.lua: takes in the keys of a call whose operations lie in several hash slots of one node of a cluster.
--
-- A server looks at declared keys before it runs a script, and all of them have to be of one slot. So only those of the
-- first operation are declared. The others are looked at when a command names them: where it is not served here, or is
-- moving and not here any more, the command fails, and its operation alone. Whatever would write to one key before it met
-- the next looks whether the whole slot is here first (`stay`).
--
-- Needs   ARGV as the call brings it. A part of batch.lua
-- Gives   KEYS: the keys of all operations; ARGV: without them

local n_keys, last = #KEYS, #ARGV
local behind = parse('<I2', ARGV[last]) + 2
for i = behind, last - 1 do
  n_keys = n_keys + 1
  KEYS[n_keys] = ARGV[i]
end
for i = last, behind, -1 do ARGV[i] = nil end
