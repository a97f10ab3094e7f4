-- own_costs.lua: charges whose limits have costs of their own, and meters: units that are settled later.
--
-- Needs   plans (charges.lua), decide_window, decide_slots, decide_period; open (budgets.lua), open_meters (estimates.lua).
--         A part of `rare`
-- Gives   own_plan(said): as plan_of of charges.lua, with `meters`, where there are any: for each the places of its
--         windows among the limits, its cost, and the length of its longest window

local function open_own(plan, at)
  -- Makes the records of a charge: of units, of money. `at` is the place of the key behind the limits'.
  at = at + plan.n_meters
  if plan.meters then
    rare().open_meters(plan, KEYS[at])
    at = at + 1
  end
  if plan.has_money then rare().open(plan, at) end
end

local function own_plan(said)
  local kind, n, others, records, price, lease, position = unpack('<BBBBdd', said)
  if not (price >= 0 and price <= MOST_MONEY) then error('ERR a price is a number from 0', 0) end -- no NaN
  local charges = kind ~= PEEK_OWN
  local plan = {
    charges = charges, price = price, ahead = 0, lease = lease, again = kind == ACQUIRE_AGAIN_OWN,
    answer = '<B' .. string.rep('i8i8i8', n), size = #said, n = n, number = 0, op = '', first = 0,
    opens = charges and records > 0 and open_own, has_money = records % 2 == 1, n_meters = 0, meters = false,
  }
  for j = 1, n do
    local letter, quota, length, granule, cost, number
    letter, quota, length, granule, cost, number, position = unpack('<BddddB', said, position)
    if not (cost >= 0 and cost <= MOST_COST and cost % 1 == 0) then error('ERR a cost is a whole number from 0', 0) end
    local decision = letter == WINDOW and decide_window or letter == SLOTS and decide_slots or rare().decide_period
    plan[j] = {
      quota = quota, length = length, granule = granule, decide = decision, letter = letter,
      cost = max(cost, 1), charges = charges and cost > 0,
    }
    if number > 0 then
      plan.meters = plan.meters or {}
      local meter = plan.meters[number] or {cost = cost, longest = 0}
      meter[#meter + 1], meter.longest, plan.meters[number] = j, max(meter.longest, length), meter
      plan.n_meters = max(plan.n_meters, number)
    end
  end
  plans[said] = plan
  return plan
end
