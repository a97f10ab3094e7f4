-- lone.lua: does the one operation of a call that brings no other.
--
-- Functions and what they share cost when they are made: only those are that the operation needs.
--
-- Needs   releases.lua; decide.lua, charges.lua, charge_answers.lua; from `rare` the handlers of other operations,
--         sentence (faults.lua), mended_slots (slot_repair.lua), decide_metered (estimates.lua)
-- Gives   the reply, which it returns

local op, first = ARGV[2], 0
local kind, ok, said = byte(op), false, nil
if kind == FINISH then
  -- include releases
  ok, said = pcall(release, op, first)
else
  -- include decide
  if kind == ACQUIRE or kind == PEEK or kind == TAKE_AHEAD or kind == ACQUIRE_AGAIN or kind >= OWN_COSTS then
    -- include charges
    said = fault
    if not fault then
      local figures = {nil, nil, nil, nil, nil, nil, nil, nil, nil} -- room for those of three limits
      local decided = more and more.meters and rare().decide_metered or decide
      local admitted
      repeat
        ok, admitted = pcall(decided, more, figures, op, first, n, number, cost, charges, 1, at, true, number)
      until ok or not rare().mended_slots(admitted, op, first)
      said = admitted
      if ok then
        -- include charge_answers
        said = answer
      end
    end
  elseif is_late and (kind == DELETE or kind == RENEW) then
    said = LATE
  else
    ok, said = pcall(rare()[kind], op, first)
  end
end
if not ok then said = FAILED .. rare().sentence(said) end
if context and context.damaged then return {now, said, context.damaged .. ' ' .. context.first} end
return {now, said}
