-- charges.lua: asks all limits of a charge, and charges them if all admit it.
--
-- Needs   decide_window, decide_slots and, from `rare`, decide_period: each decides its limit, calls `decide` for the
--         next, and charges its own on the way back; open (budgets.lua) makes the record of a charge; own_plan
--         (own_costs.lua)
-- Gives   plan_of(said): the unpacked charge, kept in `plans` for the next ones that differ in their ids alone.
--         A limit has a `cost` (what has to be left of a window, and what it is charged), and whether it `charges`
--         decide(plan, j, alone, admitted): see below

local plans = {} -- what charges say but for their ids, which is the same for most of a batch

local function plan_of(said)
  if byte(said) >= OWN_COSTS then return rare().own_plan(said) end
  local kind, n, cost, price, lease, position = unpack('<BBddd', said)
  if not (cost >= 1 and cost <= MOST_COST and cost % 1 == 0 and price >= 0 and price <= MOST_MONEY) then -- no NaN
    error('ERR a cost is a whole number from 1, a price one from 0', 0)
  end
  local charges = kind ~= PEEK
  local plan = {
    charges = charges, price = kind ~= TAKE_AHEAD and price or 0, ahead = kind == TAKE_AHEAD and price or 0,
    lease = lease, again = kind == ACQUIRE_AGAIN, answer = '<B' .. string.rep('i8i8i8', n), size = #said, n = n,
    number = 0, op = '', first = 0, opens = lease > 0 and charges and rare().open,
  }
  for j = 1, n do
    local letter, quota, length, granule
    letter, quota, length, granule, position = unpack('<Bddd', said, position)
    local decision = letter == WINDOW and decide_window or letter == SLOTS and decide_slots or rare().decide_period
    plan[j] = {
      quota = quota, length = length, granule = granule, decide = decision, letter = letter, cost = cost,
      charges = charges,
    }
  end
  plans[said] = plan
  return plan
end

function decide(plan, j, alone, admitted)
  -- Decides the limits from the j-th on, and once all have been asked, charges them, the last one first: those
  -- of no other operation, which are written at once, before those that others share. So where memory is full
  -- nothing is charged that is shared. Returns how many are admitted, nil where TIME lies outside a period.
  local limit = plan[j]
  if limit then
    local key = KEYS[plan.first + j]
    if not shares or (states[key] == true) == alone then
      return limit.decide(plan, limit, key, j, alone, admitted)
    end
    return decide(plan, j + 1, alone, admitted)
  elseif not alone then
    return decide(plan, 1, true, admitted)
  end
  if plan.opens and admitted > 0 then plan.opens(plan, plan.first + j) end
  return admitted
end
