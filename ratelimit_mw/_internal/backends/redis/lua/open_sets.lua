-- open_sets.lua: commands on the open estimates of a meter.
--
-- Needs   note_damage (faults.lua)
-- Gives   on_set(command, open, ...)

local function on_set(command, open, ...)
  -- Does a command on a set of open estimates; what somebody has put in its place goes.
  local answer = redis.pcall(command, open, ...)
  if type(answer) ~= 'table' or not answer.err then return answer end
  if not answer.err:find('^WRONGTYPE') then error(answer, 0) end
  call('DEL', open)
  part(REPAIR).note_damage(open)
  return call(command, open, ...)
end
