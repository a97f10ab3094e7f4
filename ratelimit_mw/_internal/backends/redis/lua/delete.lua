-- delete.lua: deletes keys.
--
-- Needs   nothing but what batch.lua defines.
-- Gives   delete(op, first): the answer

local function delete(op, first)
  for j = 1, byte(op, 2) do
    local key = KEYS[first + j]
    call('DEL', key)
    local s = states and states[key]
    if type(s) == 'table' then s.changed, states[key] = false, false end
  end
  return DONE
end
