-- own_costs.lua: charges whose limits have costs of their own, and meters: units that are settled later.
--
-- Needs   open (budgets.lua), open_meters (estimates.lua). A part of `rare`
-- Gives   own_plan(op, first): what there is more to a charge with costs of its own, or nil and a fault: as money_plan
--         of budgets.lua, and `meters`, where there are any, for each the places of its windows among the
--         limits, its cost, and the length of its longest window

local function open_own(more, place)
  -- Makes the records of a charge: of units, of money. `place` is that of the key behind the limits'.
  place = place + more.n_meters
  if more.meters then
    rare().open_meters(more, KEYS[place])
    place = place + 1
  end
  if more.has_money then open(more, place) end
end

local function own_plan(op, first)
  local kind, n, _, records, price, lease, at = parse('<BBBBdd', op)
  if not (price >= 0 and price <= MOST_MONEY) then return nil, 'ERR a price is a number from 0' end -- no NaN
  local more = {
    op = op, first = first, n = n, head = OWN_HEAD, limit_size = OWN_SIZE, again = kind == ACQUIRE_AGAIN_OWN,
    price = price, lease = lease, opens = kind ~= PEEK_OWN and records > 0 and open_own, is_own = true,
    has_money = records % 2 == 1, n_meters = 0, meters = false, is_charged = false, is_due = false,
  }
  for j = 1, n do
    local length, cost, place, _
    _, _, length, _, cost, place, at = parse('<BddddB', op, at)
    if not (cost >= 0 and cost <= MOST_COST and cost % 1 == 0) then
      return nil, 'ERR a cost is a whole number from 0'
    end
    if place > 0 then
      more.meters = more.meters or {}
      local meter = more.meters[place] or {cost = cost, longest = 0}
      meter[#meter + 1], meter.longest, more.meters[place] = j, max(meter.longest, length), meter
      more.n_meters = max(more.n_meters, place)
    end
  end
  return more
end
