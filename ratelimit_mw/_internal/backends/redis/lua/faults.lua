-- faults.lua: puts what went wrong into words, and counts what was mended.
--
-- Needs   nothing.
-- Gives   sentence(fault): the text of an error that was caught; note_damage(key): counts a value as mended

local function sentence(fault)
  local said = type(fault) == 'table' and fault.err or tostring(fault) -- Redis 7 raises a table
  said = said:gsub('^[@=]%S+: %-?%d+: %-?', '') -- Redis 6 says where before it says what
  return (said:gsub('^%S+:%d+: ', 'ERR a fault of the script: '))
end

local function note_damage(key)
  context.damaged, context.first = (context.damaged or 0) + 1, context.first or key
end
