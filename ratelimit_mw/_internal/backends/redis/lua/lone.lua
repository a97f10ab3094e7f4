-- lone.lua: does the one operation of a call that brings no other.
--
-- Functions and what they share cost when they are made: only those are that the operation needs.
--
-- Needs   overdue.lua, releases.lua, meters.lua; decide.lua, charges.lua, charge_answers.lua; parts.lua
-- Gives   the reply, which it returns

local op, first = ARGV[2], 0
local kind, ok, said = byte(op), false, nil
-- include overdue
if is_overdue then
  said = LATE
elseif kind == FINISH then
  -- include releases
  ok, said = pcall(release, op, first)
elseif kind == METER then
  -- include meters
  ok, said = pcall(meter, op, first)
else
  if kind == ACQUIRE or kind == PEEK or kind == TAKE_AHEAD or kind == ACQUIRE_AGAIN or kind >= OWN_COSTS then
    -- include decide
    -- include charges
    said = fault
    if not fault then
      local figures = {nil, nil, nil, nil, nil, nil, nil, nil, nil} -- room for those of three limits, or of four
      if n > 3 then figures = {nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil} end
      local meters, admitted = more and more.n_meters > 0, nil
      local asks = meters and (not charges or more.again or number > 1) and part(ESTIMATES).decide_metered or decide
      repeat
        ok, admitted = pcall(asks, more, figures, op, first, n, number, cost, charges, 1, at, true, number)
        if ok and meters and (admitted == 0 or more.is_due) then
          local again = part(ESTIMATES).lapsed
          ok, admitted = pcall(again, admitted, more, figures, op, first, n, number, cost, charges, 1, at, true, number)
        end
      until ok or not part(REPAIR).mended_slots(admitted, op, first)
      said = admitted
      if ok then
        -- include charge_answers
        said = answer
      end
    end
  else
    ok, said = pcall(part(kind).run, op, first)
  end
end
if not ok then said = FAILED .. part(REPAIR).sentence(said) end
if context and context.damaged then return {now, said, context.damaged .. ' ' .. context.first} end
return {now, said}
