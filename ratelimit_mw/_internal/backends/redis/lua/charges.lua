-- charges.lua: reads a charge.
--
-- Needs   op, kind and first: the operation, its letter, the number of keys before its own; money_plan
--         (budgets.lua)
-- Gives   n: its limits; at: the offset of the first; cost; whether it `charges`; number: of its ids
--         more: nil for most; else a table: what windows are taken `ahead`; of money see budgets.lua, of costs of its own
--         own_costs.lua; `states`, where others share keys with it
--         fault: why it is not done

local _, n, cost, price, lease = parse('<BBddd', op)
local at, charges, more, fault = CHARGE_HEAD + 1, kind ~= PEEK and kind ~= PEEK_OWN, nil, nil
local number = (#op - CHARGE_HEAD - n * LIMIT_SIZE) / ID_SIZE
if is_late and charges then
  fault = LATE
elseif kind >= OWN_COSTS then
  -- include own_costs
elseif cost == 1 and price == 0 and lease == 0 then
  more = nil -- as nearly all are
elseif not (cost >= 1 and cost <= MOST_COST and cost % 1 == 0 and price >= 0 and price <= MOST_MONEY) then -- no NaN
  fault = 'ERR a cost is a whole number from 1, a price one from 0'
elseif kind == TAKE_AHEAD then
  more = {ahead = price, n_meters = 0}
else
  more = part(MONEY).money_plan(op, price, lease)
end
