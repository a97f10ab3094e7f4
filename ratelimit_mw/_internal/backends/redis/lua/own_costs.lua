-- own_costs.lua: reads what there is more to a charge whose limits have costs of their own.
--
-- Needs   op, kind, first and n. A part of charges.lua
-- Gives   more: as money_plan of budgets.lua, and `meters`, where there are any: for each its cost, and the length of its
--         longest window
--         at, number, fault: as charges.lua

at, number = OWN_HEAD + 1, (#op - OWN_HEAD - n * OWN_SIZE) / ID_SIZE
local _, _, _, records, own_price, own_lease, from = parse('<BBBBdd', op)
local n_meters, meters = 0, false
if not (own_price >= 0 and own_price <= MOST_MONEY) then fault = 'ERR a price is a number from 0' end -- no NaN
for _ = 1, n do
  local _, _, limit_length, _, own_cost, meter, behind = parse('<BddddB', op, from)
  from = behind
  if not (own_cost >= 0 and own_cost <= MOST_COST and own_cost % 1 == 0) then
    fault = 'ERR a cost is a whole number from 0'
  end
  if meter > 0 then
    meters = meters or {}
    local known = meters[meter]
    if not known then
      meters[meter], n_meters = {cost = own_cost, longest = limit_length}, math.max(n_meters, meter)
    elseif limit_length > known.longest then
      known.longest = limit_length
    end
  end
end
more = {
  op = op, first = first, n = n, head = OWN_HEAD, limit_size = OWN_SIZE, again = kind == ACQUIRE_AGAIN_OWN,
  price = own_price, lease = own_lease, records = records > 0 and kind ~= PEEK_OWN, is_own = true,
  has_money = records % 2 == 1, n_meters = n_meters, meters = meters, is_charged = false, is_due = false,
}
