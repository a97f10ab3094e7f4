-- decide.lua: asks all limits of a charge, and charges them if all admit it.
--
-- What is read of a limit stays in local variables, and what is known of the charge in parameters, since a table would
-- cost more than the commands: to decide one limit `decide` calls itself for the next, and then charges its own. The
-- parts that it includes know of a limit its key, letter, quota, length, granule and cost (what has to be left of it),
-- and whether the charge `pays` that.
--
-- Needs   a charge (charges.lua); decide_period (budgets.lua)
-- Gives   decide(...): see below

function decide(more, figures, op, first, n, number, charge_cost, charges, j, at, alone, admitted)
  -- Decides the limits of a charge from the j-th of `n` on, which is at an offset of the operation, and once all have been
  -- asked, charges them, the last one first: those of no other operation (`alone`), which are written at once, before
  -- those that others share. So where memory is full nothing is charged that is shared. Returns how many of `number`
  -- are admitted, nil where TIME lies outside a period. A limit has three figures.
  if j > n then
    if not alone then
      at = more.own_format and OWN_HEAD + 1 or CHARGE_HEAD + 1
      return decide(more, figures, op, first, n, number, charge_cost, charges, 1, at, true, admitted)
    end
    if more and more.records and admitted > 0 then
      local behind = first + n -- there may be no limit at all
      -- include open_records
    end
    return admitted
  end
  local key, letter, quota, length, granule, next_at, meter, behind =
    KEYS[first + j], parse(more and more.own_format or '<Bddd', op, at)
  local cost, pays = charge_cost, charges
  if more then
    if meter then -- and a cost of its own
      cost, next_at = next_at, behind
      if cost ~= 1 then
        if not (cost >= 0 and cost <= MOST_COST and cost % 1 == 0) then error('ERR a cost is a whole number from 0', 0) end
        if cost == 0 then cost, pays = 1, false end
      end
      if meter > 0 and more.is_charged then pays = false end
    end
    if more.states and (more.states[key] == true) ~= alone then
      return decide(more, figures, op, first, n, number, charge_cost, charges, j + 1, next_at, alone, admitted)
    end
  end
  if letter == WINDOW then
    local shared = not alone and part(SHARING).shared(key, letter, quota, length, granule)
    local read = shared and shared.raw or redis.pcall('GETRANGE', key, '0', LAST_STAGED)
    -- include windows
  elseif letter == SLOTS then
    -- include slots
  else
    return part(MONEY).decide_period(key, quota, length, granule, more, figures, op, first, n, number, charge_cost, charges, j,
      next_at, alone, admitted)
  end
  return admitted
end
