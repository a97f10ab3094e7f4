-- operations.lua: walks over the operations of a batch: once for all but charges, once for charges.
--
-- Needs   decide, plan_of and plans (charges.lua), members (slots.lua); from `rare` finish and the handlers of single
--         operations, drop_foreign (slot_repair.lua), decide_metered (estimates.lua)
-- Gives   all_but_charges(), all_charges(): do the operations from `place` on, and leave `place` at one that failed
--         replies: the answers, by place; firsts: the number of keys before those of each charge

local replies, firsts = {time}, {0} -- `firsts` as `keys` below, of charges
local place, keys = 2, 0 -- of the operation in hand: its place in ARGV, and the number of keys before its own

local function all_but_charges()
  while place <= #ARGV do
    local op, first = ARGV[place], keys
    local kind, n, mode = byte(op, 1, 3)
    -- The number of keys is read from the operation alone: one which fails cannot shift those of the next.
    if kind == ACQUIRE or kind == PEEK or kind == TAKE_AHEAD or kind == ACQUIRE_AGAIN or kind >= OWN_COSTS then
      firsts[place] = first
      for i = first + 1, looks and first + n or 0 do
        local key = KEYS[i]
        local known = states[key]
        shares = shares or known ~= nil
        if known == nil or known == true then states[key] = not known end
      end
      keys = first + n + (kind >= OWN_COSTS and mode or byte(op, CHARGE_HEAD) > 0 and 1 or 0) -- no lease but 0 has a 0
    elseif kind == FINISH then
      keys = first + n + (mode ~= MONEY_UNTOUCHED and 1 or 0)
      local count, others, failed = 0, mode ~= MONEY_UNTOUCHED, nil
      for at = FINISH_HEAD + 1 + n * LIMIT_SIZE, #op, ID_SIZE do
        count = count + 1
        members[count] = slice(op, at, at + ID_SIZE - 1)
      end
      for j = 1, n do
        if byte(op, FINISH_HEAD + 1 + (j - 1) * LIMIT_SIZE) == SLOTS then
          local freed = redis.pcall('ZREM', KEYS[first + j], spread(members, 1, count))
          if type(freed) == 'table' and not rare().drop_foreign(KEYS[first + j]) then failed = freed end
        else
          others = true
        end
      end
      if others then rare().finish(op, first, n, mode) end
      replies[place] = failed and FAILED .. rare().sentence(failed) or DONE
    else
      keys = (kind == DELETE or kind == METER) and n or kind == RENEW and n + 256 * mode or byte(op, SETTLE_HEAD) + 1
      keys = first + keys
      if is_late and (kind == DELETE or kind == RENEW) then error(LATE, 0) end -- others may have come since
      replies[place] = rare()[kind](op, first)
    end
    place = place + 1
  end
end

local function all_charges()
  while place <= #ARGV do
    local first = firsts[place]
    if first then
      local op = ARGV[place]
      local kind, n = byte(op, 1, 2)
      if is_late and kind ~= PEEK and kind ~= PEEK_OWN then error(LATE, 0) end
      local size = kind < OWN_COSTS and CHARGE_HEAD + n * LIMIT_SIZE or OWN_HEAD + n * OWN_SIZE
      local said = slice(op, 1, size)
      local plan, number = plans[said] or plan_of(said), (#op - size) / ID_SIZE
      plan.op, plan.first, plan.number = op, first, number
      local decided = plan.meters and rare().decide_metered or decide
      local admitted = decided(plan, 1, not shares, number)
      if admitted then
        local answer = pack(plan.answer, admitted > 0 and ADMITTED or REFUSED, spread(reply, 1, 3 * plan.n))
        replies[place] = number == 1 and answer or answer .. pack('<I2', admitted)
      else
        replies[place] = OTHER_PERIOD
      end
    end
    place = place + 1
  end
end
