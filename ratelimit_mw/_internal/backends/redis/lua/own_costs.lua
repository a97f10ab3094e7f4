-- own_costs.lua: reads what there is more to a charge whose limits have costs of their own.
--
-- Needs   op, kind and n. A part of charges.lua
-- Gives   more: as money_plan of budgets.lua; how its limits are packed, `own_format`. What is not so stays nil: a small
--         table costs less
--         at, number, fault: as charges.lua

local _, _, others, records, own_price, own_lease, limits_at = parse('<BBBBdd', op)
local has_money, has_record = records % 2 == 1, records > 1
local n_meters = others - (has_money and 1 or 0) - (has_record and 1 or 0)
at, number = limits_at, (#op - OWN_HEAD - n * OWN_SIZE - n_meters * METER_SIZE) / ID_SIZE
if own_price >= 0 and own_price <= MOST_MONEY then -- no NaN
  more = {own_format = OWN_LIMIT, price = own_price, lease = own_lease, n_meters = n_meters, records = charges and others > 0}
  if has_money then more.has_money = true end
  if kind == ACQUIRE_AGAIN_OWN then more.again = true end
else
  fault = 'ERR a price is a number from 0'
end
