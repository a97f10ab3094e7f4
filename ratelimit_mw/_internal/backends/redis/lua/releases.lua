-- releases.lua: ends charges: frees their slots, and has `finish` do what else there is.
--
-- Needs   stay.lua; of other parts finish (finish.lua), drop_foreign (slot_repair.lua), sentence (faults.lua)
-- Gives   release(op, first): the answer
-- Cost    one command for the slots of an operation in each set

local function release(op, first)
  local _, n, mode = byte(op, 1, 3)
  local ids, count, others, failed = {}, 0, mode ~= MONEY_UNTOUCHED, nil
  for at = FINISH_HEAD + 1 + n * LIMIT_SIZE, #op, ID_SIZE do
    count = count + 1
    ids[count] = slice(op, at, at + ID_SIZE - 1)
  end
  for j = 1, n do
    if byte(op, FINISH_HEAD + 1 + (j - 1) * LIMIT_SIZE) == SLOTS then
      local freed = redis.pcall('ZREM', KEYS[first + j], unpack(ids, 1, count))
      if type(freed) == 'table' and not part(REPAIR).drop_foreign(KEYS[first + j]) then failed = freed end
    else
      others = true
    end
  end
  if others then
    -- include stay
    part(MONEY).finish(op, first, n, mode)
  end
  return failed and FAILED .. part(REPAIR).sentence(failed) or DONE
end
